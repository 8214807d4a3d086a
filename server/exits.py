"""How a command ends when it cannot do what was asked."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer

from gossamer.server.config import parse_tokens


def fail(message: str, *, code: int) -> NoReturn:
    """One sentence on standard error, and out. 2: the command line is wrong; 1: what it names is."""
    print(f"gossamer: {message}", file=sys.stderr)
    raise typer.Exit(code)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let SIGTERM, which job schedulers and containers send, stop a long command as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def whole_number(flag: str, text: str, least: int, most: int, *, tokens: bool = False) -> int:
    """What a flag was given; `tokens` may be written as 32k. Ends the command where it is no such number."""
    try:
        number = parse_tokens(text.strip()) if tokens else int(text)
    except (ValueError, OverflowError):
        number = least - 1
    if not least <= number <= most:
        fail(f"{flag} is {text[:80]!r}: give a whole number from {least} to {most}.", code=2)
    return number
