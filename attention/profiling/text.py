"""Text that every machine has: the sources of Python's standard library, split by file into `train` and `eval`."""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from gossamer.attention.profiling.tasks import Split

SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "__pycache__",
        "nodejs",
        "encodings",
    }
)
LEAST_BYTES = 2000


def split_of(name: str) -> Split:
    """`train` or `eval` (one file in ten), from the file's name alone."""
    return "eval" if hashlib.sha256(name.encode()).digest()[0] < 26 else "train"


def library_files(root: Path | None = None) -> Iterator[tuple[str, str]]:
    """(name, text) of every source file of the standard library at `root`; the name is relative to it."""
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if SKIPPED_FOLDERS.isdisjoint(name.parts) and path.stat().st_size > LEAST_BYTES:
            yield f"python/{name}", path.read_text(encoding="utf-8", errors="replace")


def tidy(text: str) -> str:
    """Lines without trailing blanks, tabs as spaces, at most one empty line in a row, none over 400 characters."""
    kept: list[str] = []
    for line in text.expandtabs(4).splitlines():
        line = line.rstrip()[:400]
        if line or (kept and kept[-1]):
            kept.append(line)
    return "\n".join(kept).strip("\n") + "\n"


def library_lines(split: Split, most: int = 4_000_000) -> list[str]:
    """About `most` characters of the split's files, in the order of a hash of their names."""
    chosen = [(name, text) for name, text in library_files() if split_of(name) == split]
    lines: list[str] = []
    held = 0
    for _, text in sorted(chosen, key=lambda each: hashlib.sha256(each[0].encode()).digest()):
        if held >= most:
            break
        own = tidy(text)
        held += len(own)
        lines += own.splitlines()
    return lines
