"""A text's way through the model, chunk by chunk, under an operating point, as the server would compute it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from gossamer.attention.attend import attend
from gossamer.attention.policy import AttentionPolicy, OperatingPoint, within_windows
from gossamer.attention.reads import SpanReads, totals
from gossamer.attention.step import Span, Step, plan_step
from gossamer.kernels.layout import PAGE_SIZE
from gossamer.kvcache.cache import KVCache
from gossamer.kvcache.groups import group_heads
from gossamer.kvcache.summaries import Summary

READING = "gossamer-reading"  # the names that our attention functions have inside transformers
SHAPING = "gossamer-shaping"


@dataclass(frozen=True, slots=True)
class Shape:
    """What the attention layers of a model have in common, and the sliding window that each may have."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    windows: tuple[int | None, ...]

    @property
    def ratio(self) -> int:
        """Query heads per KV head."""
        return self.query_heads // self.kv_heads

    @property
    def free(self) -> tuple[int, ...]:
        """The layers without a window of their own: those that a policy can change."""
        return tuple(layer for layer, window in enumerate(self.windows) if window is None)


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One layer's attention over one chunk, after its keys were stored and its output computed: q [T, H, D], k and v
    [T, G, D], after RoPE."""

    module: nn.Module
    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    step: Step
    scale: float
    softcap: float
    sinks: Tensor | None


class Watcher(Protocol):
    """Who looks on while a text is read."""

    def layer(self, call: LayerCall) -> None: ...


@dataclass(frozen=True, slots=True)
class Reading:
    """What one text gave: logits [rows, V] float32 on the CPU, and how much of what could be read was read."""

    logits: Tensor
    reads: SpanReads


class Reader:
    """Reads texts with a common beginning one after another; pages of the common beginning are computed once.

    `policy`'s first operating point says what is read and kept. `room`: tokens of the longest text and of what the
    others add to it. `summaries`: [layer][KV head], what is known of full pages beyond what the policy needs.
    """

    def __init__(
        self,
        module: nn.Module,
        policy: AttentionPolicy,
        *,
        room: int,
        chunk: int = 2048,
        shape: Shape | None = None,
        summaries: Sequence[Sequence[Sequence[Summary]]] | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self.shape = shape or shape_of(module)
        policy = within_windows(policy, self.shape.windows)
        self._module = module
        self._point: OperatingPoint = policy.points[0]
        self._chunk = chunk
        self._watcher = watcher
        groups = group_heads([[rules[:1] for rules in layer] for layer in policy.rules()])
        self._cache = KVCache(
            groups,
            [-(-room // PAGE_SIZE) + 1] * len(groups),
            ratio=self.shape.ratio,
            head_dim=self.shape.head_dim,
            dtype=self.shape.dtype,
            device=self.shape.device,
            summaries=policy.summaries() if summaries is None else summaries,
        )
        heads = self._point.heads
        self._rules = [heads[group.slots[0][0]][group.slots[0][1][0]].keep for group in groups]

    @torch.no_grad()
    def read(
        self, tokens: Sequence[int], *, prompt: int, rows: Sequence[int], point: OperatingPoint | None = None
    ) -> Reading:
        """tokens: `prompt` of them are a prompt, the others were generated. rows: positions, ascending, whose logits
        are wanted. point: in place of the reader's own, one that differs from it for generated tokens alone, so that
        what was read of prompts holds for it. Raises kvcache's OutOfPages where there is no room."""
        table = self._cache.table(self._rules, b"")
        first = self._cache.attach(table, tokens, rows[0] if rows else len(tokens) - 1)
        logits: list[Tensor] = []
        reads = SpanReads(0.0, 0.0, 0.0, 0.0)
        try:
            with _attention(self._module, READING, _attend_and_watch):
                while first < len(tokens):
                    new = min(self._chunk, len(tokens) - first)
                    self._cache.grow(table, new)
                    views = self._cache.views([table])
                    span = Span(first, new, prompt)
                    step = plan_step([span], views, [point or self._point], self.shape.ratio, self.shape.device)
                    wanted = [row - first for row in rows if first <= row < first + new]
                    found = self._forward(tokens[first : first + new], first, step, wanted or [new - 1])
                    logits += [found.float().cpu()] if wanted else []
                    prefill, decode = (each.rows if each is not None else () for each in (step.prefill, step.decode))
                    reads = reads.plus(totals(step.reads.read, step.reads.heads, prefill, decode, 1)[0])
                    self._cache.seal(table, tokens)
                    self._cache.trim(table)
                    first += new
        finally:
            self._cache.drop(table)
        return Reading(torch.cat(logits) if logits else torch.empty(0), reads)

    def _forward(self, tokens: Sequence[int], first: int, step: Step, wanted: list[int]) -> Tensor:
        device, module = self.shape.device, self._module
        out: Any = module(
            input_ids=torch.tensor([list(tokens)], device=device),
            position_ids=torch.arange(first, first + len(tokens), device=device)[None],
            use_cache=False,
            logits_to_keep=torch.tensor(wanted, device=device),
            step=step,
            watcher=self._watcher,
        )
        logits: Tensor = out.logits[0]
        return logits


def shape_of(module: nn.Module) -> Shape:
    """One forward pass of one token tells the heads and the windows of each layer better than any config. Raises
    ValueError for a model whose layers differ in their heads."""
    seen: dict[int, tuple[Any, ...]] = {}
    zero = torch.zeros(1, 1, dtype=torch.int64, device=next(module.parameters()).device)
    with _attention(module, SHAPING, _note_shape), torch.inference_mode():
        module(input_ids=zero, position_ids=zero, use_cache=False, seen=seen)
    sizes = {entry[:5] for entry in seen.values()}
    if len(sizes) != 1 or sorted(seen) != list(range(len(seen))):
        raise ValueError("the layers of this model differ in their heads")
    query_heads, kv_heads, head_dim, dtype, device = sizes.pop()
    windows = tuple(seen[layer][5] for layer in range(len(seen)))
    return Shape(len(seen), query_heads, kv_heads, head_dim, dtype, device, windows)


def _note_shape(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None, *, seen: dict[int, Any], **options: Any
) -> tuple[Tensor, None]:
    assert isinstance(module.layer_idx, int)
    sizes = (query.shape[1], key.shape[1], query.shape[3], key.dtype, key.device)
    seen[module.layer_idx] = (*sizes, options.get("sliding_window"))
    return torch.zeros_like(query).transpose(1, 2), None


def _attend_and_watch(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    *,
    step: Step,
    watcher: Watcher | None,
    **options: Any,
) -> tuple[Tensor, None]:
    out = attend(module, query, key, value, mask, step=step, **options)
    if watcher is not None:
        assert isinstance(module.layer_idx, int)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        scaling = options.get("scaling")
        scale = scaling if scaling is not None else q.shape[2] ** -0.5
        softcap, sinks = options.get("softcap") or 0.0, options.get("s_aux")
        watcher.layer(LayerCall(module, module.layer_idx, q, k, v, step, scale, softcap, sinks))
    return out


@contextmanager
def _attention(module: Any, name: str, function: Any) -> Iterator[None]:
    """The model's own attention is put back afterwards."""
    AttentionInterface.register(name, function)
    before = module.config._attn_implementation
    module.set_attn_implementation(name)
    try:
        yield
    finally:
        module.set_attn_implementation(before)
