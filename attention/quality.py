"""What sparse attention misses in live traffic: now and then a few queries of a few heads look twice (second_look.py).

It changes nothing: answers are the same with it and without it.
"""

import random
from collections.abc import Iterable, Iterator, Sequence

from gossamer.attention.policy import HeadPolicy, OperatingPoint
from gossamer.attention.second_look import Check, Watch
from gossamer.attention.selectors import Dense
from gossamer.attention.step import Step
from gossamer.kernels.layout import BlockRow
from gossamer.kvcache.retention import KeepSinkRecent
from gossamer.kvcache.table import PageTable

LAYER_GROUPS = 3  # runs of neighbouring layers that are told apart


class QualitySampler:
    """Decides what is looked at twice: each query block of a prompt, and each step that generates tokens, with the
    same probability `rate`; there, in each group of layers, one of the heads that may leave keys out.

    Heads of layers with a window of their own (`windows`, by layer) see what the model lets them see, and are not
    asked. Touched by the engine thread alone.
    """

    def __init__(self, rate: float, windows: Sequence[int | None], seed: int = 0) -> None:
        self._rate = rate
        self._groups = [
            (name, [layer for layer in own if windows[layer] is None]) for name, own in layer_groups(len(windows))
        ]
        self._rng = random.Random(seed)
        self._heads: dict[tuple[OperatingPoint, bool], list[tuple[str, list[tuple[int, int, int]]]]] = {}

    def generated(self, points: Iterable[OperatingPoint]) -> bool:
        """Whether to look at one of the tokens of a step that generates for sequences at these points."""
        sparse = any(heads for point in frozenset(points) for _, heads in self._leaving_out(point, True))
        return sparse and self._draw()

    def _draw(self) -> bool:
        return self._rng.random() < self._rate

    def choose(self, step: Step, tables: Sequence[PageTable], generated: bool) -> Watch | None:
        """What to look at in a step of these sequences; `generated`: one of its generated tokens too. None: nothing."""
        asked = list[tuple[int, Check]]()
        if step.prefill is not None:
            for block, row in enumerate(step.prefill.rows):
                if self._draw():
                    asked += self._checks(step.points[row.seq], row, block, step.prefill.size, False)
        if generated and step.decode is not None:
            block = self._rng.randrange(len(step.decode.rows))
            row = step.decode.rows[block]
            asked += self._checks(step.points[row.seq], row, block, 1, True)
        can, cannot = list[Check](), list[Check]()
        for seq, check in asked:
            (can if step.views.whole(check.layer, check.head, tables[seq]) else cannot).append(check)
        return Watch(can, cannot) if asked else None

    def _checks(
        self, point: OperatingPoint, row: BlockRow, block: int, size: int, decode: bool
    ) -> list[tuple[int, Check]]:
        """One per group of layers that has a head to ask, with the sequence's number."""
        origin = row.pos // size * size
        checks = []
        for name, heads in self._leaving_out(point, decode):
            asked = [(layer, head) for layer, head, above in heads if above <= origin]
            for layer, head in self._chosen(asked) if asked else ():
                checks.append((row.seq, Check(point.name, decode, name, layer, head, block)))
        return checks

    def _chosen(self, heads: Sequence[tuple[int, int]]) -> Sequence[tuple[int, int]]:
        """Those of a group of layers that look twice."""
        return [self._rng.choice(heads)]

    def _leaving_out(self, point: OperatingPoint, decode: bool) -> list[tuple[str, list[tuple[int, int, int]]]]:
        """By group of layers: layer, KV head, and the position from which it may leave keys out."""
        key = point, decode
        if key not in self._heads:
            self._heads[key] = [
                (name, [(layer, *head) for layer in layers for head in _leaving_out(point.heads[layer], decode)])
                for name, layers in self._groups
            ]
        return self._heads[key]


def layer_groups(layers: int) -> list[tuple[str, range]]:
    """Early, middle and late ones, by name: "0-10", "11-20", "21-31"."""
    count = min(LAYER_GROUPS, layers)
    runs = [range(layers * n // count, layers * (n + 1) // count) for n in range(count)]
    return [(f"{run.start}-{run.stop - 1}" if len(run) > 1 else f"{run.start}", run) for run in runs]


def _leaving_out(heads: Sequence[HeadPolicy], decode: bool) -> Iterator[tuple[int, int]]:
    for number, head in enumerate(heads):
        selector = head.decode if decode else head.prefill
        if isinstance(head.keep, KeepSinkRecent):
            yield number, 0
        elif not isinstance(selector, Dense):
            yield number, selector.above
