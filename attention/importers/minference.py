"""MInference's best patterns (Jiang et al. 2024), and Qwen's config_1m.json, which wraps the same list.

A list of layers, each an object from query head to [pattern, first size, second size, score]; prompts only. The score
has other units in other files, and decides nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gossamer.attention.importers.foreign import ForeignFile
from gossamer.attention.importers.source import Format, Imported, Source, file_stem, groups_of, is_whole, of_heads
from gossamer.attention.policy_backends import (
    Backend,
    BlockSparseBackend,
    BudgetEntry,
    DenseBackend,
    HeadEntry,
    SinkRecentBackend,
    VerticalSlashBackend,
)

VERTICAL_SLASH, STREAM, BLOCKS = "vertical_and_slash", "stream_llm", "block_sparse"
WRAPPERS = ("dual_chunk_attention_config", "sparse_attention_config")
BLOCK = 64  # tokens
MOST = 2**30


class Pattern(NamedTuple):
    """Of one query head: columns and diagonals, first and last tokens, or a number of blocks."""

    kind: str
    first: int
    second: int


FALLBACK = Pattern(VERTICAL_SLASH, 1000, 6096)  # what the reference takes for a head that the file does not name


def _recognises(file: ForeignFile) -> bool:
    layers = _layers(file.value) if file.kind == "json" else None
    if not layers or not all(isinstance(layer, dict) and layer for layer in layers):
        return False
    return all(
        key.isdecimal() and len(key) < 6 and isinstance(value, list) and value and isinstance(value[0], str)
        for layer in layers
        for key, value in layer.items()
    )


def _layers(value: Any) -> list[Any] | None:
    """The list itself, bare or wrapped."""
    for name in WRAPPERS:
        value = value.get(name) if isinstance(value, dict) and name in value else value
    return value if isinstance(value, list) else None


def _read(source: Source) -> Imported:
    target = source.model("counts query heads, and not how many of them share a KV head")
    layers = _layers(source.file.value) or []
    source.fit(layers=len(layers))
    wrapper = source.file.value.get(WRAPPERS[0], {}) if isinstance(source.file.value, dict) else {}
    above, probe = _above(source, wrapper), _number(source, wrapper, "sparse_attention_last_q", 64, 1024)
    missing, unequal, mixed, heads = 0, 0, 0, []
    for number, layer in enumerate(layers):
        patterns = _patterns(source, number, layer, target.query_heads)
        missing += target.query_heads - len(layer)
        groups = groups_of(patterns, target.kv_heads)
        unequal += sum(len(set(group)) > 1 for group in groups)
        mixed += sum(len({pattern.kind for pattern in group}) > 1 for group in groups)
        heads.append(tuple(HeadEntry(prefill=_union(group, above, probe)) for group in groups))
    total = target.layers * target.kv_heads
    notes = _approximations(target.ratio, total, unequal, mixed)
    if missing:
        heads_missing = of_heads(missing, target.layers * target.query_heads, "query head")
        notes.append(f"{heads_missing}: not in the file; 1000 columns and 6096 diagonals, as MInference takes")
    if wrapper or target.name.endswith("-1M"):
        native = wrapper.get("original_max_position_embeddings")
        notes.append(
            "the model: its dual-chunk positions are not served, so it is good for "
            + (f"{native} tokens" if is_whole(native) else "its native length")
        )
    return Imported(tuple(heads), tuple(notes), target.query_heads, target.head_dim)


def _patterns(source: Source, number: int, layer: Mapping[str, Any], query_heads: int) -> list[Pattern]:
    """Of each query head of a layer."""
    beyond = [key for key in layer if int(key) >= query_heads]
    if beyond:
        raise source.refuse(f"layer {number} has a query head {beyond[0]}, and the model has {query_heads}")
    found = {}
    for key, value in layer.items():
        sizes = value[1:3]
        if len(value) not in (3, 4) or not all(is_whole(size) and 0 <= size <= MOST for size in sizes):
            raise source.refuse(
                f"query head {key} of layer {number} is not a pattern, two sizes of at least 0 and a score"
            )
        if value[0] not in (VERTICAL_SLASH, STREAM, BLOCKS):
            raise source.refuse(
                f"query head {key} of layer {number} has the pattern {value[0][:40]!r}; known are {VERTICAL_SLASH}, "
                f"{STREAM} and {BLOCKS}"
            )
        found[int(key)] = Pattern(value[0], *sizes)
    return [found.get(head, FALLBACK) for head in range(query_heads)]


def _union(group: Sequence[Pattern], above: int, probe: int) -> Backend:
    """What covers all query heads of a KV head; nothing but everything covers blocks and other patterns together."""
    kinds = {pattern.kind for pattern in group}
    first, second = max(pattern.first for pattern in group), max(pattern.second for pattern in group)
    if kinds == {BLOCKS}:
        budget = BudgetEntry(tokens=max(first, 1) * BLOCK)
        return BlockSparseBackend(backend="block-sparse", budget=budget, above=above)
    if BLOCKS in kinds:
        return DenseBackend(backend="dense")
    if kinds == {STREAM}:
        return SinkRecentBackend(backend="sink-recent", sink=first, recent=max(second, 1))
    columns, diagonals = max(first, 30), max(second, 50)  # MInference's own least sizes
    return VerticalSlashBackend(
        backend="vertical-slash", columns=columns, diagonals=diagonals, probe=probe, above=above
    )


def _approximations(ratio: int, total: int, unequal: int, mixed: int) -> list[str]:
    notes = []
    if ratio > 1:
        notes.append(
            f"{of_heads(total, total)}: one choice of columns and diagonals for the {ratio} query heads of a group, by "
            "the mean of their weights"
        )
    if unequal:
        notes.append(f"{of_heads(unequal, total)}: the sizes of the query heads differ; the largest of each is taken")
    if mixed:
        notes.append(
            f"{of_heads(mixed, total)}: the patterns of the query heads differ; columns and diagonals for all, or "
            "everything where one has blocks"
        )
    notes.append(
        f"{of_heads(total, total)}: diagonals are rounded out to pages; in place of the first 30 columns and the last "
        "100 diagonals the first page and the query block's own pages are always read"
    )
    return notes


def _above(source: Source, wrapper: Mapping[str, Any]) -> int:
    said = source.options.above
    return _number(source, wrapper, "sparse_attention_threshold", 0, MOST) if said is None else said


def _number(source: Source, wrapper: Mapping[str, Any], name: str, default: int, most: int) -> int:
    value = wrapper.get(name, default)
    if not is_whole(value) or not min(default, 1) <= value <= most:
        raise source.refuse(f"its {name} is {str(value)[:40]!r}, not a number up to {most}")
    return int(value)


FORMAT = Format(
    "minference", "MInference's pattern lists and Qwen's config_1m.json", frozenset({"above"}), _recognises, file_stem,
    _read,
)  # fmt: skip
