"""In what two policies differ: which layers and KV heads, in which part, at which operating point."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gossamer.attention.policy_view import PHASES, LoadedPolicy, in_words, keep_in_words


@dataclass(frozen=True, slots=True)
class Change:
    """One part of a head, in the words of both sides."""

    part: str  # "prefill", "decode" or "keep"
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class ChangedHeads:
    """The same changes in some layers and KV heads; both as a policy file would name them."""

    layers: str
    heads: str
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class PolicyDifference:
    """What one policy says and another does not. Names, notes and provenance are no difference: they answer nothing."""

    general: tuple[Change, ...]  # the model that they are for, the default operating point, what is safer than each
    points: dict[str, tuple[ChangedHeads, ...]]  # those that both have and that differ
    only_before: tuple[str, ...]  # operating points
    only_after: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.general or self.points or self.only_before or self.only_after)


def difference(before: LoadedPolicy, after: LoadedPolicy) -> PolicyDifference:
    """Heads are compared by what they do, so files that a policy names count by their contents. Heads of models with
    other numbers of layers or KV heads are not compared."""
    theirs = after.policy.names
    both = [name for name in before.policy.names if name in theirs]
    general = _general(before, after, both)
    alike = not any(change.part in ("layers", "kv_heads") for change in general)
    points = {name: _changed_heads(before, after, name) for name in both} if alike else {}
    return PolicyDifference(
        tuple(general),
        {name: changed for name, changed in points.items() if changed},
        tuple(name for name in before.policy.names if name not in theirs),
        tuple(name for name in theirs if name not in both),
    )


def _general(before: LoadedPolicy, after: LoadedPolicy, both: Sequence[str]) -> list[Change]:
    pairs = [
        (name, getattr(before.file.model, name), getattr(after.file.model, name))
        for name in ("model_type", "layers", "kv_heads", "query_heads", "head_dim")
    ]
    pairs.append(("default operating point", before.policy.names[0], after.policy.names[0]))
    points = ((name, before.policy.point(name), after.policy.point(name)) for name in both)
    pairs += [(f"safer than {name}", left.safer, right.safer) for name, left, right in points]
    said = [(name, *("not given" if each is None else str(each) for each in pair)) for name, *pair in pairs]
    return [Change(name, left, right) for name, left, right in said if left != right]


def _changed_heads(before: LoadedPolicy, after: LoadedPolicy, point: str) -> tuple[ChangedHeads, ...]:
    found: dict[tuple[Change, ...], list[tuple[int, int]]] = {}
    layers, kv_heads = before.file.model.layers, before.file.model.kv_heads
    entries = before.file.entries(point), after.file.entries(point)
    policies = before.policy.point(point).heads, after.policy.point(point).heads
    for layer in range(layers):
        for head in range(kv_heads):
            left, right = (each[layer][head][0] for each in entries)
            does, would = (each[layer][head] for each in policies)
            changes = [
                _change(phase, in_words(getattr(left, phase)), in_words(getattr(right, phase)))
                for phase in PHASES
                if getattr(does, phase) != getattr(would, phase)
            ]
            if does.keep != would.keep:
                changes.append(_change("keep", keep_in_words(left.keep), keep_in_words(right.keep)))
            if changes:
                found.setdefault(tuple(changes), []).append((layer, head))
    return tuple(
        ChangedHeads(ranges(rows, layers), ranges(heads, kv_heads), changes)
        for changes, cells in found.items()
        for heads, rows in _by_heads(cells).items()
    )


def _change(part: str, before: str, after: str) -> Change:
    """Equal words for backends that differ: the files that they name do."""
    return Change(part, before, "the same, with other contents of its file" if before == after else after)


def _by_heads(cells: Iterable[tuple[int, int]]) -> dict[tuple[int, ...], list[int]]:
    """(layer, head) pairs -> the layers of each set of heads."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in cells:
        by_layer.setdefault(layer, []).append(head)
    layers: dict[tuple[int, ...], list[int]] = {}
    for layer, heads in by_layer.items():
        layers.setdefault(tuple(heads), []).append(layer)
    return layers


def ranges(numbers: Sequence[int], count: int) -> str:
    """Ascending numbers below `count` as a policy file names them: "all", or "0-3, 7"."""
    if len(numbers) == count:
        return "all"
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
