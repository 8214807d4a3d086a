"""Whether a profile can be trusted: what became of each bound on unseen documents, and what speaks against a number."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from gossamer.attention.profiling.fidelity import Cell, Trial, losses, within
from gossamer.attention.profiling.profile import Point, Profile
from gossamer.attention.profiling.report_parts import listed, lots, nats, number_of, percent, points, sparse

Z = 1.959964  # of a normal distribution, 95 % in the middle
Standing = Literal["reference", "held", "held, few answers", "not held, few answers", "not held"]
Tone = Literal["dense", "good", "unsure", "bad"]
TONES: Mapping[Standing, Tone] = MappingProxyType(
    {
        "reference": "dense",
        "held": "good",
        "held, few answers": "unsure",
        "not held, few answers": "unsure",
        "not held": "bad",
    }
)


@dataclass(frozen=True, slots=True)
class Answers:
    """How many strings that right answers hold were found, of how many."""

    right: int
    of: int

    @classmethod
    def in_cell(cls, cell: Cell) -> "Answers":
        return cls(round((cell.accuracy or 0.0) * cell.references), cell.references)

    @property
    def share(self) -> float:
        return self.right / self.of

    @property
    def interval(self) -> tuple[float, float]:
        """The share lies in it with 95 % confidence (Wilson 1927)."""
        square = Z * Z / self.of
        middle = (self.share + square / 2) / (1 + square)
        half = math.sqrt(self.share * (1 - self.share) * square + square * square / 4) / (1 + square)
        return max(0.0, middle - half), min(1.0, middle + half)

    def text(self) -> str:
        return f"{percent(self.share)} ({self.right} of {self.of})"


@dataclass(frozen=True, slots=True)
class Loss:
    """Answers under dense attention and under an operating point, to the same questions."""

    where: str
    dense: Answers
    own: Answers

    @property
    def points(self) -> float:
        """Of accuracy, that were lost."""
        return 100 * (self.dense.share - self.own.share)

    @property
    def interval(self) -> tuple[float, float]:
        """The loss lies in it with 95 % confidence: from the Wilson intervals of both shares (Newcombe 1998, method
        10). Takes them for independent, which two answers to one question are not, so it is too wide, not too narrow.
        """
        (low, high), (own_low, own_high) = self.dense.interval, self.own.interval
        dense, own = self.dense.share, self.own.share
        least = math.hypot(dense - low, own_high - own)
        most = math.hypot(high - dense, own - own_low)
        return self.points - 100 * least, self.points + 100 * most

    def text(self) -> str:
        low, high = self.interval
        return f"{points(self.points)} [{points(low)} to {points(high)}]"


@dataclass(frozen=True, slots=True)
class Verdict:
    """worst: the task and length that lost most on unseen documents; total: all answers together. None where nothing
    was asked."""

    point: Point
    standing: Standing
    worst: Loss | None
    total: Loss | None
    said: tuple[str, ...]

    @property
    def tone(self) -> Tone:
        return TONES[self.standing]


def losses_of(dense: Trial, trial: Trial) -> dict[tuple[str, int], Loss]:
    """By task and length, where something was asked."""
    before, after = dense.cells(), trial.cells()
    return {
        (task, length): Loss(
            f"{task} at {length} tokens", Answers.in_cell(before[task, length]), Answers.in_cell(after[task, length])
        )
        for task, length in losses(dense, trial)
    }


def verdict_of(profile: Profile, point: Point) -> Verdict:
    dense = profile.points[0]
    found = list(losses_of(dense.unseen, point.unseen).values())
    worst = max(found, key=lambda each: (each.points, each.interval[1]), default=None)
    total = _together(found)
    if point.bound is None:
        return Verdict(point, "reference", worst, total, ("Dense attention, which the others are compared with.",))
    before, _ = _broken(point, dense.searched, point.searched, searched=True)
    after, chance = _broken(point, dense.unseen, point.unseen, searched=False)
    said = []
    if point.plan.heads == dense.plan.heads:
        said.append("Every head is dense here: the search found nothing sparser that held the bound.")
    if after:
        search = "It did not hold in the search either" if before else "The bound held in the search"
        said.append(f"{search}{';' if before else ', but not'} on unseen documents: {'; '.join(after)}.")
    elif before:
        said.append(f"The bound holds on unseen documents, but did not in the search: {'; '.join(before)}.")
    else:
        said.append("The bound held in the search and holds on unseen documents.")
    few = _too_few(point, found)
    standing: Standing = "held, few answers" if few else "held"
    if after:
        standing = "not held, few answers" if chance else "not held"
    if total is not None:
        few.append(
            f"All {total.own.of} answers together: {total.own.right} right, {total.dense.right} under dense; lost "
            f"{total.text()} points."
        )
    return Verdict(point, standing, worst, total, (*said, *few))


def _together(found: list[Loss]) -> Loss | None:
    if not found:
        return None
    dense, own = (
        Answers(sum(each.right for each in sums), sum(each.of for each in sums))
        for sums in ([each.dense for each in found], [each.own for each in found])
    )
    return Loss("all tasks and lengths", dense, own)


def _broken(point: Point, dense: Trial, trial: Trial, *, searched: bool) -> tuple[list[str], bool]:
    """What of the bound did not hold in a trial, as the search judges it; and whether all of it may be chance: losses
    whose interval reaches into the bound."""
    assert point.bound is not None
    said = []
    diverged, lost = trial.divergence(), losses(dense, trial)
    if not diverged <= point.bound.divergence:  # unknown is not held
        said.append(f"{nats(diverged)} nats from dense, where {point.bound.divergence:g} are allowed")
    over = [key for key, value in lost.items() if not value <= point.bound.points]
    if searched and within(dense, trial, point.bound.points):
        over = []  # the search lets a single answer pass
    known = losses_of(dense, trial)
    sure = bool(said) or any(known[key].interval[0] > point.bound.points for key in over)
    if over:
        worst = known[max(over, key=lost.__getitem__)]
        chance = ", which so few answers can do by chance" if worst.interval[0] <= point.bound.points else ""
        more = f" (and {len(over) - 1} more)" if len(over) > 1 else ""
        said.append(
            f"{worst.where}{more} lost {points(worst.points)} points ({worst.own.right} of {worst.own.of} right, "
            f"{worst.dense.right} under dense), where {point.bound.points:g} may be lost{chance}"
        )
    return said, not sure


def _too_few(point: Point, found: list[Loss]) -> list[str]:
    """Where a loss beyond the bound would look no different."""
    assert point.bound is not None
    if not found:
        return ["Nothing was asked on unseen documents, so nothing is known of what tasks lose."]
    hidden = [each for each in found if each.points <= point.bound.points < each.interval[1]]
    if not hidden:
        return []
    worst = max(hidden, key=lambda each: each.interval[1])
    return [
        f"{len(hidden)} of {len(found)} results rest on too few answers to tell a loss within "
        f"{lots(point.bound.points)} from a larger one: up to {points(worst.interval[1])} in {worst.where} "
        f"({number_of(worst.own.of, 'answer')}) would look the same."
    ]


def headline(verdicts: list[Verdict]) -> str:
    """One sentence over everything."""
    own = [each for each in verdicts if each.standing != "reference"]
    if not own:
        return "No operating point beside dense was asked for."
    words: dict[Standing, str] = {
        "not held": "not held on unseen documents",
        "not held, few answers": "not held on unseen documents by tasks with so few answers that it may be chance",
        "held": "held on unseen documents",
        "held, few answers": "held on unseen documents as measured, with too few answers to be sure of the tasks",
    }
    told = []
    for standing, text in words.items():
        names = [each.point.name for each in own if each.standing == standing]
        if names:
            told.append(f"{text}: {listed(names)}")
    sentence = "; ".join(told)
    return sentence[0].upper() + sentence[1:] + "."


def verdicts_of(profile: Profile) -> list[Verdict]:
    """The points that a policy is for first, dense last."""
    return [verdict_of(profile, point) for point in (*sparse(profile), profile.points[0])]
