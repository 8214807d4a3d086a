"""Sequences with made-up queries, keys and values, computed in chunks through `attend` over a real cache."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.attention.attend import attend
from gossamer.attention.policy import AttentionPolicy, HeadPolicy, OperatingPoint
from gossamer.attention.step import Span, plan_step
from gossamer.kvcache.cache import KVCache
from gossamer.kvcache.groups import group_heads

PAGES = 100


@dataclass
class Life:
    """A sequence with queries, keys and values of its whole length, the same in every layer."""

    length: int
    prompt: int
    point: OperatingPoint
    seed: int
    ratio: int = 2
    dim: int = 32
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        heads = len(self.point.heads[0])
        self.q = torch.randn(self.length, heads * self.ratio, self.dim, generator=generator).to(self.dtype)
        self.k, self.v = (
            torch.randn(self.length, heads, self.dim, generator=generator).to(self.dtype) for _ in range(2)
        )
        self.out = torch.full_like(self.q, math.nan)


def run(
    policy: AttentionPolicy,
    lives: Sequence[Life],
    chunk: Callable[[], int],
    *,
    layer: int = 0,
    together: bool = True,
    fp8: bool = False,
    **options: Any,
) -> list[Tensor]:
    """Compute all sequences in steps whose chunks are as long as `chunk` says; the outputs, [T, H, D] each."""
    groups = group_heads(policy.rules())
    ratio, dim = lives[0].ratio, lives[0].dim
    cache = KVCache(
        groups,
        [PAGES] * len(groups),
        ratio=ratio,
        head_dim=dim,
        dtype=lives[0].dtype,
        summaries=policy.summaries(),
        fp8=fp8,
    )
    for pool in cache.pools:
        for table in (pool.k, pool.v, *pool.summaries.values(), *(() if pool.scale is None else pool.scale)):
            table.fill_(math.nan)
    layers = range(len(policy.points[0].heads))
    modules = [nn.Module() for _ in layers]
    for number, module in enumerate(modules):
        module.layer_idx = number  # type: ignore[assignment]
    outs = [torch.full_like(life.q, math.nan) for life in lives]
    for batch in [list(range(len(lives)))] if together else [[i] for i in range(len(lives))]:
        tables = {i: cache.table([p[0].keep for p in group_policies(policy, lives[i].point)], b"") for i in batch}
        while left := [i for i in batch if tables[i].length < lives[i].length]:
            spans, tokens = [], dict[int, slice]()
            for i in left:
                first, new = tables[i].length, min(chunk(), lives[i].length - tables[i].length)
                cache.grow(tables[i], new)
                spans.append(Span(first, new, lives[i].prompt))
                tokens[i] = slice(first, first + new)
            step = plan_step(spans, cache.views([tables[i] for i in left]), [lives[i].point for i in left], ratio)
            q, k, v = (
                torch.cat([getattr(lives[i], name)[tokens[i]] for i in left]).transpose(0, 1)[None] for name in "qkv"
            )
            for number, module in enumerate(modules):
                out, _ = attend(module, q, k, v, None, step=step, scaling=dim**-0.5, **options)
                if number == layer:
                    for i, part in zip(left, out[0].split([span.new for span in spans]), strict=True):
                        outs[i][tokens[i]] = part
            for i in left:
                cache.trim(tables[i])
            cache.audit()
        for table in tables.values():
            cache.drop(table)
    return outs


def group_policies(policy: AttentionPolicy, point: OperatingPoint) -> list[list[HeadPolicy]]:
    """The head policies of each group of heads."""
    groups = group_heads(policy.rules())
    return [[point.heads[layer][head] for layer, heads in group.slots for head in heads] for group in groups]


def uniform(name: str, *heads: HeadPolicy, layers: int = 1) -> OperatingPoint:
    """The same heads in every layer."""
    return OperatingPoint(name, (heads,) * layers)
