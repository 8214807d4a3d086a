"""Who reads what and who keeps what: a head policy for each layer and KV head, at each operating point."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gossamer.attention.selectors import Dense, Selector
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent, Retention
from gossamer.kvcache.summaries import Summary


@dataclass(frozen=True, slots=True)
class HeadPolicy:
    """A selector for prompt tokens, one for generated tokens, and what the head keeps in memory."""

    prefill: Selector
    decode: Selector
    keep: Retention


DENSE = HeadPolicy(Dense(), Dense(), KeepAll())


@dataclass(frozen=True, slots=True, eq=False)
class OperatingPoint:
    """One setting of the whole model. `heads[layer][kv_head]`. Two points are the same when they are one object."""

    name: str
    heads: tuple[tuple[HeadPolicy, ...], ...]
    safer: str | None = None  # the point to use where this one is found to lose too much

    @property
    def is_dense(self) -> bool:
        """Whether every head reads all that the model itself lets it see."""
        return all(isinstance(s, Dense) for layer in self.heads for head in layer for s in (head.prefill, head.decode))

    def fingerprint(self) -> str:
        """Eight hex digits that change with anything that changes keys, values or answers."""
        return hashlib.sha256(repr(self.heads).encode()).hexdigest()[:8]


@dataclass(frozen=True, slots=True)
class AttentionPolicy:
    """Named operating points for one model; the first is the default."""

    name: str
    points: tuple[OperatingPoint, ...]

    def __post_init__(self) -> None:
        assert self.points and len({point.name for point in self.points}) == len(self.points)
        assert len({tuple(map(len, point.heads)) for point in self.points}) == 1

    def point(self, name: str) -> OperatingPoint:
        """Raises KeyError."""
        return next(point for point in self.points if point.name == name) if name in self.names else _missing(name)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(point.name for point in self.points)

    def safer(self) -> dict[str, str]:
        """The point to use in place of each, where there is one: the one that it names, else the first dense one."""
        dense = next((point.name for point in self.points if point.is_dense), None)
        named = {point.name: point.safer if point.safer in self.names else dense for point in self.points}
        return {name: other for name, other in named.items() if other is not None and other != name}

    def rules(self) -> list[list[tuple[Retention, ...]]]:
        """[layer][kv_head], the head's retention rule at every point: heads with equal entries can share pages."""
        layers = range(len(self.points[0].heads))
        return [
            [
                tuple(point.heads[layer][head].keep for point in self.points)
                for head in range(len(self.points[0].heads[layer]))
            ]
            for layer in layers
        ]

    def summaries(self) -> list[list[tuple[Summary, ...]]]:
        """[layer][kv_head], what has to be known of the head's full pages at any point."""
        points = [point.heads for point in self.points]
        return [
            [
                tuple(
                    dict.fromkeys(each for head in column for s in (head.prefill, head.decode) for each in s.summaries)
                )
                for column in zip(*rows, strict=True)
            ]
            for rows in zip(*points, strict=True)
        ]


def _missing(name: str) -> OperatingPoint:
    raise KeyError(name)


def dense_policy(layers: int, kv_heads: int) -> AttentionPolicy:
    """Every head reads and keeps everything."""
    return AttentionPolicy("dense", (OperatingPoint("exact", ((DENSE,) * kv_heads,) * layers),))


def within_windows(policy: AttentionPolicy, windows: Sequence[int | None]) -> AttentionPolicy:
    """The same policy on a model whose layer i has a sliding window of windows[i] tokens of its own (None: none).

    Such a layer's heads keep exactly their window, whatever the policy keeps: the model was trained that way, and a
    sink that it never saw would change its answers.
    """

    def fit(head: HeadPolicy, window: int | None) -> HeadPolicy:
        return head if window is None else HeadPolicy(head.prefill, head.decode, KeepSinkRecent(0, window))

    return AttentionPolicy(
        policy.name,
        tuple(
            replace(
                point,
                heads=tuple(
                    tuple(fit(head, window) for head in heads)
                    for heads, window in zip(point.heads, windows, strict=True)
                ),
            )
            for point in policy.points
        ),
    )
