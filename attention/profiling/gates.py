"""Learned gates, distilled from dense attention: SeerAttention (Gao et al. 2024) for prompts, SeerAttention-R (2025)
for generated tokens.

A gate sees a block's queries, averaged and rotated back to before RoPE, and for each page the maximum, minimum and mean
of its keys before RoPE. What it is taught: for each past page the largest weight that any query of the block (in any
head of the group) gives any key in the page, the pages adding up to one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from gossamer.attention.profiling.capture import Captured
from gossamer.kernels.layout import PAGE_SIZE
from gossamer.kernels.page_summaries import page_pools
from gossamer.kernels.rotary import Rotary

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class Lesson:
    """One layer on one text: N query blocks and L pages, of which `past` [N] lie before each block.

    queries [N, G, ratio * D] before RoPE, origin [N] the position that each gate query is rotated to; pages
    [G, L, 3 * D]; target [N, G, L] float32, 0 for pages that are not past.
    """

    queries: Tensor
    origin: Tensor
    pages: Tensor
    past: Tensor
    target: Tensor


@dataclass(frozen=True, slots=True)
class GateWeights:
    """One layer's gate: query [G, 1, ratio * D, E] and key [G, 3 * D, E]."""

    query: Tensor
    key: Tensor


def lesson(layer: Captured, rotary: Rotary, first: Sequence[int], size: int) -> Lesson:
    """first: positions at which blocks of `size` queries begin, each a multiple of `size`. A block of one query is a
    generated token."""
    return make_lesson([layer.q[begin : begin + size] for begin in first], layer.k, layer.scale, rotary, first)


def make_lesson(blocks: Sequence[Tensor], k: Tensor, scale: float, rotary: Rotary, first: Sequence[int]) -> Lesson:
    """The same of what is needed: blocks of queries [n, H, D] that begin at `first`, and all keys k [T, G, D]."""
    dim = k.shape[2]
    whole = k.shape[0] // PAGE_SIZE
    paged = k[: whole * PAGE_SIZE].unflatten(0, (whole, PAGE_SIZE)).permute(2, 0, 1, 3).contiguous()  # [G, L, S, D]
    pooled = torch.empty(*paged.shape[:2], 3, dim, device=k.device)
    page = torch.arange(whole, dtype=torch.int32, device=k.device)
    page_pools(paged, page, page * PAGE_SIZE, rotary.inv_freq, rotary.scaling, pooled)
    means, targets = [], []
    for q, begin in zip(blocks, first, strict=True):
        place = torch.arange(begin, begin + len(q), device=k.device)[:, None].expand(-1, q.shape[1])
        means.append(rotary.turn(q, place, back=True).mean(0).unflatten(0, (k.shape[1], -1)).flatten(1))
        targets.append(_target(q, k, scale, begin, whole))
    origin = torch.tensor(list(first), device=k.device)
    return Lesson(torch.stack(means), origin, pooled.flatten(2), origin // PAGE_SIZE, torch.stack(targets))


def _target(q: Tensor, k: Tensor, scale: float, begin: int, pages: int) -> Tensor:
    """[G, L]"""
    end, groups = begin + len(q), k.shape[1]
    grouped = q.float().unflatten(1, (groups, -1)).permute(1, 2, 0, 3)  # [G, ratio, count, D]
    logits = grouped @ k[:end].float().permute(1, 2, 0)[:, None] * scale
    future = torch.arange(end, device=q.device) > torch.arange(begin, end, device=q.device)[:, None]
    weight = logits.masked_fill(future, -torch.inf).softmax(-1).amax((1, 2))  # [G, end]
    past = begin // PAGE_SIZE
    target = torch.zeros(groups, pages, device=q.device)
    target[:, :past] = weight[:, : past * PAGE_SIZE].unflatten(1, (past, PAGE_SIZE)).amax(2) if past else 0.0
    return target / target.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def divergence(weights: GateWeights, turned: Rotary, taught: Lesson) -> Tensor:
    """The Kullback-Leibler divergence of the gate's softmax from the target, in nats; mean over blocks and heads."""
    gate = torch.einsum("ngd,gde->nge", taught.queries, weights.query[:, 0])
    gate = turned.turn(gate, taught.origin[:, None].expand(gate.shape[:2]))
    page = torch.arange(taught.pages.shape[1], device=gate.device)
    keys = turned.turn(taught.pages @ weights.key, (page * PAGE_SIZE).expand(taught.pages.shape[:2]))
    logits = torch.einsum("nge,gle->ngl", gate, keys) * gate.shape[-1] ** -0.5
    hidden = page >= taught.past[:, None, None]
    guess = logits.masked_fill(hidden, -torch.inf).log_softmax(-1).masked_fill(hidden, 0.0)
    far: Tensor = torch.special.xlogy(taught.target, taught.target) - taught.target * guess
    return far.sum(-1).mean()


def distil(lessons: Sequence[Lesson], turned: Rotary, steps: int, rate: float = 1e-3, seed: int = 0) -> GateWeights:
    """A gate as wide as a head, from the one that compares the mean query with the mean key. Each step takes one
    lesson; the rate falls with a cosine."""
    groups, dim = lessons[0].pages.shape[0], lessons[0].pages.shape[2] // 3
    ratio, device = lessons[0].queries.shape[2] // dim, lessons[0].queries.device
    eye = torch.eye(dim, device=device)
    query = (eye.repeat(ratio, 1) / ratio).expand(groups, 1, -1, -1).clone().requires_grad_()
    key = torch.cat([eye * 0, eye * 0, eye]).expand(groups, -1, -1).clone().requires_grad_()
    optimizer = torch.optim.Adam([query, key], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.randint(len(lessons), (steps,), generator=torch.Generator().manual_seed(seed)).tolist()
    for choice in order:
        optimizer.zero_grad()
        loss: Tensor = divergence(GateWeights(query, key), turned, lessons[choice])
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return GateWeights(query.detach(), key.detach())


def write_gates(path: Path, layers: Sequence[Mapping[Phase, GateWeights]], model: Rotary, gate: Rotary) -> None:
    """The file that a policy's learned-gate backend names (attention/artefacts.py), the weights in bfloat16."""
    # a copy, because safetensors refuses tensors that share memory, as the rotations of both often do
    tensors = {"rotary.model": model.inv_freq.cpu(), "rotary.gate": gate.inv_freq.cpu().clone()}
    for number, phases in enumerate(layers):
        for phase, weights in phases.items():
            tensors[f"layers.{number}.{phase}.query"] = weights.query.to("cpu", torch.bfloat16)
            tensors[f"layers.{number}.{phase}.key"] = weights.key.to("cpu", torch.bfloat16)
    save_file(tensors, path, metadata={"scaling": repr(model.scaling)})
