"""`gossamer eval`: the command line of evaluation."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.server.config import ConfigError, ServerConfig, make_config
from gossamer.server.exits import fail, interruptible, whole_number
from gossamer.server.model_flags import Device, DType, Revision, Threads

if TYPE_CHECKING:
    from gossamer.server.eval.run import Found, Job

SHORTEST, LONGEST = 256, 2**22  # tokens
SUITE_NAMES = ("ruler", "needle", "perplexity")


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face directory or id, against a --url for its tokenizer; the packaged demo model when left "
            "out.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            metavar="A[:POINT]",
            help="A policy file or packaged policy, all of its operating points or one; against a --url, an operating "
            "point of that server. May be given again; dense comes first in any case.",
            show_default="the model's own",
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            metavar="ruler|needle|perplexity|FILE",
            help="What to ask; FILE: your prompts with what their answers have to hold, as JSON lines. May be given "
            "again.",
            show_default="ruler",
        ),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths", metavar="TOKENS,...", help="Of prompt and reply, such as 4096,32k.", show_default="4096"
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="NAME,...", help="Of RULER's thirteen.", show_default="all that can be made"),
    ] = None,
    documents: Annotated[
        str, typer.Option("--documents", metavar="N", help="Of each task and length (of each depth, for needles).")
    ] = "5",
    questions: Annotated[
        str, typer.Option("--questions", metavar="N", help="About a document, where the task has more than one to ask.")
    ] = "4",
    depths: Annotated[
        str | None,
        typer.Option("--depths", metavar="PERCENT,...", help="Where needles stand.", show_default="0,25,50,75,100"),
    ] = None,
    seed: Annotated[
        str, typer.Option("--seed", metavar="N", help="Of the first document; search never uses any of these.")
    ] = "0",
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Your own text (UTF-8) in place of essays; a tenth of it is read, which profiling holds out too.",
            show_default="the sources of Python's library",
        ),
    ] = None,
    qa: Annotated[
        Path | None,
        typer.Option(
            "--qa",
            metavar="FILE",
            help="JSON lines with context, question, answers: for RULER's QA.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        str | None,
        typer.Option("--max-tokens", metavar="N", help="Of the replies to FILE's prompts.", show_default="128"),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(
            "--url",
            metavar="URL",
            help="Ask this OpenAI-compatible server, such as http://127.0.0.1:8000/v1, not a model in this process.",
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", metavar="FILE", help="Holds the key for --url.", show_default=False),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write every answer and number here too.", show_default=False),
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            "--plots", metavar="FOLDER", help="Write pictures here; needs gossamer\\[plots].", show_default=False
        ),
    ] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    kv_cache_memory: Annotated[
        str | None, typer.Option("--kv-cache-memory", metavar="SIZE", help="Of keys and values.", show_default="enough")
    ] = None,
    kv_cache_dtype: Annotated[
        str, typer.Option("--kv-cache-dtype", metavar="auto|fp8", help="Type of keys and values.")
    ] = "auto",
    threads: Threads = None,
    revision: Revision = None,
) -> None:
    """Ask MODEL questions whose answers are known, under dense attention and under policies, and compare."""
    from gossamer.server.eval.question import EvalError

    suites = tuple(dict.fromkeys(suite or ["ruler"]))
    _check_suites(suites, {"tasks": tasks, "qa": qa, "depths": depths, "max-tokens": max_tokens})
    _check_made(suites, {"lengths": lengths, "data": data})
    _check_outputs(json_file, plots)
    engine = {
        "device": device if device != "auto" else None,
        "dtype": dtype if dtype != "auto" else None,
        "kv_cache_memory": kv_cache_memory,
        "kv_cache_dtype": kv_cache_dtype if kv_cache_dtype != "auto" else None,
        "threads": threads,
    }
    if url is not None and not url.startswith(("http://", "https://")):
        fail(f"--url is {url!r}: write it whole, such as http://127.0.0.1:8000/v1.", code=2)
    if url is None and api_key_file is not None:
        fail("--api-key-file is for a server; give --url too, or leave it out.", code=2)
    if url is not None and (unused := [name for name, value in engine.items() if value is not None]):
        fail(f"--{unused[0].replace('_', '-')} is for a model in this process; leave it out with --url.", code=2)
    config = _config({"model": model, "revision": revision, "quality_sample_rate": 0.0, **engine})
    from gossamer.server.eval.qa import QAText
    from gossamer.server.eval.ruler import TASKS
    from gossamer.server.eval.run import Job
    from gossamer.server.eval.suites import Plan

    try:
        plan = Plan(
            suites=suites,
            tasks=TASKS if tasks is None else _tasks(tasks, TASKS, with_qa=qa is not None),
            lengths=tuple(
                sorted(
                    {
                        whole_number("--lengths", n, SHORTEST, LONGEST, tokens=True)
                        for n in (lengths or "4096").split(",")
                    }
                )
            ),
            documents=whole_number("--documents", documents, 1, 10_000),
            questions=whole_number("--questions", questions, 1, 64),
            seed=whole_number("--seed", seed, 0, 2**31),
            depths=tuple(
                whole_number("--depths", each, 0, 100) / 100 for each in (depths or "0,25,50,75,100").split(",")
            ),
            most=whole_number("--max-tokens", max_tokens or "128", 1, 2**20),
            qa=None if qa is None else QAText.read(qa),
        )
        key = None if api_key_file is None else _key(api_key_file)
    except EvalError as error:
        fail(str(error), code=1)
    _run(Job(config, plan, tuple(policy or ()), url, key, data), json_file, plots)


def _run(job: "Job", json_file: Path | None, plots: Path | None) -> None:
    import torch
    from rich.console import Console

    from gossamer.server.engine.families import StartupError
    from gossamer.server.eval.question import EvalError
    from gossamer.server.eval.run import evaluate as run
    from gossamer.server.progress import Shown

    if job.config.threads:
        torch.set_num_threads(job.config.threads)
    shown = Shown(Console(highlight=False, soft_wrap=True, stderr=True))
    try:
        try:
            with interruptible():
                found = run(job, shown)
        finally:
            shown.end()
    except (StartupError, EvalError) as error:
        fail(str(error), code=1)
    except KeyboardInterrupt:
        fail("Stopped before any document was answered.", code=130)
    _write(found, job, json_file, plots)


def _write(found: "Found", job: "Job", json_file: Path | None, plots: Path | None) -> None:
    from rich.console import Console

    from gossamer.server.bench.provenance import provenance, write_report
    from gossamer.server.eval.run import report
    from gossamer.server.eval.tables import print_results

    print_results(found, Console(highlight=False))
    try:
        write_report(json_file, report(found, job, provenance()))
    except OSError as error:
        fail(f"--json {json_file} cannot be written ({error.strerror or error}); the numbers are above.", code=1)
    if plots is not None:
        from gossamer.server.eval.plots import draw

        try:
            for file in draw(found, plots):
                typer.echo(f"Wrote {file}")
        except OSError as error:
            fail(f"No picture can be written to --plots {plots} ({error.strerror or error}).", code=1)


def _config(given: dict[str, object]) -> ServerConfig:
    try:
        return make_config({name: value for name, value in given.items() if value is not None})
    except ConfigError as error:
        fail(str(error), code=2)


def _check_suites(suites: tuple[str, ...], given: dict[str, object]) -> None:
    """Suites that there are, and flags that the chosen ones read."""
    for each in suites:
        if each not in SUITE_NAMES and not Path(each).is_file():
            fail(f"--suite is {each!r}: give {', '.join(SUITE_NAMES)}, or a file of JSON lines.", code=2)
    own = "FILE" if set(suites) - set(SUITE_NAMES) else ""
    for flag, suite in (("tasks", "ruler"), ("qa", "ruler"), ("depths", "needle"), ("max-tokens", "FILE")):
        if given[flag] is not None and suite not in (*suites, own):
            fail(f"--{flag} is for --suite {suite}; add that suite, or leave --{flag} out.", code=2)


def _check_made(suites: tuple[str, ...], given: dict[str, object]) -> None:
    """Flags of documents that are made, which a file's prompts are not."""
    for flag, value in given.items():
        if value is not None and not set(suites) & set(SUITE_NAMES):
            fail(f"--{flag} is given, but the prompts of a file are asked as they are; leave it out.", code=2)


def _check_outputs(json_file: Path | None, plots: Path | None) -> None:
    """Before minutes are spent on what cannot be kept."""
    if json_file is not None:
        if json_file.is_dir():
            fail(f"--json is {json_file}, which is a folder; give the name of a file.", code=1)
        if not json_file.parent.is_dir():
            fail(f"--json is {json_file}, but there is no folder {json_file.parent}; make it first.", code=1)
    if plots is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            fail(
                "--plots needs matplotlib, which is not installed; get it with: pip install 'gossamer[plots]'.", code=1
            )
        try:
            plots.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"The folder --plots {plots} cannot be made ({error.strerror}); give another one.", code=1)


def _tasks(text: str, known: tuple[str, ...], *, with_qa: bool) -> tuple[str, ...]:
    chosen = tuple(dict.fromkeys(each.strip() for each in text.split(",")))
    for each in chosen:
        if each not in known:
            fail(f"--tasks names {each!r}, which RULER has not; its tasks are {', '.join(known)}.", code=2)
        if each.startswith("qa_") and not with_qa:
            fail(f"The task {each} needs your text: give --qa FILE, or leave it out of --tasks.", code=2)
    return chosen


def _key(file: Path) -> str:
    try:
        key = file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--api-key-file {file} cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'}).", code=1)
    if not key or "\n" in key:
        fail(f"--api-key-file {file} must hold one line, the key.", code=1)
    return key
