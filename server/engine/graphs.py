"""Decode steps that were recorded once: a CUDA graph launches a whole forward pass with one call from the host.

A recording is for a number of sequences and of logical pages, and a set of operating points; a step takes the smallest
that holds it and leaves the rest of its places free. Everything a step changes goes through two copies: the page tables
(`Room`) and the tokens with their places. A summary of a page that the step filled is written after it: no token of the
same step may select the page that it lies in.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gossamer.attention.policy import OperatingPoint
from gossamer.attention.reads import Reads
from gossamer.attention.step import Span, Step, filled_pages
from gossamer.kernels.layout import BlockRow, QueryBlocks
from gossamer.kvcache.cache import KVCache
from gossamer.kvcache.table import PageTable
from gossamer.kvcache.views import Room
from gossamer.server.engine.model import Model

_log = logging.getLogger(__name__)

Tensors = tuple[Tensor, ...]
Record = Callable[[Callable[[], Tensors]], tuple[Callable[[], None], Tensors]]
"""Runs a function and keeps what it launched -> what launches that again, and the tensors that it then fills."""

LEAST_PAGES = 64
GROWTH = 4  # from one number of pages to the next


@dataclass(frozen=True, slots=True)
class Token:
    """The next token of one sequence, to be fed to the model."""

    token: int
    pos: int
    point: OperatingPoint
    table: PageTable


@dataclass(slots=True)
class Recording:
    """One graph, and the memory that it reads and writes."""

    room: Room
    points: tuple[OperatingPoint, ...]
    inputs: Tensor  # [6 + points, rows] int64: token, position, the query block's four numbers, whether of each point
    replay: Callable[[], None]
    logits: Tensor  # [rows, V]
    reads: Reads


@dataclass(slots=True)
class CudaRecorder:
    """Records CUDA graphs that share their memory: one is replayed at a time, and read before the next."""

    pool: Any = None

    def __call__(self, run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            run()  # kernels are compiled, and libraries take their memory
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = run()
        self.pool = graph.pool()
        return graph.replay, out


@dataclass(slots=True)
class DecodeGraphs:
    """All recordings of one model and cache. Used by the engine thread alone."""

    model: Model
    cache: KVCache
    most_rows: int  # sequences in a step
    most_pages: int  # of a sequence
    record: Record
    broken: bool = False  # a recording failed: some models decide on the host
    # None: there was not enough memory for it
    _made: dict[tuple[int, int, frozenset[OperatingPoint]], Recording | None] = field(default_factory=dict)

    def run(self, tokens: Sequence[Token]) -> tuple[Tensor, Reads] | None:
        """Logits [len(tokens), V] until the next call, and what was read; None where there can be no recording."""
        pages = max(token.table.num_pages for token in tokens)
        points = frozenset(token.point for token in tokens)
        recording = self._recording(self._rows(len(tokens)), self._pages(pages), points)
        if recording is None:
            return None
        self.cache.fill(recording.room, [token.table for token in tokens])
        pinned = self.model.device.type == "cuda"
        inputs = torch.zeros(recording.inputs.shape, dtype=torch.int64, pin_memory=pinned)
        inputs[2:4] = torch.arange(inputs.shape[1])
        numbers = [
            (t.token, t.pos, n, n, t.pos, 1, *(t.point is p for p in recording.points)) for n, t in enumerate(tokens)
        ]
        inputs[:, : len(tokens)] = torch.tensor(numbers, dtype=torch.int64).T
        recording.inputs.copy_(inputs, non_blocking=True)
        recording.replay()
        self._summarise(recording, [Span(token.pos, 1, 0) for token in tokens])
        return recording.logits[: len(tokens)], recording.reads

    def record_ahead(self, point: OperatingPoint, report: Callable[[str], None]) -> None:
        """All sizes for steps whose sequences are all at this point, so that no request waits for them."""
        rows, pages = list[int](), list[int]()
        while not rows or rows[-1] < self.most_rows:
            rows.append(self._rows(rows[-1] + 1 if rows else 1))
        while not pages or pages[-1] < self.most_pages:
            pages.append(self._pages(pages[-1] + 1 if pages else 1))
        # The largest first, so that the others fit into its memory.
        for width in reversed(pages):
            for height in reversed(rows):
                self._recording(height, width, frozenset({point}))
                if self.broken:
                    return
        made = [key for key, recording in self._made.items() if recording is not None]
        report(
            f"Recorded decode steps of up to {rows[-1]} sequences and {pages[-1]} pages as {len(made)} graphs"
            + (f"; for {len(self._made) - len(made)} sizes there was not enough memory" * (len(made) < len(self._made)))
        )

    def _rows(self, rows: int) -> int:
        return int(min(self.most_rows, 1 << (rows - 1).bit_length()))

    def _pages(self, pages: int) -> int:
        width = LEAST_PAGES
        while width < pages:
            width *= GROWTH
        return min(width, self.most_pages)

    def _recording(self, rows: int, pages: int, points: frozenset[OperatingPoint]) -> Recording | None:
        key = (rows, pages, points)
        if key not in self._made and not self.broken:
            try:
                self._made[key] = self._make(rows, pages, tuple(points))
            except torch.OutOfMemoryError:
                self._made[key] = None
                _log.info("no memory to record a decode step of %d sequences and %d pages", rows, pages)
            except RuntimeError:
                self.broken = True
                _log.warning(
                    "This model's decode step cannot be recorded as a CUDA graph; it is launched kernel by kernel, "
                    "which is slower where few sequences run.",
                    exc_info=True,
                )
        return self._made.get(key)

    def _make(self, rows: int, pages: int, points: tuple[OperatingPoint, ...]) -> Recording:
        room, device = self.cache.room(rows, pages), self.model.device
        inputs = torch.zeros(6 + len(points), rows, dtype=torch.int64, device=device)
        inputs[2:4] = torch.arange(rows, device=device)
        every = torch.arange(rows, device=device)
        free = tuple(BlockRow(n, n, 0, 1) for n in range(rows))
        heads = 0

        def run() -> Tensors:
            nonlocal heads
            reads, numbers = Reads(), inputs[2:].int()
            recorded = {point: numbers[4 + i] > 0 for i, point in enumerate(points)}
            blocks = QueryBlocks(1, free, *numbers[:4].unbind())
            spans = (Span(0, 1, 0),) * rows
            step = Step(spans, None, blocks, room.views, points, reads=reads, recorded=recorded)
            logits = self.model.forward(inputs[0], inputs[1], step, every)
            heads = reads.heads[True]
            return logits, reads.read[True]

        replay, (logits, read) = self.record(run)
        return Recording(room, points, inputs, replay, logits, Reads({True: read}, {True: heads}))

    def _summarise(self, recording: Recording, spans: Sequence[Span]) -> None:
        filled = filled_pages(spans, self.model.device)
        if filled is None:
            return
        views = recording.room.views
        with torch.inference_mode():
            for layer in range(self.model.shape.layers):
                for kv, summaries in zip(views.layer(layer), views.summaries(layer), strict=True):
                    for summary in summaries:
                        summary.write(kv, filled)
