"""Groups of KV heads that share one page table and one pool of pages."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """The KV heads, layer by layer, that keep the same tokens under every operating point.

    `slots` holds (layer, KV heads of that layer) in ascending order; the pool stores the heads in this order, so a
    layer's heads are one slice of it. `name` says which rule that is, for people: "all", or "all/sink64+recent256"
    where operating points differ.
    """

    slots: tuple[tuple[int, tuple[int, ...]], ...]
    name: str = ""

    @property
    def num_heads(self) -> int:
        """KV heads over all layers."""
        return sum(len(heads) for _, heads in self.slots)


def group_heads(rules: Sequence[Sequence[Hashable]]) -> tuple[HeadGroup, ...]:
    """Heads with equal rules share a group. rules[layer][kv_head] is any hashable value, for example a tuple with the
    head's retention rule at each operating point. Groups come in the order in which their first head appears."""
    found: dict[Hashable, dict[int, list[int]]] = {}
    for layer, heads in enumerate(rules):
        for head, rule in enumerate(heads):
            found.setdefault(rule, {}).setdefault(layer, []).append(head)
    return tuple(
        HeadGroup(tuple((layer, tuple(heads)) for layer, heads in layers.items()), _name(rule))
        for rule, layers in found.items()
    )


def _name(rule: Hashable) -> str:
    """A rule's own name; for one rule per operating point the names of all, or the one where they agree."""
    if isinstance(rule, tuple):
        names = [_name(part) for part in rule]
        return names[0] if len(set(names)) == 1 else "/".join(names)
    return str(getattr(rule, "name", rule))
