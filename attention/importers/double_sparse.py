"""DoubleSparse's ranked channels (Yang et al. 2024), which become a file of label channels.

An object with a list for each head of `model.layers.N.self_attn.{q,k,qk}_proj`: the head's channels, the most important
first, in Hugging Face's half-split numbering.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.attention.importers.foreign import ForeignFile
from gossamer.attention.importers.source import (
    DENSE_HEAD,
    Format,
    Imported,
    Source,
    Tensors,
    file_stem,
    groups_of,
    is_whole,
    of_heads,
    rectangular,
)
from gossamer.attention.policy_backends import DoubleSparsityBackend, HeadEntry

KEY = re.compile(r"(?:model\.)?layers\.(\d{1,5})\.self_attn\.(q_proj|k_proj|qk_proj)")
CHANNELS, DENSE_LAYERS = 16, 2
STORED = 32  # ranks per head in the file: as many as a policy is likely to ask for

Ranked = list[list[list[int]]]  # [layer][head], channels


def _recognises(file: ForeignFile) -> bool:
    return file.kind == "json" and isinstance(file.value, dict) and any(KEY.fullmatch(key) for key in file.value)


def _read(source: Source) -> Imported:
    """One ranking for each KV head: the sum of the places that its query heads give a channel, closed under rotary
    pairs, because the rankings by q or k alone were made before RoPE."""
    options = source.options
    if options.budget is None:
        raise source.refuse("it ranks channels, and not how many tokens to read; give --budget, such as 2048")
    which, ranked, kv_heads = _chosen(source)
    layers, query_heads, head_dim = len(ranked), len(ranked[0]), len(ranked[0][0])
    source.fit(layers=layers, head_dim=head_dim, **({} if which == "k_proj" else {"query_heads": query_heads}))
    rotary = source.target.rotary if source.target else None
    turned = head_dim // 2 if rotary is None else rotary.inv_freq.numel()
    count = min(CHANNELS if options.channels is None else options.channels, head_dim)
    stored = min(head_dim, max(count, STORED))
    unlike, tensors = 0, {}
    for number, layer in enumerate(ranked):
        groups = groups_of(layer, kv_heads)
        unlike += sum(len({frozenset(each[:count]) for each in group}) > 1 for group in groups)
        kept = [_closed(_merged(group, head_dim), turned)[:stored] for group in groups]
        tensors[f"layers.{number}"] = _small(kept, head_dim)
    first = DENSE_LAYERS if options.dense_layers is None else options.dense_layers
    name = f"{source.name}-labels.safetensors"
    sparse = HeadEntry(
        decode=DoubleSparsityBackend(
            backend="double-sparsity", file=name, channels=count, tokens=options.budget, above=options.above or 0
        )
    )
    heads = tuple(((DENSE_HEAD if number < first else sparse),) * kv_heads for number in range(layers))
    total = layers * kv_heads
    notes = (
        f"{of_heads(total, total)}: {count} channels and {options.budget} tokens, and the first {first} layers dense, "
        "which the file does not say",
        f"{of_heads(unlike, total)}: the query heads of the group rank other channels ({which}); the least sum of "
        "their places counts",
        f"{of_heads(total, total)}: each channel comes with its rotary partner",
    )
    known = source.target.query_heads if source.target else query_heads
    return Imported(heads, notes, known, head_dim, {name: Tensors(tensors)})


def _chosen(source: Source) -> tuple[str, Ranked, int]:
    """Which ranking, the ranking, and the number of KV heads: qk_proj before q_proj; k_proj only where every query head
    has a KV head of its own, since keys that are shared have no channels that stand out."""
    found: dict[str, dict[int, Any]] = {"qk_proj": {}, "q_proj": {}, "k_proj": {}}
    for key, value in source.file.value.items():
        match = KEY.fullmatch(key)
        if match:
            found[match[2]][int(match[1])] = value
    layers = 1 + max(number for each in found.values() for number in each)
    which = next((name for name, each in found.items() if len(each) == layers), None)
    if which is None:
        raise source.refuse(f"it has {layers} layers, of which some have no ranking; take another copy of it")
    shared = _table(source, "k_proj", found["k_proj"][0], 0) if 0 in found["k_proj"] else None
    ranked = [_table(source, which, found[which][number], number) for number in range(layers)]
    if len({(len(layer), len(layer[0])) for layer in ranked}) > 1:
        raise source.refuse("its layers differ in heads or channels")
    target, heads = source.target, len(ranked[0])
    kv_heads = target.kv_heads if target else len(shared) if shared else 0
    if not kv_heads or (which == "k_proj" and target is None):
        raise source.refuse("it does not say how many query heads share a KV head; give --model")
    if which == "k_proj" and (kv_heads < (target.query_heads if target else heads) or heads != kv_heads):
        raise source.refuse("it ranks channels of shared keys alone (k_proj), which tell nothing of their queries")
    if heads % kv_heads:
        raise source.refuse(f"its {heads} query heads cannot share {kv_heads} KV heads; give the right --model")
    return which, ranked, kv_heads


def _table(source: Source, which: str, value: Any, layer: int) -> list[list[int]]:
    """One layer's rankings, each a permutation of the channels."""
    rows = rectangular(value, is_whole)
    if rows is None or any(sorted(row) != list(range(len(row))) for row in rows):
        raise source.refuse(f"its {which} of layer {layer} is no ranking of all channels for each head")
    return rows


def _merged(group: Sequence[Sequence[int]], head_dim: int) -> list[int]:
    """Channels by the sum of their places (Borda's count)."""
    places = [0] * head_dim
    for ranking in group:
        for place, channel in enumerate(ranking):
            places[channel] += place
    return sorted(range(head_dim), key=lambda channel: places[channel])


def _closed(ranking: Sequence[int], turned: int) -> list[int]:
    """Each channel followed by the one that RoPE turns it with, where there is one."""
    closed: dict[int, None] = {}
    for channel in ranking:
        closed[channel] = None
        if channel < 2 * turned:
            closed[(channel + turned) % (2 * turned)] = None
    return list(closed)


def _small(rows: Sequence[Sequence[int]], head_dim: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.uint8 if head_dim <= 256 else torch.int16)


FORMAT = Format(
    "double-sparse", "DoubleSparse's ranked channels", frozenset({"budget", "channels", "above", "dense_layers"}),
    _recognises, file_stem, _read,
)  # fmt: skip
