"""A learned gate's queries: what its small projection makes of a block's queries (SeerAttention, SeerAttention-R)."""

import torch
from torch import Tensor

from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.rotary import Rotary

EPSILON = 1e-6  # of the norm


def gate_queries(
    q: Tensor, kv: PagedKV, blocks: QueryBlocks, weight: Tensor, norm: Tensor | None, rotary: Rotary, turned: Rotary
) -> Tensor:
    """q [T, H, D], weight [KV heads of the layer, J, ratio * D, E] -> [N, KV heads * J, E] float32. Those of heads
    that are not the view's mean nothing.

    For each KV head of the view: its group's queries as they were before RoPE (`rotary`), the mean of each query head
    over the block's queries, side by side, times each of J matrices; RMS-normed by norm [E] if there is one; rotated
    at the block's origin (`turned`).
    """
    if q.is_cuda and blocks.size == 1:  # longer blocks are few, and matrix products worth the name
        from gossamer.kernels.triton.gates import launch

        return launch(q, kv, blocks, weight, norm, rotary, turned)
    return gate_queries_torch(q, kv, blocks, weight, norm, rotary, turned)


def gate_queries_torch(
    q: Tensor, kv: PagedKV, blocks: QueryBlocks, weight: Tensor, norm: Tensor | None, rotary: Rotary, turned: Rotary
) -> Tensor:
    """What gate_queries means; also how the CPU runs it, and a GPU prompts."""
    own = kv.heads.long()
    heads = (own[:, None] * kv.ratio + torch.arange(kv.ratio, device=q.device)).flatten()
    within = torch.arange(blocks.size, device=q.device)
    nearest = torch.minimum(within, blocks.count[:, None] - 1)  # [N, size]
    token, position = blocks.token[:, None] + nearest, blocks.pos[:, None] + nearest
    plain = rotary.turn(
        q[token.long()[:, :, None], heads], position[:, :, None].expand(-1, -1, heads.numel()), back=True
    )
    real = (within < blocks.count[:, None])[:, :, None, None]
    mean = (plain * real).sum(1) / blocks.count[:, None, None]  # [N, G * ratio, D]
    grouped = mean.unflatten(1, (own.numel(), kv.ratio)).flatten(2)  # [N, G, ratio * D]
    gate = torch.einsum("ngd,gjde->ngje", grouped, _of_heads(weight, kv).float()).flatten(1, 2)
    if norm is not None:
        gate = torch.nn.functional.rms_norm(gate, norm.shape, norm.float(), EPSILON)
    gate = turned.turn(gate, blocks.origin[:, None].expand(gate.shape[:2]))
    found = torch.empty(len(blocks), *weight.shape[:2], weight.shape[3], device=q.device)
    found[:, own] = gate.unflatten(1, (own.numel(), -1))
    return found.flatten(1, 2)


def _of_heads(weight: Tensor, kv: PagedKV) -> Tensor:
    """weight [KV heads of the layer, ...] -> those of the view; on a CPU not copied where they lie side by side."""
    if not weight.is_cuda and len(kv.heads):
        first, last = int(kv.heads[0]), int(kv.heads[-1])
        if kv.heads.tolist() == list(range(first, last + 1)):
            return weight[first : last + 1]
    return weight[kv.heads.long()]
