"""Decode steps that were recorded once: a CUDA graph launches a whole forward pass with one call from the host.

A recording is for a number of sequences and of logical pages, and a set of operating points; a step takes the
smallest that holds it and leaves the rest of its places free. Everything a step changes goes through two copies: the
page tables (`Room`) and the tokens with their places. Summaries of pages that became full are a recording of their
own, for the steps that fill some: no token of the same step may select the page that it lies in.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gossamer.attention.policy import OperatingPoint
from gossamer.attention.reads import Reads
from gossamer.attention.step import Span, Step
from gossamer.kernels.layout import PAGE_SIZE, BlockRow, QueryBlocks
from gossamer.kvcache.cache import KVCache
from gossamer.kvcache.summaries import FilledPages
from gossamer.kvcache.table import PageTable
from gossamer.kvcache.views import Room, StepViews
from gossamer.server.engine.model import Model
from gossamer.server.engine.transfer import Unread

_log = logging.getLogger(__name__)

Tensors = tuple[Tensor, ...]
Record = Callable[[Callable[[], Tensors]], tuple[Callable[[], None], Tensors]]
"""Runs a function and keeps what it launched -> what launches that again, and the tensors that it then fills."""

LEAST_PAGES = 64
GROWTH = 4  # from one number of pages to the next


@dataclass(frozen=True, slots=True)
class Token:
    """The next token of one sequence, to be fed to the model."""

    token: int  # anything where it is unread
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
    summarise: Callable[[], None] | None  # what selectors know of the pages that the step filled; None: nothing
    logits: Tensor  # [rows, V]
    reads: Reads


@dataclass(slots=True)
class CudaRecorder:
    """Records CUDA graphs that share their memory: one is replayed at a time, and read before the next."""

    pool: Any = None
    stream: Any = None  # one for all: libraries keep memory for each that they see

    def __call__(self, run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        before, mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
        self.stream = self.stream or torch.cuda.Stream()
        try:
            self.stream.wait_stream(before)
            with torch.cuda.stream(self.stream):
                run()  # kernels are compiled, and libraries take their memory
                torch.cuda.synchronize()
                # What would wait for the device is refused here: it would break off a recording, which torch does not
                # get over.
                torch.cuda.set_sync_debug_mode("error")
                run()
            torch.cuda.set_sync_debug_mode(mode)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                out = run()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.set_stream(before)
            torch.cuda.synchronize()  # before anything that a failed run uses is freed
        self.pool = graph.pool()
        return graph.replay, out


@dataclass(slots=True)
class DecodeGraphs:
    """All recordings of one model and cache. Used by the engine thread alone."""

    model: Model
    cache: KVCache
    most_rows: int  # sequences in a step
    most_pages: int  # of a sequence
    points: tuple[OperatingPoint, ...]  # that requests may name
    record: Record
    kept_free: int = 0  # bytes of the device's memory that recording leaves
    broken: bool = False  # a recording failed: some models decide on the host
    # None: there was not enough memory for it
    _made: dict[tuple[int, int, frozenset[OperatingPoint]], Recording | None] = field(default_factory=dict)

    def run(self, tokens: Sequence[Token], unread: Unread | None = None) -> tuple[Tensor, Reads] | None:
        """Logits [len(tokens), V] and what was read, on the device until the next call; None where there can be no
        recording. `unread`: tokens that only the device knows."""
        pages = max(token.table.num_pages for token in tokens)
        points = self._together(token.point for token in tokens)
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
        if unread is not None:
            unread.put(recording.inputs[0])
        recording.replay()
        if recording.summarise is not None and any((token.pos + 1) % PAGE_SIZE == 0 for token in tokens):
            recording.summarise()
        return recording.logits[: len(tokens)], recording.reads

    def record_ahead(self, report: Callable[[str], None]) -> None:
        """All sizes of steps whose sequences are at one point, and of mixed ones, so that no request waits for them."""
        rows, pages = list[int](), list[int]()
        while not rows or rows[-1] < self.most_rows:
            rows.append(self._rows(rows[-1] + 1 if rows else 1))
        while not pages or pages[-1] < self.most_pages:
            pages.append(self._pages(pages[-1] + 1 if pages else 1))
        alone = [frozenset({point}) for point in self.points]
        for points in alone + [frozenset(self.points)] * (len(alone) > 1):
            # The largest first, so that the others fit into its memory.
            for width in reversed(pages):
                for height in reversed(rows):
                    self._recording(height, width, points)
                    if self.broken:
                        return
        made = [key for key, recording in self._made.items() if recording is not None]
        report(
            f"Recorded decode steps of up to {rows[-1]} sequences and {pages[-1]} pages as {len(made)} graphs"
            + (f"; for {len(self._made) - len(made)} sizes there was not enough memory" * (len(made) < len(self._made)))
        )

    def _together(self, points: Iterable[OperatingPoint]) -> frozenset[OperatingPoint]:
        """The points that a recording is for: one alone, or all, so that there are not as many as mixtures."""
        asked = frozenset(points)
        return asked if len(asked) == 1 else frozenset(self.points) | asked

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
                self._made[key] = self._make(rows, pages, tuple(points)) if self._has_room() else None
            except RuntimeError as error:
                self._made[key] = None
                if not _lacks_memory(error):
                    self.broken = True
                    _log.warning(
                        "This model's decode step cannot be recorded as a CUDA graph; it is launched kernel by kernel, "
                        "which is slower where few sequences run.",
                        exc_info=True,
                    )
            if self._made[key] is None:
                _log.info("a decode step of %d sequences and %d pages is not recorded", rows, pages)
        return self._made.get(key)

    def _has_room(self) -> bool:
        if self.model.device.type != "cuda":
            return True
        free = torch.cuda.mem_get_info(self.model.device)[0]
        unused = torch.cuda.memory_reserved(self.model.device) - torch.cuda.memory_allocated(self.model.device)
        return free + unused > self.kept_free

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

        def summarise() -> Tensors:
            self._summarise(room.views, inputs[2:6].int())
            return ()

        replay, (logits, read) = self.record(run)
        known = any(part for layer in range(self.model.shape.layers) for part in room.views.summaries(layer))
        write = self.record(summarise)[0] if known else None
        return Recording(room, points, inputs, replay, write, logits, Reads({True: read}, {True: heads}))

    def _summarise(self, views: StepViews, blocks: Tensor) -> None:
        """blocks [4, rows]. Sequences that filled no page write what the first one does that filled one."""
        seq, _, pos, count = blocks.unbind()
        full = ((pos + 1) % PAGE_SIZE == 0) & (count > 0)
        row = torch.where(full, torch.arange(len(full), device=full.device), full.int().argmax())
        filled = FilledPages(seq[row], pos[row] // PAGE_SIZE)
        with torch.inference_mode():
            for layer in range(self.model.shape.layers):
                for kv, summaries in zip(views.layer(layer), views.summaries(layer), strict=True):
                    for summary in summaries:
                        summary.write(kv, filled)


def _lacks_memory(error: RuntimeError) -> bool:
    """torch has a type for its own allocator alone; CUDA's libraries say it in words."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        sign in str(error) for sign in ("out of memory", "ALLOC_FAILED")
    )
