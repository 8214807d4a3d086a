"""The table and the pictures of an evaluation, from what `gossamer eval --json` wrote.

    python benchmarks/evaluation_table.py benchmarks/results/demo_evaluation.json --pictures docs/pictures

Several files may be joined, of other points or other documents, as long as every point was asked all questions in the
end. The table, in Markdown, goes to stdout: mean score over the tasks at each length, points lost to dense over all
questions of a length with the 95 % interval, the worst task, and the share of the keys that was read.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gossamer.server.eval.plots import draw
from gossamer.server.eval.question import Answer, Question, Use
from gossamer.server.eval.results import Cell, Outcome, paired
from gossamer.server.eval.run import Found

DENSE = "dense"


def outcomes(file: dict[str, Any]) -> list[Outcome]:
    """What can be told of questions and answers; the prompts are not in the file."""
    found = []
    for each in file["answers"]:
        question = Question(
            each["task"], each["length"], each["document"], each["number"], (), "", tuple(each["references"]), 0, 0,
            any_counts=each["task"].startswith("qa"), depth=each["depth"],
        )  # fmt: skip
        found.append(Outcome(each["point"], question, Answer(each["reply"], Use(**each["use"]))))
    return found


def joined(files: Sequence[dict[str, Any]]) -> Found:
    """One evaluation of all points."""
    points = dict.fromkeys(point for file in files for point in file["points"])
    known: dict[tuple[str, str, int], Outcome] = {}
    for file in files:
        for outcome in outcomes(file):
            place = (outcome.point, outcome.question.document, outcome.question.number)
            if known.setdefault(place, outcome).score != outcome.score:  # what is wrong may be wrong in another way
                raise SystemExit(f"The files disagree in how well {place} answers; join no such files.")
    if any((point, *place) not in known for _, *place in known for point in points):
        raise SystemExit("The files do not ask every point the same questions; leave one out.")
    return Found(tuple(points), DENSE, files[0]["text"], outcomes=list(known.values()))


def points_of(share: float) -> int:
    return round(100 * share)


def row(found: Found, point: str, lengths: Sequence[int], cells: Sequence[Cell]) -> list[str]:
    own = [cell for cell in cells if cell.point == point]
    columns = [f"`{point}`" if point != DENSE else DENSE]
    for length in lengths:
        here = [cell for cell in own if cell.length == length]
        columns.append(f"{100 * sum(cell.value for cell in here) / len(here):.0f}")
        if point != DENSE:
            base, sparse = (
                [o.score for o in found.outcomes if (o.point, o.question.length) == (name, length)]
                for name in (DENSE, point)
            )
            difference, (low, high) = paired(base, sparse)
            columns[-1] += f" ({points_of(-difference)}; {points_of(-high)} to {points_of(-low)})"
    worst = min(own, key=lambda cell: cell.value if cell.difference is None else cell.difference)
    if worst.difference is None or worst.difference_interval is None:
        columns.append(f"{worst.task} at {worst.length // 1024}K: {100 * worst.value:.0f}")
    else:
        low, high = worst.difference_interval
        lost = f"{points_of(-worst.difference)} ({points_of(-high)} to {points_of(-low)})"
        columns.append(f"{worst.task} at {worst.length // 1024}K: {lost} lost")
    longest = [cell for cell in own if cell.length == max(lengths)]
    for phase in ("prefill", "decode"):
        shares = [getattr(cell.densities, phase) for cell in longest]
        columns.append(f"{100 * sum(shares) / len(shares):.0f} %")
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--pictures", type=Path, help="a folder to draw in")
    args = parser.parse_args()
    found = joined([json.loads(path.read_text("utf-8")) for path in args.files])
    cells = found.cells()
    lengths = sorted({cell.length for cell in cells})
    asked = len({(o.question.document, o.question.number) for o in found.outcomes}) // len(lengths)
    heads = [f"{length // 1024}K" for length in lengths]
    longest = heads[-1]
    header = ["operating point", *heads, "worst task", f"prompts read, {longest}", f"answers read, {longest}"]
    print(f"{asked} questions a length, on {len({o.question.document for o in found.outcomes})} documents.\n")
    for columns in (header, ["---"] * len(header), *(row(found, point, lengths, cells) for point in found.points)):
        print(f"| {' | '.join(columns)} |")
    if args.pictures:
        args.pictures.mkdir(parents=True, exist_ok=True)
        for path in draw(found, args.pictures):
            print(path)


if __name__ == "__main__":
    main()
