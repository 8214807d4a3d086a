"""How much of a query block's attention each past page would get, judged by what side tables hold of the page.

Past pages of block n are the logical pages l < origin[n] // S that are resident: full, hence summarised. The mass of a
block is, for each row (one query of one head), a softmax in float32 over the logits of the past pages; its mean over
the block's queries; the maximum over the heads of the group; divided by its sum. It adds up to 1, is 0 for pages that
are not past, and all 0 where a block has no past page.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.kernels.cpu_scores import mass_torch
from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.native import reads


def page_mass(q: Tensor, kv: PagedKV, blocks: QueryBlocks, keys: Tensor, *, scale: float) -> Tensor:
    """Mass by one key per page, its mean or a gate's: logit = scale * q . key.

    q [T, H, d], keys [G, P, d] (any strides, unit in d) -> [G, N, L] float32.
    """
    if q.is_cuda:
        from gossamer.kernels.triton.score_pages import launch

        return launch(q, kv, blocks, keys, scale=scale)
    if reads(keys, q.shape[2]) and blocks.single:
        from gossamer.kernels.native.scores import launch as launch_on_cpu

        return launch_on_cpu(q, kv, blocks, keys, columns=1, scale=scale)
    return page_mass_torch(q, kv, blocks, keys, scale=scale)


def bound_mass(q: Tensor, kv: PagedKV, blocks: QueryBlocks, bounds: Tensor, *, scale: float) -> Tensor:
    """Mass by the largest product that the bounds of a page's keys allow: for each of the page's c stretches of tokens
    sum_d max(q_d * minimum_d, q_d * maximum_d), the maximum over the stretches, times scale.

    q [T, H, D], bounds [G, P, c, 2, D], minimum first (any strides, unit in D) -> [G, N, L] float32.
    """
    if q.is_cuda:
        from gossamer.kernels.triton.score_pages import launch_bounds

        return launch_bounds(q, kv, blocks, bounds, scale=scale)
    if reads(bounds, q.shape[2]) and blocks.single:
        from gossamer.kernels.native.scores import launch as launch_on_cpu

        return launch_on_cpu(q, kv, blocks, bounds, columns=1, split=True, scale=scale)
    return bound_mass_torch(q, kv, blocks, bounds, scale=scale)


def page_mass_torch(q: Tensor, kv: PagedKV, blocks: QueryBlocks, keys: Tensor, *, scale: float) -> Tensor:
    """What page_mass means; also how the CPU runs it for prompts."""
    return mass_torch(q, kv, blocks, _PageKeys(keys), scale=scale)


def bound_mass_torch(q: Tensor, kv: PagedKV, blocks: QueryBlocks, bounds: Tensor, *, scale: float) -> Tensor:
    """What bound_mass means; also how the CPU runs it for prompts."""
    return mass_torch(q, kv, blocks, _Bounds(bounds), scale=scale)


@dataclass(frozen=True, slots=True)
class _PageKeys:
    table: Tensor  # [G, P, d]

    @property
    def per_page(self) -> int:
        return 1

    def keys(self, own: slice, known: Tensor) -> Tensor:
        return known.float()[:, None]

    def queries(self, own: slice, q: Tensor) -> Tensor:
        return q


@dataclass(frozen=True, slots=True)
class _Bounds:
    table: Tensor  # [G, P, c, 2, D]

    @property
    def per_page(self) -> int:
        return 1

    def keys(self, own: slice, known: Tensor) -> Tensor:
        return known.flatten(3).transpose(1, 2).float()

    def queries(self, own: slice, q: Tensor) -> Tensor:
        # The minimum counts where q is negative, the maximum where it is positive: one product of twice the length.
        return torch.cat((q.clamp_max(0), q.clamp_min(0)), -1)
