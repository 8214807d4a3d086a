"""Turn masks of pages and lists of tokens into runs that a kernel can follow."""

import torch
from torch import Tensor


def compact(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """mask [G, N, L] bool -> start [G, N], count [G, N], pages [G * N * L], all int32.

    The run of (g, n) is pages[start : start + count]: the numbers of the set columns, ascending. Entries of `pages`
    behind the last run mean nothing. Nothing is read back from a device.
    """
    if mask.is_cuda:
        from gossamer.kernels.triton.compact import launch

        return launch(mask)
    return compact_torch(mask)


def compact_torch(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What compact means; also how the CPU runs it."""
    count = mask.sum(-1, dtype=torch.int32)
    start = (count.flatten().cumsum(0, dtype=torch.int32) - count.flatten()).view_as(count)
    pages = torch.zeros(mask.numel(), dtype=torch.int32)
    chosen = mask.nonzero()[:, -1]
    pages[: chosen.numel()] = chosen
    return start, count, pages


def compact_tokens(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [G, N, K] int32 positions, each row ascending, -1 anywhere as padding -> start [G, N], count [G, N],
    tokens [G * N * K], all int32, as in `compact`."""
    if tokens.is_cuda:
        from gossamer.kernels.triton.compact import launch_tokens

        return launch_tokens(tokens)
    return compact_tokens_torch(tokens)


def compact_tokens_torch(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What compact_tokens means; also how the CPU runs it."""
    kept = tokens >= 0
    count = kept.sum(-1, dtype=torch.int32)
    start = (count.flatten().cumsum(0, dtype=torch.int32) - count.flatten()).view_as(count)
    packed = torch.zeros(tokens.numel(), dtype=torch.int32)
    chosen = tokens[kept]
    packed[: chosen.numel()] = chosen
    return start, count, packed
