"""An imported profile as a policy file: few rows, short lines, and where everything comes from."""

from collections import Counter
from collections.abc import Sequence

from gossamer.attention.importers.source import Heads, Imported
from gossamer.attention.importers.target import Target
from gossamer.attention.plain_yaml import load_plain_yaml
from gossamer.attention.policy_diff import ranges
from gossamer.attention.policy_file import ModelEntry, PointEntry, PolicyFile, Provenance, Row, SourceFile
from gossamer.attention.policy_yaml import to_yaml

POINT = "imported"
NOTE = "imported, not verified here"


def policy_of(name: str, imported: Imported, target: Target | None, files: Sequence[SourceFile]) -> PolicyFile:
    """With two operating points: `exact`, the default, because nobody here has looked at the answers; `imported`."""
    model = ModelEntry(
        name=target.name if target else None,
        model_type=target.model_type if target else None,
        layers=len(imported.heads),
        kv_heads=len(imported.heads[0]),
        query_heads=target.query_heads if target else imported.query_heads,
        head_dim=target.head_dim if target else imported.head_dim,
    )
    return PolicyFile(
        gossamer_policy=1,
        name=name,
        model=model,
        provenance=Provenance(source="imported", note=NOTE, files=tuple(files), approximations=imported.approximations),
        points={"exact": PointEntry(), POINT: _point(imported.heads)},
    )


def _point(heads: Heads) -> PointEntry:
    """What most heads do as the default, and for the others a row for all layers in which the same heads do it."""
    entries = Counter(head for row in heads for head in row)
    default = entries.most_common(1)[0][0]
    rows = []
    for entry in entries:
        if entry == default:
            continue
        layers: dict[tuple[int, ...], list[int]] = {}
        for number, row in enumerate(heads):
            having = tuple(head for head, each in enumerate(row) if each == entry)
            if having:
                layers.setdefault(having, []).append(number)
        rows += [
            Row(
                layers=_named(numbers, len(heads)),
                heads=_named(having, len(heads[0])),
                prefill=entry.prefill,
                decode=entry.decode,
                keep=entry.keep,
            )
            for having, numbers in layers.items()
        ]
    return PointEntry(default=default, rows=tuple(rows))


def _named(numbers: Sequence[int], count: int) -> str | int:
    """ "all", 3 or "0-3, 7"."""
    text = ranges(numbers, count)
    return int(text) if text.isdecimal() else text


def text_of(file: PolicyFile) -> str:
    """YAML that reads as `file` again."""
    text = to_yaml(file)
    assert PolicyFile.model_validate(load_plain_yaml(text)) == file
    return f"# Written by `gossamer policy import`; {NOTE}.\n{text}"
