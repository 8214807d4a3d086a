"""RedKnot's head classes (2026): JSON with a class and a distance for each layer and KV head.

The matrices count; the summary and the rationale beside them contradict them in published files.
"""

from collections import Counter
from typing import Any

from gossamer.attention.importers.foreign import ForeignFile
from gossamer.attention.importers.source import (
    DENSE_HEAD,
    Format,
    Heads,
    Imported,
    Source,
    file_stem,
    is_number,
    is_whole,
    of_heads,
    rectangular,
    streaming_head,
)
from gossamer.attention.policy_backends import BlockSparseBackend, BudgetEntry, HeadEntry

LOCAL = frozenset({"local", "local_full", "limited", "streaming", "sink_dominant"})
FULL = frozenset({"global", "dense"})
SINK, TOP_P = 4, 0.9


def _recognises(file: ForeignFile) -> bool:
    return file.kind == "json" and isinstance(file.value, dict) and "kv_head_classification" in file.value


def _read(source: Source) -> Imported:
    said = source.file.value
    classes = _matrix(source, "kv_head_classification", lambda value: value in LOCAL | FULL | {"retrieval"})
    size = (len(classes), len(classes[0]))
    distances = _matrix(source, "kv_head_max_distance", lambda value: is_whole(value) and -1 <= value <= 2**30, size)
    sinks = [[_whole(source, "sink_size", SINK)] * size[1]] * size[0]
    if said.get("kv_head_sink_size") is not None:
        sinks = _matrix(source, "kv_head_sink_size", lambda value: is_whole(value) and 0 <= value <= 2**30, size)
    for name, number in (("num_layers", size[0]), ("num_kv_heads", size[1])):
        if said.get(name, number) != number:
            raise source.refuse(f"its {name} is {str(said[name])[:20]}, and its matrix has {number}")
    top_p = said.get("retrieval_top_p", TOP_P)
    if not is_number(top_p) or not 0 < top_p <= 1:
        raise source.refuse(f"its retrieval_top_p is {str(top_p)[:20]}, not a share above 0")
    first = _whole(source, "dense_prefix_layers", 0)
    window = source.options.keep != "all"
    budget, above = BudgetEntry(mass=float(top_p)), source.options.above or 0
    pages = BlockSparseBackend(backend="block-sparse", budget=budget, above=above)
    retrieval = HeadEntry(prefill=pages, decode=pages)
    heads, counts = [], Counter[str]()
    for layer in range(size[0]):
        row = []
        for kind, reach, sink in zip(classes[layer], distances[layer], sinks[layer], strict=True):
            kind = "full" if layer < first or kind in FULL else kind
            kind = "local" if kind in LOCAL and reach > 0 else "unlimited" if kind in LOCAL else kind
            counts[kind] += 1
            counts["bounded"] += kind == "full" and layer >= first and reach > 0
            streaming = streaming_head(sink, max(reach, 1), max(reach, 1), window=window)
            row.append({"local": streaming, "retrieval": retrieval}.get(kind, DENSE_HEAD))
        heads.append(tuple(row))
    placed = _placed(source, tuple(heads))
    notes = _approximations(source, counts, size[0] * size[1], float(top_p), window=window)
    query_heads = said.get("num_q_heads") if is_whole(said.get("num_q_heads")) else None
    return Imported(placed, tuple(notes), query_heads)


def _placed(source: Source, heads: Heads) -> Heads:
    """Of a model some of whose layers have windows of their own, the rows are those of the other layers."""
    target = source.target
    if target is not None and target.full_layers is not None and len(heads) == len(target.full_layers) < target.layers:
        source.fit(kv_heads=len(heads[0]))
        row = dict(zip(target.full_layers, heads, strict=True))
        return tuple(row.get(layer, (DENSE_HEAD,) * target.kv_heads) for layer in range(target.layers))
    source.fit(layers=len(heads), kv_heads=len(heads[0]))
    return heads


def _approximations(source: Source, counts: Counter[str], total: int, top_p: float, *, window: bool) -> list[str]:
    notes = []
    if counts["retrieval"]:
        notes.append(
            f"{of_heads(counts['retrieval'], total)} (retrieval): whole pages that hold {top_p:g} of the weight, "
            "judged by their mean keys"
        )
    if counts["unlimited"]:
        notes.append(f"{of_heads(counts['unlimited'], total)} (local): no distance is given; everything is read")
    if counts["bounded"]:
        notes.append(f"{of_heads(counts['bounded'], total)} (global): a distance is given all the same, and not used")
    if counts["local"]:
        notes.append(
            f"{of_heads(counts['local'], total)} (local): positions stay those of the prompt; nothing is reused from "
            "elsewhere" + ("" if window else "; they keep everything, so that no memory is given back")
        )
    summary = source.file.value.get("summary")
    if isinstance(summary, dict) and is_whole(summary.get("global")):
        actual = counts["full"] + counts["retrieval"] + counts["unlimited"]
        if summary["global"] not in (actual, counts["full"]):
            notes.append(
                f"the file's summary ({summary['global']} global) contradicts its matrix ({counts['full']} global, "
                f"{counts['retrieval']} retrieval, {counts['local']} local), which was taken"
            )
    return notes


def _matrix(source: Source, name: str, wanted: Any, size: tuple[int, int] | None = None) -> list[list[Any]]:
    """[layer][KV head], each as wanted."""
    value = source.file.value.get(name)
    rows = (
        rectangular(value, lambda item: isinstance(item, (str, int)) and wanted(item))
        if isinstance(value, list)
        else None
    )
    if rows is None or (size is not None and (len(rows), len(rows[0])) != size):
        known = f" (known are {', '.join(sorted(LOCAL | FULL | {'retrieval'}))})" if "class" in name else ""
        raise source.refuse(f"its {name} is no full table of layers by KV heads with known values{known}")
    return rows


def _whole(source: Source, name: str, default: int) -> int:
    value = source.file.value.get(name, default)
    if not is_whole(value) or not 0 <= value <= 2**30:
        raise source.refuse(f"its {name} is {str(value)[:20]}, not a number of at least 0")
    return int(value)


def _made_for(file: ForeignFile) -> str:
    name = file.value.get("model") if isinstance(file.value, dict) else None
    return name if isinstance(name, str) else file_stem(file)


FORMAT = Format("redknot", "RedKnot's head classes", frozenset({"keep", "above"}), _recognises, _made_for, _read)
