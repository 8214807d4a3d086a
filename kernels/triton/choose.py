"""One program per row finds where its kept entries end, bit by bit: floats that are not negative are in the order of
their bits, so 31 passes over the row find the largest bound that still holds. No sort, and always the same answer."""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096  # entries of a row that stay in registers; what is longer is read again in each pass


def launch_count(mass: Tensor, keep: Tensor) -> Tensor:
    """As gossamer.kernels.choose.choose_count."""
    return _choose(mass, keep, False)


def launch_mass(mass: Tensor, share: float) -> Tensor:
    """As gossamer.kernels.choose.choose_mass, for a share between 0 and 1."""
    # By way of memory, because a kernel takes numbers as float32 alone.
    return _choose(mass, torch.full((1,), share, dtype=torch.float64, device=mass.device), True)


def shape(width: int) -> dict[str, int]:
    """How many entries of such a row stay in registers, and over how many warps they lie."""
    columns = min(COLUMNS, triton.next_power_of_2(width))
    return {"COLUMNS": columns, "num_warps": 8 if columns > 1024 else 4}


def _choose(mass: Tensor, goal: Tensor, shares: bool) -> Tensor:
    mask = torch.empty(mass.shape, dtype=torch.bool, device=mass.device)
    if mass.numel():
        width = mass.shape[-1]
        _choose_rows[(mass.numel() // width,)](
            mass.contiguous(), goal.contiguous(), mask.view(torch.uint8), width, SHARES=shares, **shape(width),
            enable_fp_fusion=True,  # said aloud, because Triton's default is about to change
        )  # fmt: skip
    return mask


@triton.jit
def _choose_rows(mass_ptr, goal_ptr, mask_ptr, width, SHARES: tl.constexpr, COLUMNS: tl.constexpr):
    """goal: how many entries to keep, [rows] int32, or the share of the sum that they must reach, [1] float64, when
    SHARES."""
    row = tl.program_id(0).to(tl.int64)
    mass_ptr += row * width
    mask_ptr += row * width
    begun = _bits(mass_ptr, 0, width, COLUMNS)
    goal = _held(mass_ptr, begun, 1, width, SHARES, COLUMNS)
    goal = goal * tl.load(goal_ptr) if SHARES else tl.minimum(goal, tl.load(goal_ptr + row))
    bound = 0  # the largest bits that enough entries reach
    for i in range(31):
        higher = bound | (1 << (30 - i))
        bound = tl.where(_held(mass_ptr, begun, higher, width, SHARES, COLUMNS) >= goal, higher, bound)
    bound = tl.minimum(bound, 0x7F800000)  # infinity: where nothing is wanted, every bound holds
    spare = goal
    if not SHARES:
        spare -= _held(mass_ptr, begun, bound + 1, width, SHARES, COLUMNS)
    ties = 0
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        bits = _bits(mass_ptr, begin, width, COLUMNS)
        chosen = bits >= bound
        if not SHARES:
            equal = (bits == bound).to(tl.int32)
            chosen = (bits > bound) | ((equal != 0) & (ties + tl.cumsum(equal, 0) <= spare))
            ties += tl.sum(equal, 0)
        tl.store(mask_ptr + column, chosen.to(tl.uint8), mask=column < width)


@triton.jit
def _bits(mass_ptr, begin, width, COLUMNS: tl.constexpr):
    """A part of the row as integers; 0 behind its end."""
    column = begin + tl.arange(0, COLUMNS)
    return tl.load(mass_ptr + column, mask=column < width, other=0.0).to(tl.int32, bitcast=True)


@triton.jit
def _held(mass_ptr, begun, bound, width, SHARES: tl.constexpr, COLUMNS: tl.constexpr):
    """How many of the row's entries reach `bound`, or their sum when SHARES. `begun`: the first COLUMNS of them.

    The sum never falls as the bound does, rounding included: the order of the terms is fixed.
    """
    held = _held_part(begun, bound, SHARES)
    for begin in range(COLUMNS, width, COLUMNS):
        held += _held_part(_bits(mass_ptr, begin, width, COLUMNS), bound, SHARES)
    return held


@triton.jit
def _held_part(bits, bound, SHARES: tl.constexpr):
    if SHARES:
        return tl.sum(tl.where(bits >= bound, bits.to(tl.float32, bitcast=True).to(tl.float64), 0.0), 0)
    else:
        return tl.sum((bits >= bound).to(tl.int32), 0)
