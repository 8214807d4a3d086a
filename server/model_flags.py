"""Flags of every command that loads a model to measure it, once."""

from typing import Annotated

import typer

Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where the model runs.")]
DType = Annotated[
    str, typer.Option("--dtype", metavar="auto|bfloat16|float16|float32", help="What the model computes in.")
]
Threads = Annotated[
    str | None, typer.Option("--threads", metavar="N", help="Of the CPU.", show_default="torch's choice")
]
Revision = Annotated[str | None, typer.Option("--revision", metavar="TEXT", help="Of a hub id.", show_default=False)]
