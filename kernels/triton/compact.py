"""One program per row of a mask or of token lists writes its chosen entries one behind the other."""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 1024


def launch(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As gossamer.kernels.compact.compact."""
    return _compact_rows(mask, mask.view(torch.uint8), mask.sum(-1, dtype=torch.int32), False)


def launch_tokens(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As gossamer.kernels.compact.compact_tokens."""
    return _compact_rows(tokens, tokens, (tokens >= 0).sum(-1, dtype=torch.int32), True)


def _compact_rows(given: Tensor, source: Tensor, count: Tensor, values: bool) -> tuple[Tensor, Tensor, Tensor]:
    start = (count.flatten().cumsum(0, dtype=torch.int32) - count.flatten()).view_as(count)
    packed = torch.empty(given.numel(), dtype=torch.int32, device=given.device)
    if given.numel():
        # Triton's default for fusion is about to change and warns about it; nothing here is a float.
        _compact[(count.numel(),)](
            source.contiguous(), start, packed, given.shape[-1], VALUES=values, COLUMNS=COLUMNS, enable_fp_fusion=True
        )
    return start, count, packed


@triton.jit
def _compact(source_ptr, start_ptr, packed_ptr, width, VALUES: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    source_ptr += row.to(tl.int64) * width
    to = packed_ptr + tl.load(start_ptr + row)
    written = 0
    for begin in range(0, width, COLUMNS):
        column = begin + tl.arange(0, COLUMNS)
        if VALUES:
            value = tl.load(source_ptr + column, mask=column < width, other=-1)
            chosen = (value >= 0).to(tl.int32)
        else:
            value = column
            chosen = (tl.load(source_ptr + column, mask=column < width, other=0) != 0).to(tl.int32)
        place = written + tl.cumsum(chosen, 0) - 1
        tl.store(to + place, value, mask=chosen != 0)
        written += tl.sum(chosen, 0)
