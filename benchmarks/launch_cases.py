"""Calls of every launch function of kernels/triton/, in every type and head size, and with what else changes the code:
single tokens, softcap, sinks, query heads per KV head, kinds of scores, strides, short chunks, keys and values in FP8.

The tensors have no memory. Their sizes are awkward (nothing that depends on a batch is a multiple of 16), because
Triton makes other code for sizes that are, or that are 1; the variants "aligned" and "alone" are these.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from gossamer.kernels import fp8
from gossamer.kernels.choose import Kind
from gossamer.kernels.layout import PAGE_SIZE, BlockRow, PagedKV, QueryBlocks, SparseIndex
from gossamer.kernels.rotary import Rotary
from gossamer.kernels.triton import (
    antidiagonal,
    choose,
    dropped_pages,
    gates,
    page_summaries,
    paged_decode,
    paged_prefill,
    probe,
    runs,
    score_pages,
    score_tokens,
    store,
)

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HEAD_DIMS = (128, 64, 96, 256)  # a launch is named after the first that needs it
TILE_ROWS = 128  # as attention/step.py cuts prompts
SCALE = 0.1
META = "meta"

blank = partial(torch.empty, device=META)
ints = partial(torch.empty, dtype=torch.int32, device=META)


class Variant(NamedTuple):
    """What a call differs by. `type` and `dim` are empty for kernels that see neither."""

    type: str
    dim: int
    name: str = ""

    def __str__(self) -> str:
        return " ".join([*filter(None, (self.type, f"d{self.dim}" if self.dim else "", self.name))])


class Case(NamedTuple):
    """One call of a launch function."""

    variant: Variant
    call: Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """The tensors of a call: `tiles` query blocks of one sequence (a prompt), or one of each of `tiles` (decode)."""

    type: str
    dim: int
    name: str = ""
    ratio: int = 4  # query heads per KV head
    heads: int = 7  # KV heads of the view
    tiles: int = 37
    pages: int = 1999  # of the longest sequence
    decode: bool = False
    pool: int = 10001  # physical pages
    fp8: bool = False

    @property
    def usual(self) -> bool:
        return self.name in ("", "decode", "fp8", "fp8 decode")

    @property
    def size(self) -> int:
        return 1 if self.decode else max(1, TILE_ROWS // self.ratio)

    @property
    def blocks(self) -> QueryBlocks:
        if self.decode:
            rows = [BlockRow(n, n, self.pages * PAGE_SIZE - 1, 1) for n in range(self.tiles)]
        else:
            begin = self.pages * PAGE_SIZE // 2
            rows = [BlockRow(0, n * self.size, begin + n * self.size, self.size) for n in range(self.tiles)]
        return QueryBlocks.of(self.size, rows, META)

    @property
    def dtype(self) -> torch.dtype:
        return TYPES[self.type]

    @property
    def q(self) -> Tensor:
        """As q, k and v arrive: the heads of a token adjoin."""
        return blank(self.tiles * self.size, self.heads * self.ratio, self.dim, dtype=self.dtype)

    @property
    def kv(self) -> PagedKV:
        sequences = self.tiles if self.decode else 1
        table, length, heads = ints(sequences, self.pages), ints(sequences), ints(self.heads)
        sink, window = ints(sequences, self.heads), ints(sequences, self.heads)
        k, v = (self.table(PAGE_SIZE, self.dim) for _ in range(2))
        scale = None
        if self.fp8:
            k, v = k.to(fp8.FP8), v.to(fp8.FP8)
            scale = blank(2, self.heads, self.pool, PAGE_SIZE, dtype=fp8.SCALE)
        return PagedKV(k, v, table, length, heads, sink, window, self.ratio, scale=scale)

    @property
    def read(self) -> tuple[Tensor, PagedKV, QueryBlocks]:
        return self.q, self.kv, self.blocks

    @property
    def written(self) -> tuple[Tensor, Tensor]:
        """out and lse."""
        return torch.empty_like(self.q), blank(*self.q.shape[:2], dtype=torch.float32)

    def index(self, tokens: bool) -> SparseIndex:
        start, count, token_start, token_count = (ints(self.heads, self.tiles) for _ in range(4))
        run = ints(self.heads * self.tiles * self.pages)
        return SparseIndex(start, count, run, *((token_start, token_count, run) if tokens else ()))

    def table(self, *shape: int) -> Tensor:
        """Something of each page."""
        return blank(self.heads, self.pool, *shape, dtype=self.dtype)

    def case(self, name: str, call: Callable[[], object]) -> Case:
        return Case(Variant(self.type, self.dim, f"{self.name} {name}".strip()), call)


def cases() -> list[Case]:
    """All of them."""
    found = [*_choices(), *_lists()]
    for own in _settings():
        found += [*_attention(own), *_summaries(own)]
        if not (own.type == "fp16" and own.decode):
            found += _selection(own)
    for own in _fp8():
        found += [*_attention(own), *_summaries(own), *_of_keys(own)]
    for own in _other_sizes():
        found += _attention(own)
        if own.name.endswith(("aligned", "ratio 1", "ratio 8")):
            found += _selection(own)
    return found


def _settings() -> Iterator[Setting]:
    """Every type and head size."""
    for type in TYPES:
        for dim in HEAD_DIMS:
            yield Setting(type, dim)
            yield Setting(type, dim, "decode", decode=True)


def _other_sizes() -> Iterator[Setting]:
    """For one type and head size, sizes for which Triton makes other code, or a launch other tiles."""
    for name, decode in (("", False), ("decode ", True)):
        own = Setting("bf16", 128, decode=decode)
        yield replace(own, name=name + "aligned", heads=16, tiles=32, pages=2048)
        yield replace(own, name=name + "alone", heads=1, tiles=1)
        yield replace(own, name=name + "large pool", pool=2**31 // (PAGE_SIZE * own.dim) + 1)  # strides of 64 bits
        for ratio in (1, 8, 32):
            yield replace(own, name=f"{name}ratio {ratio}", ratio=ratio)


def _fp8() -> Iterator[Setting]:
    """What reads keys and values themselves."""
    for type, dims in {"bf16": HEAD_DIMS, "fp16": (128,), "fp32": (128,)}.items():
        for dim in dims:
            yield Setting(type, dim, "fp8", fp8=True)
            yield Setting(type, dim, "fp8 decode", decode=True, fp8=True)


def _attention(own: Setting) -> Iterator[Case]:
    form = paged_decode if own.decode else paged_prefill

    def attend(name: str, *, tokens: bool = False, softcap: float = 0.0, sinks: bool = False) -> Case:
        given = blank(own.heads * own.ratio, dtype=own.dtype) if sinks else None
        options = {"scale": SCALE, "softcap": softcap, "sinks": given}
        return own.case(name, lambda: form.launch(*own.read, own.index(tokens), *own.written, **options))

    yield attend("")
    if own.usual and own.type == "bf16":
        yield attend("tokens", tokens=True)
        yield attend("softcap sinks", softcap=30.0, sinks=True)
    if own.usual and own.dim == 128:
        yield attend("softcap", softcap=30.0)
        yield attend("tokens softcap sinks", tokens=True, softcap=30.0, sinks=True)
    if own.usual and own.type != "fp32" and not own.fp8 and not own.decode:
        yield from _by_descriptors(own, attend)
    yield own.case("", lambda: store.launch(own.q, own.q, own.kv, own.blocks))


def _by_descriptors(own: Setting, attend: Callable[..., Case]) -> Iterator[Case]:
    """Prompts whose pages are loaded through tensor descriptors, as a GPU's file of tiles may ask for. GPUs that cannot
    do that launch what they would have launched."""

    def by_descriptors(name: str, more: dict[str, int], **options: bool | float) -> Case:
        variant, call = attend(f"{name} descriptors".strip(), **options)

        def tuned(kernel: str, tile: dict[str, int], device: torch.device, **_: object) -> dict[str, int]:
            return {**tile, "TMA": 1} | more if paged_prefill.capability(device) >= 90 else tile

        def asked() -> None:
            with patch.object(paged_prefill, "tuned", tuned):
                call()

        return Case(variant, asked)

    yield by_descriptors("", {})
    if own.type == "bf16":
        yield by_descriptors("tokens", {}, tokens=True)
        yield by_descriptors("softcap sinks", {}, softcap=30.0, sinks=True)
        if own.dim > 128:
            yield by_descriptors("128 rows", {"M": TILE_ROWS})


def _selection(own: Setting) -> Iterator[Case]:
    """What selectors launch in a step of such sizes."""
    yield from _scores(own)
    yield from _dropped(own)
    if own.decode:
        yield from _gates(own)
    if own.dim == 128 and own.usual:
        yield from _labels(own)
    yield from _of_keys(own)
    if own.type == "bf16" and own.usual and not own.decode:
        few = replace(own, name="short", tiles=1, ratio=32)  # few queries
        yield few.case("", lambda: probe.launch(*few.read, 64, scale=SCALE))


def _of_keys(own: Setting) -> Iterator[Case]:
    """Those that look at the keys themselves."""
    if not own.decode:
        yield from _antidiagonals(own)
        yield own.case("", lambda: probe.launch(*own.read, 64, scale=SCALE))


def _scores(own: Setting) -> Iterator[Case]:
    mean, bounds = own.table(own.dim), own.table(4, 2, own.dim)
    yield own.case("means", lambda: score_pages.launch(*own.read, mean, scale=SCALE))
    yield own.case("bounds", lambda: score_pages.launch_bounds(*own.read, bounds, scale=SCALE))
    if own.usual and own.type == "bf16" and own.dim == 128:  # a learned gate's queries are float32
        gate = replace(own, type="fp32")
        yield own.case("gates", lambda: score_pages.launch(gate.q, own.kv, own.blocks, mean, scale=SCALE))


def _gates(own: Setting) -> Iterator[Case]:
    """A gate's queries, of a gate as wide as a head; and a narrow one of which, as of the head, a part turns."""
    half = Rotary(blank(own.dim // 2, dtype=torch.float32))
    weight, norm = blank(own.heads, 1, own.ratio * own.dim, own.dim, dtype=own.dtype), blank(own.dim, dtype=own.dtype)
    yield own.case("", lambda: gates.launch(*own.read, weight, None, half, half))
    if own.usual and own.dim == 128:
        yield own.case("norm", lambda: gates.launch(*own.read, weight, norm, half, half))
        part = Rotary(blank(24, dtype=torch.float32), 1.5)
        narrow = blank(own.heads, own.ratio, own.ratio * own.dim, 80, dtype=own.dtype)
        yield own.case("in part", lambda: gates.launch(*own.read, narrow, norm, part, part))


def _labels(own: Setting) -> Iterator[Case]:
    for taken in (8, 32):
        labels, channels = own.table(PAGE_SIZE, taken), ints(own.heads, taken)
        call = partial(score_tokens.launch, *own.read, labels, channels, scale=SCALE)
        yield own.case(f"{taken} channels", call)


def _antidiagonals(own: Setting) -> Iterator[Case]:
    strides = (4, 8, 16, 32) if own.type == "bf16" and own.dim == 128 else (8, 16)
    for stride in strides if own.usual else (16,):
        yield own.case(f"stride {stride}", partial(antidiagonal.launch, *own.read, stride, scale=SCALE))
    if own.usual and own.type == "bf16":
        for tiles in (1, 8):
            few = replace(own, tiles=tiles)
            yield own.case(f"{tiles} tiles", partial(antidiagonal.launch, *few.read, 16, scale=SCALE))


def _dropped(own: Setting) -> Iterator[Case]:
    means = own.table(own.dim), own.table(own.dim)
    for name, softcap in (("", 0.0), ("softcap", 30.0)) if own.usual and own.dim == 128 else (("", 0.0),):
        options = {"scale": SCALE, "softcap": softcap}
        call = partial(dropped_pages.launch, *own.read, own.index(False), *own.written, *means, **options)
        yield own.case(name, call)


def _summaries(own: Setting) -> Iterator[Case]:
    if own.decode:
        return
    kv, physical, channels = own.kv, ints(own.tiles), ints(own.heads, 24)
    pool, scale = kv.k, kv.key_scale
    mean, bounds, labels = own.table(own.dim), own.table(4, 2, own.dim), own.table(PAGE_SIZE, 24)
    yield own.case("", lambda: page_summaries.launch_means(pool, physical, mean, scale))
    yield own.case("", lambda: page_summaries.launch_bounds(pool, physical, bounds, scale))
    yield own.case("", lambda: page_summaries.launch_labels(pool, physical, channels, labels, scale))
    gathered, some = pool[:, : own.tiles], None if scale is None else scale[:, : own.tiles]
    pooled = blank(own.heads, own.tiles, 3, own.dim, dtype=torch.float32)
    for name, turned in (("", own.dim // 2), ("turned in part", own.dim // 8)):
        frequencies = blank(turned, dtype=torch.float32)
        first = ints(own.tiles)
        call = partial(page_summaries.launch_pools, gathered, physical, first, frequencies, 1.0, pooled, some)
        yield own.case(name, call)


def _choices() -> Iterator[Case]:
    budgets: tuple[tuple[Kind, float], ...] = (
        ("tokens", 2048),
        ("share", 0.1),
        ("mass", 0.9),
        ("part", 0.1),
        ("weight", 0.1),
    )
    for width in (100, 1999, 16385):
        for decode in (False, True):
            own = Setting("bf16", 128, pages=width, decode=decode)
            mass = blank(own.heads, own.tiles, width, dtype=torch.float32)
            for kind, value in budgets:
                name = f"{kind} of {width}" + " for one query" * decode
                call = partial(choose.launch_pages, mass, own.kv, own.blocks, kind=kind, value=value)
                yield Case(Variant("", 0, name), call)
                if width == 1999:
                    yield Case(Variant("", 0, f"{name}, least and recent"), partial(call, least=256, recent=128))
        for share in (1.0, 0.9):
            name = f"tokens of {width}" + " by mass" * (share < 1)
            yield Case(Variant("", 0, name), partial(choose.launch_tokens, mass.flatten(0, 1), 64, share))


def _lists() -> Iterator[Case]:
    for name, width in (("", 1999), (" aligned", 2048)):
        for decode in (False, True):
            own = Setting("bf16", 128, pages=width, decode=decode)
            pages, tokens = blank(own.heads, own.tiles, width, dtype=torch.bool), ints(own.heads, own.tiles, width)
            for some in (None, tokens):
                said = "pages" + " and tokens" * (some is not None) + " for one query" * decode + name
                yield Case(Variant("", 0, said), partial(runs.launch, pages, some, own.kv, own.blocks))
