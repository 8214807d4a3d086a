"""DuoAttention's retrieval weights (Xiao et al. 2024), which LServe (Yang et al. 2025) reads too.

full_attention_heads.tsv has a line for each layer and in it a weight for each KV head; the heads with the smallest
weights stream. The cut is a share of the heads, never the `threshold` of the config.json beside: published weights
crowd at 1.
"""

import math
import random
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from gossamer.attention.importers.foreign import ForeignFile
from gossamer.attention.importers.source import (
    DENSE_HEAD,
    Format,
    Imported,
    Source,
    file_stem,
    is_whole,
    of_heads,
    rectangular,
    streaming_head,
)
from gossamer.attention.policy_backends import BlockSparseBackend, BudgetEntry, HeadEntry

SHARE = 0.5  # of the heads; what the authors recommend where query heads share KV heads
LSERVE_SINK, LSERVE_RECENT, LSERVE_PROMPT_RECENT, LSERVE_BUDGET = 128, 256, 8192, 4096


def _recognises(file: ForeignFile) -> bool:
    return file.kind == "text" and _weights(file.value) is not None


def _weights(text: str) -> list[list[float]] | None:
    """[layer][KV head], or None for what is no table of numbers."""
    try:
        table = [[float(word) for word in line.split()] for line in text.splitlines() if line.strip()]
    except ValueError:
        return None
    return rectangular(table, lambda value: not math.isinf(value))


def _made_for(file: ForeignFile) -> str:
    """The config.json beside names it, else the folder does."""
    name = file.config_beside().get("model_name")
    return PurePosixPath(name).name if isinstance(name, str) else file.path.parent.name or file_stem(file)


def _read_duo(source: Source) -> Imported:
    """In the reference one prompt in one piece is dense for every head, and pieces that follow see the window: what was
    trained, and what a server with chunks can keep, is the window everywhere."""
    config, options = source.file.config_beside(), source.options
    sink = _size(source, config, "sink", options.sink)
    recent = _size(source, config, "recent", options.recent)
    window = options.keep != "all"
    streaming = streaming_head(sink, recent, options.prompt_recent, window=window)
    notes = (
        "streaming heads: the window holds in all of a prompt, as in training; the reference reads a first chunk "
        "in full"
        if window
        else "streaming heads: keep everything, so that no memory is given back",
    )
    return _split(source, streaming, DENSE_HEAD, notes)


def _read_lserve(source: Source) -> Imported:
    """Streaming heads with a wider window in prompts; the others choose pages for generated tokens."""
    options = source.options
    sink, recent = options.sink, options.recent
    streaming = streaming_head(
        LSERVE_SINK if sink is None else sink,
        recent or LSERVE_RECENT,
        options.prompt_recent or LSERVE_PROMPT_RECENT,
        window=options.keep != "all",
    )
    budget = BudgetEntry(tokens=options.budget or LSERVE_BUDGET)
    pages = BlockSparseBackend(backend="block-sparse", score="bounds", budget=budget, above=options.above or 0)
    retrieval = HeadEntry(decode=pages)
    notes = (
        "heads that do not stream: one choice of pages for the query heads of a group, made anew for each token, and "
        "not by query head for four tokens",
    )
    return _split(source, streaming, retrieval, notes)


def _split(source: Source, streaming: HeadEntry, retrieval: HeadEntry, notes: Sequence[str]) -> Imported:
    """The heads with the smallest weights stream; chance breaks ties, from a seed."""
    weights = _weights(source.file.value) or []
    layers, kv_heads = len(weights), len(weights[0])
    source.fit(layers=layers, kv_heads=kv_heads)
    if any(math.isnan(value) for row in weights for value in row):
        raise source.refuse("it holds NaN; take another copy of it")
    share, seed = source.options.streaming_share, source.options.seed or 0
    share = SHARE if share is None else share
    chance = random.Random(seed)
    order = sorted(
        (min(max(value, 0.0), 1.0), chance.random(), layer, head)
        for layer, row in enumerate(weights)
        for head, value in enumerate(row)
    )
    count = round(share * len(order))
    streams = {(layer, head) for _, _, layer, head in order[:count]}
    heads = tuple(
        tuple(streaming if (layer, head) in streams else retrieval for head in range(kv_heads))
        for layer in range(layers)
    )
    said = [f"{of_heads(count, len(order))} stream: a share of {share:g}, which the file does not say", *notes]
    if 0 < count < len(order) and order[count - 1][0] == order[count][0]:
        tied = sum(value == order[count][0] for value, *_ in order)
        said.append(f"{of_heads(tied, len(order))}: have the weight of the cut, {order[count][0]:g}; seed {seed} chose")
    return Imported(heads, tuple(said))


def _size(source: Source, config: Mapping[str, Any], what: str, said: int | None) -> int:
    """Tokens at the beginning, or the last ones: the option, else what the config.json beside deploys or trained."""
    if said is not None:
        return said
    for name in (f"deploy_{what}_size", f"{what}_size"):
        value = config.get(name)
        if value is not None:
            if not is_whole(value) or not (what == "recent") <= value <= 2**30:
                raise source.refuse(f"the config.json beside it gives {str(value)[:40]!r} as its {name}; give --{what}")
            return int(value)
    raise source.refuse(f"there is no config.json beside it that names a {what}_size; give --{what}, such as 256")


_STREAMING = frozenset({"streaming_share", "seed", "sink", "recent", "prompt_recent", "keep"})
DUO_ATTENTION = Format(
    "duo-attention", "DuoAttention's tables of weights", _STREAMING, _recognises, _made_for, _read_duo
)
LSERVE = Format(
    "lserve", "the same tables in LServe", _STREAMING | {"budget", "above"}, lambda file: False, _made_for, _read_lserve
)
