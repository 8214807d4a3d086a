"""One program per row finds where its kept entries end, from the highest bits down: floats that are not negative are in
the order of their bits. No sort, and always the same answer.

A count needs four passes, one per byte: a histogram of the byte among the entries that agree so far says which value of
it holds the last entry that is kept. A share of the mass takes one pass per bit.
"""

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.kernels import layout
from gossamer.kernels.choose import Kind
from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.triton.tiles import VARYING, along_row

PAGES, TOKENS = 4096, 8192  # entries of a row that stay in registers; what is longer is read again in each pass
VALUES = ("wanted", "value", "value_bits", "least", "recent", "most")

# What bounds the pages of a row: so many of the largest; a share of those seen; a share of the sum; a part of the
# largest; a number. The first two rank the pages that are read anyway first.
COUNT, SHARE, MASS, PART, FLOOR = (tl.constexpr(form) for form in range(5))
NULL_PAGE = tl.constexpr(layout.NULL_PAGE)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def launch_pages(
    mass: Tensor, kv: PagedKV, blocks: QueryBlocks, *, kind: Kind, value: float, least: int = 0, recent: int = 0
) -> Tensor:
    """As gossamer.kernels.choose.choose_pages."""
    mask, size = torch.empty(mass.shape, dtype=torch.bool, device=mass.device), kv.page_size
    form = {"tokens": COUNT, "share": SHARE, "mass": MASS, "part": PART, "weight": FLOOR}[kind]
    wanted = 0
    if kind == "tokens":
        wanted = -(-int(value) // size)
    elif kind == "weight":
        (wanted,) = struct.unpack("<i", struct.pack("<f", value))
    elif kind == "mass" and value == 1.0:  # a sum may round to the whole before the smallest entry is in it
        form, wanted = FLOOR, 1
    if mass.numel():
        groups, num, width = mass.shape
        _choose_pages[(groups * num,)](
            mass.contiguous(), mask.view(torch.uint8), kv.table, blocks.seq, blocks.pos, blocks.count,
            kv.table.stride(0), num, width, blocks.size, wanted, float(value), _bits_of(value), -(-least // size),
            -(-recent // size),
            FORM=form.value, LEAST=least > 0, RECENT=recent > 0, PAGE=size, **along_row(width, PAGES),
            enable_fp_fusion=True,  # said aloud, because Triton's default is about to change
        )  # fmt: skip
    return mask


def launch_tokens(mass: Tensor, most: int, share: float) -> Tensor:
    """As gossamer.kernels.choose.choose_tokens."""
    width = mass.shape[-1]
    most = min(most, width)
    found = torch.empty(*mass.shape[:-1], most, dtype=torch.int32, device=mass.device)
    if found.numel():
        _choose_tokens[(mass.numel() // width,)](
            mass.contiguous(), found, width, most if share > 0 else 0, most, _bits_of(share or 1.0),
            BY_MASS=0 < share < 1, **along_row(width, TOKENS), enable_fp_fusion=True,
        )  # fmt: skip
    return found


def _bits_of(value: float) -> int:
    """A number above 0 as the bits of a float64: as numbers, kernels take float32 alone."""
    (bits,) = struct.unpack("<q", struct.pack("<d", value))
    assert bits >= 2**32  # or it would be passed as another type
    return int(bits)


@triton.jit(do_not_specialize=(*VARYING, *VALUES))
def _choose_pages(
    mass_ptr, mask_ptr, table_ptr, seq_ptr, pos_ptr, count_ptr,
    table_b, num, width, size, wanted, value, value_bits, least, recent,
    FORM: tl.constexpr, LEAST: tl.constexpr, RECENT: tl.constexpr, PAGE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """mask [rows, width] of what is kept. least, recent: pages; wanted: pages, or the bits of the least weight."""
    row = tl.program_id(0)
    mass_ptr += row.to(tl.int64) * width
    mask_ptr += row.to(tl.int64) * width
    n = row % num
    pos = tl.load(pos_ptr + n)
    first = pos // size * size // PAGE
    seen = (pos + tl.load(count_ptr + n) - 1 + PAGE) // PAGE
    reach = first - recent
    table_ptr += tl.load(seq_ptr + n).to(tl.int64) * table_b
    RANKED: tl.constexpr = FORM <= SHARE
    begun = _bits(mass_ptr, table_ptr, first, reach, 0, width, RANKED, COLUMNS)
    bound, spare = 0, 0
    if RANKED:
        if FORM == SHARE:
            wanted = tl.ceil(seen.to(tl.float32) * value).to(tl.int32)
        bound, spare = _last_kept(mass_ptr, table_ptr, begun, first, reach, wanted - seen + first, width, True, COLUMNS)
    elif FORM == MASS:
        bound = _enough(mass_ptr, begun, value_bits, width, COLUMNS)
    elif FORM == PART:
        largest = tl.max(begun, 0)
        for begin in range(COLUMNS, width, COLUMNS):
            bits = _bits(mass_ptr, table_ptr, first, reach, begin, width, False, COLUMNS)
            largest = tl.maximum(largest, tl.max(bits, 0))
        part = largest.to(tl.float32, bitcast=True) * value
        bound = tl.maximum(part.to(tl.int32, bitcast=True), 1)
    else:
        bound = wanted
    least_bound, least_spare = 0, 0
    if LEAST:
        ranked = _bits(mass_ptr, table_ptr, first, reach, 0, width, True, COLUMNS)
        least_bound, least_spare = _last_kept(
            mass_ptr, table_ptr, ranked, first, reach, least - seen + first, width, True, COLUMNS
        )
    ties, least_ties = 0, 0
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        bits = _bits(mass_ptr, table_ptr, first, reach, begin, width, RANKED, COLUMNS)
        if RANKED:
            kept, ties = _kept(bits, bound, spare, ties)
        else:
            kept = bits >= bound
        if LEAST:
            ranked = _bits(mass_ptr, table_ptr, first, reach, begin, width, True, COLUMNS)
            more, least_ties = _kept(ranked, least_bound, least_spare, least_ties)
            kept = kept | more
        if RECENT:
            near = (column >= reach) & (column >= 0) & (column < first)
            kept = kept | (tl.load(table_ptr + column, mask=near, other=NULL_PAGE) != NULL_PAGE)
        tl.store(mask_ptr + column, kept.to(tl.uint8), mask=column < width)


@triton.jit(do_not_specialize=VALUES)
def _choose_tokens(
    mass_ptr, found_ptr, width, wanted, most, value_bits, BY_MASS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """found [rows, most]: where the kept entries are, ascending, then -1."""
    row = tl.program_id(0).to(tl.int64)
    mass_ptr += row * width
    found_ptr += row * most
    begun = _bits(mass_ptr, mass_ptr, 0, 0, 0, width, False, COLUMNS)
    bound, spare = _last_kept(mass_ptr, mass_ptr, begun, 0, 0, wanted, width, False, COLUMNS)
    if BY_MASS:
        enough = _enough(mass_ptr, begun, value_bits, width, COLUMNS)
        # Of entries equal to the last, as many as it takes.
        goal = _held(mass_ptr, begun, 1, width, COLUMNS) * value_bits.to(tl.float64, bitcast=True)
        missing = goal - _held(mass_ptr, begun, enough + 1, width, COLUMNS)
        each = enough.to(tl.float32, bitcast=True).to(tl.float64)
        equal = tl.ceil(missing / each).to(tl.int32)
        spare = tl.where(enough > bound, equal, tl.where(enough == bound, tl.minimum(spare, equal), spare))
        bound = tl.maximum(bound, enough)
    ties, written = 0, 0
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        bits = _bits(mass_ptr, mass_ptr, 0, 0, begin, width, False, COLUMNS)
        kept, ties = _kept(bits, bound, spare, ties)
        place = written + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(found_ptr + place, column, mask=kept)
        written += tl.sum(kept.to(tl.int32), 0)
    for begin in range(0, most, COLUMNS):
        place = begin + tl.arange(0, COLUMNS)
        tl.store(found_ptr + place, -1, mask=(place >= written) & (place < most))


@triton.jit
def _bits(mass_ptr, table_ptr, first, reach, begin, width, RANKED: tl.constexpr, COLUMNS: tl.constexpr):
    """A part of the row as integers; 0 behind its end. When RANKED, what is no past page is 0, all others are more, and
    the first page and those from `reach` on are the largest."""
    column = begin + tl.arange(0, COLUMNS)
    mass = tl.load(mass_ptr + column, mask=column < width, other=0.0)
    if RANKED:
        past = tl.load(table_ptr + column, mask=column < first, other=NULL_PAGE) != NULL_PAGE
        rank = tl.where(column >= reach, 2.0, tl.maximum(mass, TINY))
        mass = tl.where(past, tl.where(column == 0, 3.0, rank), 0.0)
    return mass.to(tl.int32, bitcast=True)


@triton.jit
def _last_kept(
    mass_ptr, table_ptr, begun, first, reach, keep, width, RANKED: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """The smallest of the `keep` largest entries above 0, and how many of those equal to it are among them. `begun`:
    the first COLUMNS entries."""
    spare, bound = keep, 0  # entries to take of those that agree with `bound`
    byte = tl.arange(0, 256)
    for i in range(4):
        shift = 24 - 8 * i
        counts = _counts(begun, bound, shift)
        for begin in range(COLUMNS, width, COLUMNS):
            more = _bits(mass_ptr, table_ptr, first, reach, begin, width, RANKED, COLUMNS)
            counts += _counts(more, bound, shift)
        reached = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # entries with this byte or a higher one
        chosen = tl.max(tl.where(reached >= spare, byte, 0), 0)
        spare -= tl.sum(tl.where(byte > chosen, counts, 0), 0)
        bound = bound * 256 + chosen
    # Where nothing is wanted, nothing is as large; where more is than there is, nothing that is 0 is taken.
    return tl.where(keep <= 0, 0x7FFFFFFF, bound), tl.where(bound == 0, 0, spare)


@triton.jit
def _counts(bits, bound, shift):
    """[256] int32: how many entries have each value of the byte at `shift`, of those that agree in all higher bits."""
    agrees = (bits >> shift >> 8) == bound
    return tl.histogram((bits >> shift) & 255, 256, mask=agrees)


@triton.jit
def _kept(bits, bound, spare, ties):
    """Whether each entry is above `bound` or one of the first `spare` equal to it, of which `ties` came before; and how
    many have come now."""
    equal = (bits == bound).to(tl.int32)
    kept = (bits > bound) | ((equal != 0) & (ties + tl.cumsum(equal, 0) <= spare))
    return kept, ties + tl.sum(equal, 0)


@triton.jit
def _enough(mass_ptr, begun, share_bits, width, COLUMNS: tl.constexpr):
    """The largest bits that enough entries reach: that they hold this share, a float64, of the row's sum."""
    goal = _held(mass_ptr, begun, 1, width, COLUMNS) * share_bits.to(tl.float64, bitcast=True)
    bound = 0
    for i in range(31):
        higher = bound | (1 << (30 - i))
        bound = tl.where(_held(mass_ptr, begun, higher, width, COLUMNS) >= goal, higher, bound)
    return tl.minimum(bound, 0x7F800000)  # infinity: where nothing is wanted, every bound holds


@triton.jit
def _held(mass_ptr, begun, bound, width, COLUMNS: tl.constexpr):
    """The sum of the row's entries that reach `bound`. `begun`: the first COLUMNS of them.

    It never falls as the bound does, rounding included: the order of the terms is fixed.
    """
    held = _held_part(begun, bound)
    for begin in range(COLUMNS, width, COLUMNS):
        held += _held_part(_bits(mass_ptr, mass_ptr, 0, 0, begin, width, False, COLUMNS), bound)
    return held


@triton.jit
def _held_part(bits, bound):
    return tl.sum(tl.where(bits >= bound, bits.to(tl.float32, bitcast=True).to(tl.float64), 0.0), 0)
