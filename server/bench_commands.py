"""`gossamer bench`: how fast the parts run on this machine."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.server.config import parse_tokens
from gossamer.server.exits import fail

if TYPE_CHECKING:
    from gossamer.server.bench.kernel_table import Row, Settings

SHORTEST, LONGEST = 128, 2**22  # tokens: two pages, so that there is something to choose
TILE_ROWS = 128  # most query heads of a KV head
WIDEST = 256  # head size that the kernels are made for
LENGTHS = {"cpu": "2048,8192", "cuda": "8192,32768,131072"}
ROUNDS = {"cpu": "3", "cuda": "9"}

bench = typer.Typer(
    name="bench",
    help="Measure how fast the parts run on this machine.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@bench.callback()
def _group() -> None:
    """Measure how fast the parts run on this machine."""


@bench.command()
def kernels(
    device: Annotated[
        str, typer.Option("--device", metavar="auto|cpu|cuda", help="auto: a GPU where there is one.")
    ] = "auto",
    lengths: Annotated[
        str | None,
        typer.Option(
            "--lengths",
            metavar="TOKENS,...",
            help="Lengths of prompts, and of the sequences that decode, such as 8192,32k.",
            show_default="8k,32k,128k on a GPU; 2k,8k on a CPU",
        ),
    ] = None,
    heads: Annotated[
        str, typer.Option("--heads", metavar="QUERY,KV,DIM", help="Query heads, KV heads, head size.")
    ] = "32,8,128",
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype",
            metavar="auto|bfloat16|float16|float32",
            help="auto: bfloat16, float32 on a CPU that is slow at it.",
        ),
    ] = "auto",
    batch: Annotated[str, typer.Option("--batch", metavar="N", help="Sequences that decode.")] = "8",
    share: Annotated[
        str, typer.Option("--share", metavar="X", help="Of the pages, what a sparse prompt reads.")
    ] = "0.125",
    tokens: Annotated[
        str, typer.Option("--tokens", metavar="TOKENS", help="Keys that a sparse generated token reads.")
    ] = "1024",
    rounds: Annotated[
        str | None,
        typer.Option(
            "--rounds", metavar="N", help="Times that each is measured.", show_default="9 on a GPU; 3 on a CPU"
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers here too, with the versions.")
    ] = None,
) -> None:
    """Print one table: each operation's time, its share of what the device can, and its ratio to dense attention."""
    sizes = _heads(heads)
    asked = () if lengths is None else lengths.split(",")
    given = tuple(_number("--lengths", one, SHORTEST, LONGEST, parse_tokens) for one in asked)
    budget = _number("--batch", batch, 1, 4096), _share(share), _number("--tokens", tokens, 1, LONGEST, parse_tokens)
    repeats = None if rounds is None else _number("--rounds", rounds, 1, 1000)
    _one_of("--device", device, ("auto", "cpu", "cuda"))
    _one_of("--dtype", dtype, ("auto", "bfloat16", "float16", "float32"))
    if json_file is not None:
        _check_file(json_file)
    _run(device, dtype, sizes, given, *budget, repeats, json_file)


def _run(
    device: str,
    dtype: str,
    heads: tuple[int, int, int],
    lengths: tuple[int, ...],
    batch: int,
    share: float,
    tokens: int,
    rounds: int | None,
    file: Path | None,
) -> None:
    """Everything is checked but the device."""
    import torch

    from gossamer.server.bench.kernel_table import Settings
    from gossamer.server.bench.layer import Shape

    if device == "cuda" and not torch.cuda.is_available():
        fail("--device is cuda, but torch finds no CUDA GPU here; leave it out, or give cpu.", code=1)
    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        from gossamer.server.engine.model import has_fast_bf16

        dtype = "bfloat16" if where == "cuda" or has_fast_bf16() else "float32"
    settings = Settings(
        Shape(*heads, getattr(torch, dtype), where),
        tuple(lengths or map(int, LENGTHS[where].split(","))),
        batch,
        share,
        tokens,
        rounds or int(ROUNDS[where]),
    )
    _measure(settings, file)


def _measure(settings: "Settings", file: Path | None) -> None:
    import torch
    from rich.console import Console

    from gossamer.server.bench.ceilings import measure_ceilings
    from gossamer.server.bench.kernel_table import OutOfMemory, measure, print_table, summary
    from gossamer.server.bench.provenance import device_name, provenance, write_report

    def report(line: str) -> None:
        typer.echo(line, err=True)

    torch.manual_seed(0)
    where, short = settings.shape.device, ""
    rows: list[Row] = []
    report("the device's ceilings")
    ceilings = measure_ceilings(settings.shape.dtype, where)
    try:
        for row in measure(settings, ceilings, report):
            rows.append(row)
    except OutOfMemory as error:
        short = f"{error}; give shorter --lengths or a smaller --batch."
    if rows:
        print_table(settings, ceilings, rows, device_name(where), Console())
        try:
            write_report(file, {**provenance(where), **summary(settings, ceilings, rows)})
        except OSError as error:
            fail(f"--json {file} cannot be written ({error.strerror or error}); the numbers are above.", code=1)
    if short:
        fail(short, code=1)


def _heads(text: str) -> tuple[int, int, int]:
    sizes = [_number("--heads", one, 1, 2**16) for one in text.split(",")]
    if len(sizes) != 3:
        fail(f"--heads is {text!r}: give three numbers, query heads, KV heads and head size.", code=2)
    query_heads, kv_heads, head_dim = sizes
    if query_heads % kv_heads or query_heads > TILE_ROWS * kv_heads:
        fail(f"--heads is {text!r}: the query heads must be 1 to {TILE_ROWS} times the KV heads.", code=2)
    if head_dim % 8 or head_dim > WIDEST:
        fail(f"--heads is {text!r}: the head size must be a multiple of 8, from 8 to {WIDEST}.", code=2)
    return query_heads, kv_heads, head_dim


def _number(flag: str, text: str, low: int, high: int, read: Callable[[str], int] = int) -> int:
    try:
        found = read(text)
    except (ValueError, OverflowError):
        kind = "number of tokens" if read is parse_tokens else "whole number"
        fail(f"{flag} is {text[:80]!r}: expected a {kind}.", code=2)
    if not low <= found <= high:
        fail(f"{flag} is {text[:80]!r}: expected {low} to {high}.", code=2)
    return found


def _share(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found <= 1:
        fail(f"--share is {text!r}: give a number above 0 and at most 1.", code=2)
    return found


def _check_file(file: Path) -> None:
    """Before minutes are spent on what cannot be kept."""
    if file.is_dir():
        fail(f"--json is {file}, which is a folder; give the name of a file.", code=1)
    if not file.parent.is_dir():
        fail(f"--json is {file}, but there is no folder {file.parent}; make it first.", code=1)


def _one_of(flag: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        fail(f"{flag} must be one of {', '.join(choices)}, not {given!r}.", code=2)
