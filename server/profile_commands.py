"""`gossamer profile`: the command line of profiling."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.server.config import ConfigError, make_config
from gossamer.server.exits import fail, interruptible, whole_number
from gossamer.server.model_flags import Device, DType, Revision, Threads

if TYPE_CHECKING:
    from rich.console import Console

    from gossamer.attention.profiling.profile import Profile
    from gossamer.server.profile.run import Job

SHORTEST, LONGEST = 512, 2**22  # tokens
GOALS = ("latency", "throughput", "memory")
POINTS = ("balanced=1:0.02", "fast=4:0.1")


def profile(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face directory or id; the packaged demo model when left out.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="FILE", help="The policy file to write; all else lies beside it.")
    ] = Path("policy.yaml"),
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="TOKENS,...", help="Lengths of prompts, such as 4096,32k.")
    ] = "4096,32768",
    documents: Annotated[
        str,
        typer.Option("--documents", metavar="N", help="Of each task and length, for each purpose."),
    ] = "1",
    questions: Annotated[str, typer.Option("--questions", metavar="N", help="About each document, at most.")] = "12",
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Your own text (UTF-8), to hide facts in and to read.",
            show_default="the sources of Python's library",
        ),
    ] = None,
    point: Annotated[
        list[str] | None,
        typer.Option(
            "--point",
            metavar="NAME=POINTS:NATS",
            help="An operating point, and how far it may be from dense: points of accuracy that any task may lose, and "
            "nats that next-token distributions may diverge by. May be given again; the first is the default.",
            show_default=", ".join(POINTS),
        ),
    ] = None,
    optimise: Annotated[str, typer.Option("--optimise", metavar="|".join(GOALS), help="What cost means.")] = "latency",
    memory_weight: Annotated[
        str | None,
        typer.Option(
            "--memory-weight",
            metavar="X",
            help="The share of cost that is memory, 0 to 1.",
            show_default="0.05, 0.25 or 0.8 by --optimise",
        ),
    ] = None,
    device_profile: Annotated[
        Path | None,
        typer.Option(
            "--device-profile",
            metavar="FILE",
            help="What attention costs: a file that an earlier run wrote, or a packaged name; measured when left out.",
            show_default=False,
        ),
    ] = None,
    train_gates: Annotated[
        bool, typer.Option("--train-gates", help="Distil gates too, and let heads use them.")
    ] = False,
    train_heads: Annotated[
        bool,
        typer.Option("--train-heads", help="Train which heads can stream (DuoAttention), for the report to compare."),
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Try each backend for all heads alike too, at equal density.")
    ] = False,
    seed: Annotated[str, typer.Option("--seed", metavar="N", help="Of documents and of training.")] = "0",
    device: Device = "auto",
    dtype: DType = "auto",
    threads: Threads = None,
    revision: Revision = None,
    load_format: Annotated[
        str, typer.Option("--load-format", metavar="auto|dummy", help="dummy: random weights, for time and memory.")
    ] = "auto",
) -> None:
    """Choose attention for every head of MODEL, and write it as a policy that the server runs.

    What was found is kept beside the policy as it is found: the same command goes on where it was stopped."""
    given = {"model": model, "device": device, "dtype": dtype, "revision": revision, "load_format": load_format}
    if threads is not None:
        given["threads"] = threads
    asked = {whole_number("--lengths", each, SHORTEST, LONGEST, tokens=True) for each in lengths.split(",")}
    numbers = (
        whole_number("--documents", documents, 1, 1000),
        whole_number("--questions", questions, 1, 64),
        whole_number("--seed", seed, 0, 2**31),
    )
    bounds = tuple(_bound(each) for each in point or POINTS)
    if len({bound[0] for bound in bounds} | {"exact"}) <= len(bounds):
        fail("--point names must differ from each other, and from exact, which is dense.", code=2)
    if optimise not in GOALS:
        fail(f"--optimise is {optimise!r}: give one of {', '.join(GOALS)}.", code=2)
    memory = None if memory_weight is None else _fraction("--memory-weight", memory_weight)
    _check_out(out)
    try:
        config = make_config({key: value for key, value in given.items() if value is not None}, None)
    except ConfigError as error:
        fail(str(error), code=2)
    from gossamer.attention.profiling.profile import Bound, Settings
    from gossamer.server.profile.run import Job

    settings = Settings(
        lengths=tuple(sorted(asked)),
        documents=numbers[0],
        questions=numbers[1],
        seed=numbers[2],
        goal=optimise,  # type: ignore[arg-type]
        memory=memory,
        bounds=tuple(Bound(*each) for each in bounds),
        compare=compare,
        train_gates=train_gates,
        train_heads=train_heads,
    )
    _run(Job(config, settings, out, data, device_profile))


def _run(job: "Job") -> None:
    import torch
    from rich.console import Console

    from gossamer.attention.profiling.device_times import DeviceProfileError
    from gossamer.server.engine.families import StartupError
    from gossamer.server.profile.run import profile as run
    from gossamer.server.progress import Shown

    if job.config.threads:
        torch.set_num_threads(job.config.threads)
    console = Console(highlight=False, soft_wrap=True)
    shown = Shown(console)
    try:
        with interruptible():
            found = run(job, shown)
    except (StartupError, DeviceProfileError) as error:
        fail(str(error), code=1)
    except ValueError as error:
        fail(f"{str(error)[:1].upper()}{str(error)[1:]}.", code=1)
    except KeyboardInterrupt:
        shown.end()
        fail("Stopped; the same command goes on from here.", code=130)
    finally:
        shown.end()
    _print_summary(console, found, job.out)


def _print_summary(console: "Console", found: "Profile", out: Path) -> None:
    from rich.table import Table

    longest = max(found.settings.lengths)
    table = Table("operating point", "cost", "prefill", "decode", "KV memory", "nats from dense", "points lost")
    dense = found.points[0].unseen
    from gossamer.attention.profiling.fidelity import losses

    for point in found.points:
        lost = max(losses(dense, point.unseen).values(), default=0.0)
        table.add_row(
            point.name,
            f"{100 * point.plan.cost:.0f}%",
            f"{100 * point.density['prefill'][longest]:.1f}%",
            f"{100 * point.density['decode'][longest]:.1f}%",
            f"{100 * point.memory[longest]:.0f}%",
            f"{point.unseen.divergence():.4f}",
            f"{lost:.1f}",
        )
    console.print(table)
    console.print(
        f"Shares of dense; densities at {longest} tokens; the last two on documents that nothing was chosen by."
    )
    console.print(
        f"Wrote {out} and {out.with_suffix('.html')}, its report; serve it with: "
        f"gossamer serve {found.about['model']} --attention-policy {out}",
        markup=False,
    )


def _fraction(flag: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 1.0:
        fail(f"{flag} is {text!r}: give a number from 0 to 1.", code=2)
    return number


def _bound(text: str) -> tuple[str, float, float]:
    """ "fast=4:0.1" -> name, points, nats."""
    name, _, rest = text.partition("=")
    points, _, nats = rest.partition(":")
    try:
        bound = name, float(points), float(nats)
    except ValueError:
        bound = "", 0.0, 0.0
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,31}", bound[0]) or not 0 <= bound[1] <= 100 or not 0 < bound[2] < 100:
        fail(f"--point is {text!r}: write NAME=POINTS:NATS, such as fast=4:0.1, the name in small letters.", code=2)
    return bound


def _check_out(out: Path) -> None:
    """Before anything is computed."""
    if out.is_dir() or not out.name:
        fail(f"--out is {str(out)!r}, which is a directory: give the name of a file, such as policy.yaml.", code=2)
    if out.suffix not in (".yaml", ".yml"):
        fail(f"--out is {str(out)!r}: a policy is a YAML file, so let its name end in .yaml.", code=2)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"The folder of --out {out} cannot be made ({error.strerror}); give another one.", code=1)
