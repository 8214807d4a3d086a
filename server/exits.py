"""How a command ends when it cannot do what was asked."""

import sys
from typing import NoReturn

import typer


def fail(message: str, *, code: int) -> NoReturn:
    """One sentence on standard error, and out. 2: the command line is wrong; 1: what it names is."""
    print(f"gossamer: {message}", file=sys.stderr)
    raise typer.Exit(code)
