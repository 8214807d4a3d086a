"""What stands beside every reported number: the command, the commit, the device and the versions."""

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gossamer import __version__

VERSIONS = ("torch", "transformers", "triton", "numpy")


def provenance(device: str | None = None) -> dict[str, Any]:
    """For the JSON file of a run. `device` is where it ran; left out, a GPU where there is one."""
    return {
        "command": _command(),
        "commit": _commit(),
        "device": device_name(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: found for name in VERSIONS if (found := _version(name))},
    }


def write_report(path: Path | None, report: Mapping[str, Any]) -> None:
    """The JSON file of a run, if one was asked for."""
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _command() -> str:
    if Path(sys.argv[0]).name == "gossamer":
        return shlex.join(["gossamer", *map(_plain, sys.argv[1:])])
    return shlex.join(["python", *map(_plain, sys.orig_argv[1:])])


def _plain(argument: str) -> str:
    """An argument without the folders of the machine it was run on."""
    return "/".join(Path(argument).parts[1:][-3:]) if argument.startswith("/") else argument


def _commit() -> str:
    """Of the clone that this file is in; an installed package has its version alone."""
    root = Path(__file__).resolve().parents[2]
    if _git(root, "rev-parse", "--show-toplevel") != str(root):
        return f"version {__version__}"
    changed = _git(root, "status", "--porcelain", "-uno")
    return (_git(root, "rev-parse", "--short=12", "HEAD") or "unknown") + ("+changes" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def device_name(device: str) -> str:
    """What the machine calls its GPU or its processor."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            amx = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
            return f"{line.split(':', 1)[1].strip()}{amx}"
    return platform.processor() or "unknown CPU"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
