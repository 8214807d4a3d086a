"""The queries, keys and values of every layer's attention on a text, as the serving path computes them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from gossamer.attention.attend import attend
from gossamer.attention.policy import AttentionPolicy
from gossamer.attention.step import Span, Step, plan_step
from gossamer.kernels.layout import PAGE_SIZE
from gossamer.kvcache.cache import KVCache
from gossamer.kvcache.groups import group_heads
from gossamer.kvcache.table import PageTable

CAPTURE = "gossamer-capture"  # the name that our attention function has inside transformers


@dataclass(frozen=True, slots=True)
class Captured:
    """One layer on one text of T tokens, after RoPE: q [T, H, D], k and v [T, G, D]; the logits are scale * q . k."""

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float

    @property
    def ratio(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[1] // self.k.shape[1]


def capture(module: nn.Module, tokens: Tensor, policy: AttentionPolicy, chunk: int = 2048) -> list[Captured]:
    """Run `module`, a causal language model of transformers, on tokens [T] under the policy's first operating point
    -> one entry per layer. The model's own attention is put back afterwards."""
    recording = _Recording(policy, tokens.numel())
    with _recording_attention(module), torch.no_grad():
        for first in range(0, tokens.numel(), chunk):
            ids = tokens[None, first : first + chunk]
            recording.begin(Span(first, ids.shape[1], tokens.numel()))
            places = torch.arange(first, first + ids.shape[1], device=tokens.device)[None]
            module(input_ids=ids, position_ids=places, use_cache=False, logits_to_keep=1, recording=recording)
    return recording.layers()


class _Recording:
    """One text on its way through the model, chunk by chunk, over a cache of its own."""

    def __init__(self, policy: AttentionPolicy, length: int) -> None:
        self._policy = policy
        self._length = length
        self._cache: tuple[KVCache, PageTable] | None = None
        self._span = Span(0, 0, length)
        self._step: Step | None = None
        self._parts: list[list[Captured]] = [[] for _ in policy.points[0].heads]

    def begin(self, span: Span) -> None:
        self._span, self._step = span, None

    def note(self, layer: int, captured: Captured) -> Step:
        """Keep a chunk of one layer; returns the step to attend in."""
        self._parts[layer].append(captured)
        if self._step is None:
            cache, table = self._cache = self._cache or self._new_cache(captured)
            cache.grow(table, self._span.new)
            views = cache.views([table])
            self._step = plan_step([self._span], views, self._policy.points[:1], captured.ratio, captured.q.device)
        return self._step

    def layers(self) -> list[Captured]:
        return [
            Captured(
                torch.cat([part.q for part in parts]),
                torch.cat([part.k for part in parts]),
                torch.cat([part.v for part in parts]),
                parts[0].scale,
            )
            for parts in self._parts
        ]

    def _new_cache(self, captured: Captured) -> tuple[KVCache, PageTable]:
        groups = group_heads(self._policy.rules())
        cache = KVCache(
            groups,
            [-(-self._length // PAGE_SIZE)] * len(groups),
            ratio=captured.ratio,
            head_dim=captured.q.shape[2],
            dtype=captured.k.dtype,
            device=captured.q.device,
            summaries=self._policy.summaries(),
        )
        heads = self._policy.points[0].heads
        rules = [heads[group.slots[0][0]][group.slots[0][1][0]].keep for group in groups]
        return cache, cache.table(rules, b"")


def _attend_and_note(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, *, recording: _Recording, **options: Any
) -> tuple[Tensor, None]:
    layer = module.layer_idx
    assert isinstance(layer, int)
    q, k, v = (x[0].transpose(0, 1).clone() for x in (query, key, value))
    scaling = options.get("scaling")
    step = recording.note(layer, Captured(q, k, v, scaling if scaling is not None else q.shape[2] ** -0.5))
    return attend(module, query, key, value, mask, step=step, **options)


@contextmanager
def _recording_attention(module: Any) -> Iterator[None]:
    AttentionInterface.register(CAPTURE, _attend_and_note)
    before = module.config._attn_implementation
    module.set_attn_implementation(CAPTURE)
    try:
        yield
    finally:
        module.set_attn_implementation(before)
