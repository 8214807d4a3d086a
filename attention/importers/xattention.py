"""XAttention's thresholds (Xu et al. 2025): a Python file that assigns lists of layers of numbers, one for each query
head, to names that end in the stride: `llama_fuse_16 = [[0.9, ...], ...]`. Prompts only. The file is parsed, never run.
"""

import ast
import re
from collections.abc import Sequence

from gossamer.attention.importers.foreign import ForeignFile
from gossamer.attention.importers.source import Format, Imported, Source, groups_of, is_number, of_heads, rectangular
from gossamer.attention.policy_backends import BlockSparseBackend, BudgetEntry, HeadEntry, SinkRecentBackend

ASSIGNED = re.compile(r"^\w{1,60}_(4|8|16)\s*=\s*\[", re.MULTILINE)
NAME = re.compile(r"\w{1,60}_(4|8|16)")
BLOCK = 128  # tokens
MOST_TEXT = 4 << 20


def _recognises(file: ForeignFile) -> bool:
    return file.kind == "text" and ASSIGNED.search(file.value) is not None


def _read(source: Source) -> Imported:
    target = source.model("counts query heads, and not how many of them share a KV head")
    stride, table = _table(source)
    source.fit(layers=len(table), query_heads=len(table[0]))
    above, nothing, unequal, heads = source.options.above or 0, 0, 0, []
    for row in table:
        groups = groups_of(row, target.kv_heads)
        unequal += sum(len(set(group)) > 1 for group in groups)
        nothing += sum(max(group) == 0 for group in groups)
        heads.append(tuple(_head(max(group), stride, above) for group in groups))
    total = target.layers * target.kv_heads
    notes = [
        f"{of_heads(total, total)}: pages of 64 tokens and query blocks of 128 rows of a KV head, and not blocks "
        "of 128 by 128",
        f"{of_heads(unequal, total)}: the thresholds of the query heads differ; the largest is taken, with the mean of "
        "their weights",
    ]
    if nothing:
        notes.append(f"{of_heads(nothing, total)}: a threshold of 0; the first and the last {BLOCK} tokens are read")
    return Imported(tuple(heads), tuple(notes), target.query_heads, target.head_dim)


def _head(threshold: float, stride: int, above: int) -> HeadEntry:
    if threshold == 0:
        return HeadEntry(prefill=SinkRecentBackend(backend="sink-recent", sink=BLOCK, recent=BLOCK))
    budget = BudgetEntry(mass=float(threshold))
    return HeadEntry(
        prefill=BlockSparseBackend.model_validate(
            {"backend": "block-sparse", "score": "antidiagonal", "stride": stride, "budget": budget, "above": above}
        )
    )


def _table(source: Source) -> tuple[int, Sequence[Sequence[float]]]:
    """The list of the asked stride (16, or the only one there), and its stride."""
    lists = _lists(source)
    asked = source.options.stride
    if asked is None:
        asked = 16 if 16 in lists else next(iter(lists)) if len(lists) == 1 else None
    if asked not in lists:
        known = ", ".join(map(str, sorted(lists)))
        raise source.refuse(f"it has thresholds for strides {known}; give one of them with --stride")
    table = rectangular(lists[asked], is_number)
    if table is None or not all(0 <= value <= 1 for row in table for value in row):
        raise source.refuse(f"its list for stride {asked} is no table of thresholds from 0 to 1, layer by layer")
    return asked, table


def _lists(source: Source) -> dict[int, object]:
    """By stride, the literal that is assigned to a name that ends in it."""
    text = source.file.value
    if len(text) > MOST_TEXT:
        raise source.refuse(f"it is longer than {MOST_TEXT >> 20} MiB")
    found: dict[int, object] = {}
    try:
        for node in ast.parse(text).body:
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                match = NAME.fullmatch(node.targets[0].id)
                if match:
                    found[int(match[1])] = ast.literal_eval(node.value)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        raise source.refuse("its lists are not plain numbers; nothing in it is run") from error
    if not found:
        raise source.refuse("no list in it is assigned to a name that ends in its stride, such as llama_fuse_16")
    return found


FORMAT = Format(
    "xattention", "XAttention's thresholds", frozenset({"stride", "above"}), _recognises, lambda file: file.path.stem,
    _read,
)  # fmt: skip
