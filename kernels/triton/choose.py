"""One program per row finds where its kept entries end, from the highest bits down: floats that are not negative are in
the order of their bits. No sort, and always the same answer.

A count needs four passes, one per byte: a histogram of the byte among the entries that agree so far says which value of
it holds the last entry that is kept. A share of the mass takes one pass per bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096  # entries of a row that stay in registers; what is longer is read again in each pass


def launch_count(mass: Tensor, keep: Tensor) -> Tensor:
    """As gossamer.kernels.choose.choose_count."""
    mask = torch.empty(mass.shape, dtype=torch.bool, device=mass.device)
    if mass.numel():
        width = mass.shape[-1]
        _choose_count[(mass.numel() // width,)](
            mass.contiguous(), keep.contiguous(), mask.view(torch.uint8), width, width, POSITIONS=False, **shape(width),
            enable_fp_fusion=True,  # said aloud, because Triton's default is about to change
        )  # fmt: skip
    return mask


def launch_positions(mass: Tensor, most: int) -> Tensor:
    """mass [R, K] -> [R, most] int32, most <= K: where the `most` largest entries that are > 0 are (of equal ones those
    with the lower index), ascending, -1 behind the last."""
    found = torch.full((mass.shape[0], most), -1, dtype=torch.int32, device=mass.device)
    if found.numel():
        keep = torch.full(mass.shape[:1], most, dtype=torch.int32, device=mass.device)
        width = mass.shape[1]
        _choose_count[(mass.shape[0],)](
            mass.contiguous(), keep, found, width, most, POSITIONS=True, **shape(width), enable_fp_fusion=True
        )
    return found


def launch_mass(mass: Tensor, share: float) -> Tensor:
    """As gossamer.kernels.choose.choose_mass, for a share between 0 and 1."""
    mask = torch.empty(mass.shape, dtype=torch.bool, device=mass.device)
    if mass.numel():
        width = mass.shape[-1]
        # By way of memory, because a kernel takes numbers as float32 alone.
        goal = torch.full((1,), share, dtype=torch.float64, device=mass.device)
        _choose_share[(mass.numel() // width,)](
            mass.contiguous(), goal, mask.view(torch.uint8), width, **shape(width), enable_fp_fusion=True
        )
    return mask


def shape(width: int) -> dict[str, int]:
    """How many entries of such a row stay in registers, and over how many warps they lie."""
    columns = min(COLUMNS, triton.next_power_of_2(width))
    return {"COLUMNS": columns, "num_warps": 8 if columns > 1024 else 4}


@triton.jit
def _choose_count(mass_ptr, keep_ptr, out_ptr, width, out_width, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [rows, out_width]: a mask of the row's entries, or when POSITIONS where the chosen ones are."""
    row = tl.program_id(0).to(tl.int64)
    mass_ptr += row * width
    out_ptr += row * out_width
    begun = _bits(mass_ptr, 0, width, COLUMNS)
    real = tl.sum((begun > 0).to(tl.int32), 0)
    for begin in range(COLUMNS, width, COLUMNS):
        real += tl.sum((_bits(mass_ptr, begin, width, COLUMNS) > 0).to(tl.int32), 0)
    spare = tl.minimum(real, tl.load(keep_ptr + row))  # entries to take of those that agree with `bound`
    bound = 0
    byte = tl.arange(0, 256)
    for i in range(4):
        shift = 24 - 8 * i
        counts = _counts(begun, bound, shift)
        for begin in range(COLUMNS, width, COLUMNS):
            counts += _counts(_bits(mass_ptr, begin, width, COLUMNS), bound, shift)
        reached = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts  # entries with this byte or a higher one
        chosen = tl.max(tl.where(reached >= spare, byte, 0), 0)
        spare -= tl.sum(tl.where(byte > chosen, counts, 0), 0)
        bound = bound * 256 + chosen
    bound = tl.where(spare <= 0, 0x7FFFFFFF, bound)  # nothing is wanted
    ties, written = 0, 0
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        bits = _bits(mass_ptr, begin, width, COLUMNS)
        equal = (bits == bound).to(tl.int32)
        kept = (bits > bound) | ((equal != 0) & (ties + tl.cumsum(equal, 0) <= spare))
        ties += tl.sum(equal, 0)
        if POSITIONS:
            place = written + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(out_ptr + place, column, mask=kept)
            written += tl.sum(kept.to(tl.int32), 0)
        else:
            tl.store(out_ptr + column, kept.to(tl.uint8), mask=column < width)


@triton.jit
def _counts(bits, bound, shift):
    """[256] int32: how many entries have each value of the byte at `shift`, of those that agree in all higher bits."""
    agrees = (bits >> shift >> 8) == bound
    return tl.histogram((bits >> shift) & 255, 256, mask=agrees)


@triton.jit
def _choose_share(mass_ptr, goal_ptr, mask_ptr, width, COLUMNS: tl.constexpr):
    """goal [1] float64: the share of the row's sum that its kept entries must reach."""
    row = tl.program_id(0).to(tl.int64)
    mass_ptr += row * width
    mask_ptr += row * width
    begun = _bits(mass_ptr, 0, width, COLUMNS)
    goal = _held(mass_ptr, begun, 1, width, COLUMNS) * tl.load(goal_ptr)
    bound = 0  # the largest bits that enough entries reach
    for i in range(31):
        higher = bound | (1 << (30 - i))
        bound = tl.where(_held(mass_ptr, begun, higher, width, COLUMNS) >= goal, higher, bound)
    bound = tl.minimum(bound, 0x7F800000)  # infinity: where nothing is wanted, every bound holds
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        kept = _bits(mass_ptr, begin, width, COLUMNS) >= bound
        tl.store(mask_ptr + column, kept.to(tl.uint8), mask=column < width)


@triton.jit
def _bits(mass_ptr, begin, width, COLUMNS: tl.constexpr):
    """A part of the row as integers; 0 behind its end."""
    column = begin + tl.arange(0, COLUMNS)
    return tl.load(mass_ptr + column, mask=column < width, other=0.0).to(tl.int32, bitcast=True)


@triton.jit
def _held(mass_ptr, begun, bound, width, COLUMNS: tl.constexpr):
    """The sum of the row's entries that reach `bound`. `begun`: the first COLUMNS of them.

    It never falls as the bound does, rounding included: the order of the terms is fixed.
    """
    held = _held_part(begun, bound)
    for begin in range(COLUMNS, width, COLUMNS):
        held += _held_part(_bits(mass_ptr, begin, width, COLUMNS), bound)
    return held


@triton.jit
def _held_part(bits, bound):
    return tl.sum(tl.where(bits >= bound, bits.to(tl.float32, bitcast=True).to(tl.float64), 0.0), 0)
