"""Page summaries: the torch forms against loops in float64, and the Triton forms against the torch forms."""

import math
from dataclasses import dataclass, replace
from types import ModuleType

import pytest
import torch
from kernel_checks import run_interpreted
from torch import Tensor

from gossamer.kernels import page_summaries
from gossamer.kernels.layout import NULL_PAGE
from gossamer.kernels.page_summaries import page_bounds, page_labels, page_means, page_pools

NAN = float("nan")
SIZE = 64
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Pages:
    """A pool of NaN in which only the full pages hold keys: rotated, as a cache stores them."""

    pool: Tensor  # [G, P, S, D]
    physical: Tensor  # [F] int32
    first: Tensor  # [F] int32
    inv_freq: Tensor  # [R] float32
    scaling: float
    plain: Tensor  # [G, F, S, D] float64, the keys before RoPE
    channels: Tensor  # [G, r] int32

    def table(self, *summary: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A table full of NaN, every second head of a larger one: not contiguous."""
        heads, pages = self.pool.shape[:2]
        return torch.full((heads, 2, pages, *summary), NAN, dtype=dtype, device=self.pool.device)[:, 1]

    def to(self, device: str) -> "Pages":
        tensors = (self.pool, self.physical, self.first, self.inv_freq)
        return Pages(
            *(x.to(device) for x in tensors), scaling=self.scaling, plain=self.plain, channels=self.channels.to(device)
        )


def make_pages(
    *,
    heads: int = 3,
    dim: int = 32,
    turned: int | None = None,
    full: int = 4,
    dtype: torch.dtype = torch.float32,
    scaling: float = 1.0,
    begin: int = 0,
    seed: int = 0,
) -> Pages:
    gen = torch.Generator().manual_seed(seed)
    turned = dim // 2 if turned is None else turned
    inv_freq = 10000.0 ** -(torch.arange(turned) / max(turned, 1))
    first = begin + torch.randperm(1000, generator=gen)[:full].int() * SIZE
    physical = torch.randperm(full + 3, generator=gen)[:full].int()
    plain = torch.randn(heads, full, SIZE, dim, generator=gen, dtype=torch.float64)
    plain += torch.randn(heads, 1, 1, dim, generator=gen, dtype=torch.float64)  # means that are not near 0
    stored = plain.clone()
    for f, s in ((f, s) for f in range(full) for s in range(SIZE)):
        for i in range(turned):  # the angle in float32, as models compute it
            angle = float(torch.tensor(float(first[f] + s)) * inv_freq[i])
            a, b = plain[:, f, s, i], plain[:, f, s, i + turned]
            stored[:, f, s, i] = scaling * (a * math.cos(angle) - b * math.sin(angle))
            stored[:, f, s, i + turned] = scaling * (b * math.cos(angle) + a * math.sin(angle))
    # Two rows of a larger pool lie between a row and the next, as where heads or keys and values share memory.
    pool = torch.full((heads, full + 3, SIZE, 2, dim), NAN, dtype=dtype)[:, :, :, 1]
    pool[:, physical.long()] = stored.to(dtype)
    channels = torch.stack([torch.randperm(dim, generator=gen)[:5] for _ in range(heads)]).int()
    channels[-1, 1:3] = -1
    return Pages(pool, physical, first, inv_freq, scaling, plain, channels)


def check(out: Tensor, expected: Tensor, physical: Tensor, tolerance: float) -> None:
    """expected [G, F, ...] in the given pages, NaN as before in all others."""
    assert out.is_floating_point()
    others = [p for p in range(out.shape[1]) if p not in physical.tolist()]
    assert out[:, others].isnan().all(), "a page was written that is none of the call's"
    found = out[:, physical.long()].double().cpu()
    torch.testing.assert_close(found, expected.double().cpu(), atol=tolerance, rtol=tolerance)


def expected_bounds(keys: Tensor, parts: int) -> Tensor:
    """keys [G, F, S, D] -> [G, F, parts, 2, D]."""
    each = [(part.amin(2), part.amax(2)) for part in keys.split(SIZE // parts, 2)]
    return torch.stack([torch.stack(pair, 2) for pair in each], 2)


def expected_labels(keys: Tensor, channels: Tensor) -> Tensor:
    found = torch.zeros(*keys.shape[:3], channels.shape[1], dtype=torch.float64)
    for g, row in enumerate(channels.tolist()):
        for j, channel in enumerate(row):
            if channel >= 0:
                found[g, :, :, j] = keys[g, :, :, channel]
    return found


def expected_pools(plain: Tensor) -> Tensor:
    return torch.stack((plain.amax(2), plain.amin(2), plain.sum(2) / SIZE), 2)


def stored_keys(pages: Pages) -> Tensor:
    return pages.pool[:, pages.physical.long()].double().cpu()


SHAPES = [
    {"heads": 1, "dim": 16, "full": 1},
    {"heads": 3, "dim": 40, "full": 5, "dtype": torch.bfloat16},
    {"heads": 2, "dim": 24, "turned": 8, "full": 3, "dtype": torch.float16},
]


@pytest.mark.parametrize("options", SHAPES)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [1, 1 << 30])  # a page at a time, all at once
def test_each_table_holds_what_it_says(
    options: dict[str, int], out_dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_summaries, "PIECE_BYTES", piece)
    pages = make_pages(**options)  # type: ignore[arg-type]
    keys, dim, rounding = stored_keys(pages), pages.pool.shape[3], TOLERANCE[out_dtype]

    means = pages.table(dim, dtype=out_dtype)
    page_means(pages.pool, pages.physical, means)
    check(means, keys.sum(2) / SIZE, pages.physical, rounding)

    bounds = pages.table(4, 2, dim, dtype=out_dtype)
    page_bounds(pages.pool, pages.physical, bounds)
    check(bounds, expected_bounds(keys, 4).to(out_dtype), pages.physical, 0.0)

    labels = pages.table(SIZE, 5, dtype=out_dtype)
    page_labels(pages.pool, pages.physical, pages.channels, labels)
    check(labels, expected_labels(keys, pages.channels).to(out_dtype), pages.physical, 0.0)


@pytest.mark.parametrize("parts", [1, 2, 16, 64])
def test_bounds_of_parts_of_any_size(parts: int) -> None:
    pages = make_pages(full=2)
    bounds = pages.table(parts, 2, 32)
    page_bounds(pages.pool, pages.physical, bounds)
    check(bounds, expected_bounds(stored_keys(pages), parts), pages.physical, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "turned"), [(32, 16), (24, 8), (16, 0), (20, 10)])
@pytest.mark.parametrize("scaling", [1.0, 1.25])
def test_pools_are_those_of_the_keys_before_rope(
    dtype: torch.dtype, dim: int, turned: int, scaling: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_summaries, "PIECE_BYTES", 4 * 3 * SIZE * dim * 2)  # two pages at a time
    pages = make_pages(dim=dim, turned=turned, scaling=scaling, dtype=dtype, full=3)
    out = pages.table(3, dim)
    page_pools(pages.pool, pages.physical, pages.first, pages.inv_freq, scaling, out)
    check(out, expected_pools(pages.plain), pages.physical, {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype])


def test_pools_a_million_tokens_on() -> None:
    """Where angles in float32 are wrong by hundredths, it matters that they are the model's."""
    pages = make_pages(full=2, begin=1_000_000)
    out = pages.table(3, 32)
    page_pools(pages.pool, pages.physical, pages.first, pages.inv_freq, 1.0, out)
    check(out, expected_pools(pages.plain), pages.physical, 1e-5)


def fill(pages: Pages, form: ModuleType | None = None, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The four tables, by the public functions or by the Triton launches in `form`."""
    pool, physical, dim = pages.pool, pages.physical, pages.pool.shape[3]
    names = ("means", "bounds", "labels", "pools")
    means, bounds, labels, pools = (
        getattr(form or page_summaries, f"{'launch' if form else 'page'}_{x}") for x in names
    )
    tables = [pages.table(*summary, dtype=dtype) for summary in ((dim,), (4, 2, dim), (SIZE, 5), (3, dim))]
    means(pool, physical, tables[0])
    bounds(pool, physical, tables[1])
    labels(pool, physical, pages.channels, tables[2])
    pools(pool, physical, pages.first, pages.inv_freq, pages.scaling, tables[3])
    for table in tables:
        assert table._base is not None and table._base[:, 0].isnan().all(), "memory beside the table was written"
    return tables


def with_holes(pages: Pages) -> Pages:
    """The same call with entries that name no page."""
    null, none = torch.tensor([NULL_PAGE], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    physical = torch.cat((null, pages.physical[:1], null, pages.physical[1:], null))
    first = torch.cat((none, pages.first[:1], none, pages.first[1:], none))
    return replace(pages, physical=physical, first=first)


def test_entries_without_a_page_are_skipped() -> None:
    pages = make_pages(scaling=1.5)
    for found, expected in zip(fill(with_holes(pages)), fill(pages), strict=True):
        assert expected[:, pages.physical.long()].isfinite().all()
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("physical", [[], [NULL_PAGE]])
def test_no_page_changes_nothing(physical: list[int]) -> None:
    some = torch.tensor(physical, dtype=torch.int32)
    for table in fill(replace(make_pages(), physical=some, first=torch.zeros_like(some))):
        assert table.isnan().all()


def test_triton_under_the_interpreter() -> None:
    run_interpreted("summaries_interpreted.py")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("dim", "turned"), [(128, 64), (80, 16), (256, 128), (64, 0)])
def test_on_a_gpu(dtype: torch.dtype, dim: int, turned: int) -> None:
    pages = with_holes(make_pages(dim=dim, turned=turned, dtype=dtype, scaling=1.25))
    for out_dtype in (dtype, torch.float32):
        found = fill(pages.to("cuda"), dtype=out_dtype)
        tolerance = max(TOLERANCE[out_dtype], 1e-5)
        for mine, twin in zip(found, fill(pages, dtype=out_dtype), strict=True):
            torch.testing.assert_close(mine.cpu(), twin, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    """A page whose elements lie more than 2**31 from the beginning of its pool and of its tables."""
    pages = make_pages(heads=1, dim=128, full=2)
    count = 2**31 // (SIZE * 128) + 8
    pool = torch.full((1, count, SIZE, 128), NAN, dtype=torch.float16, device="cuda")
    pool[:, -pages.pool.shape[1] :] = pages.pool.half().cuda()
    far = replace(pages.to("cuda"), pool=pool, physical=(pages.physical + count - pages.pool.shape[1]).cuda())
    bounds = torch.full((1, count, SIZE, 2, 128), NAN, dtype=torch.float16, device="cuda")
    page_bounds(far.pool, far.physical, bounds)
    keys = pages.pool[:, pages.physical.long()].half().double()
    found = bounds[:, far.physical.long()].double().cpu()
    torch.testing.assert_close(found, expected_bounds(keys, SIZE), rtol=0, atol=0)
    assert int(bounds.isfinite().any(-1).any(-1).any(-1).sum()) == 2
