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


def provenance() -> dict[str, Any]:
    """For the JSON file of a run."""
    return {
        "command": shlex.join(["python", *map(_plain, sys.orig_argv[1:])]),
        "commit": _commit(),
        "device": _device(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: found for name in ("torch", "transformers", "triton", "numpy") if (found := _version(name))},
    }


def write_report(path: Path | None, report: Mapping[str, Any]) -> None:
    """The JSON file of a run, if one was asked for."""
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _plain(argument: str) -> str:
    """An argument without the folders of the machine it was run on."""
    return "/".join(Path(argument).parts[-3:]) if argument.startswith("/") else argument


def _commit() -> str:
    root = Path(__file__).parent.parent
    run = ["git", "-C", str(root)]
    commit = subprocess.run(
        [*run, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    ).stdout
    changed = subprocess.run(
        [*run, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False
    ).stdout
    return (commit.strip() or "unknown") + ("+changes" if changed.strip() else "")


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            amx = " with AMX" if torch.cpu._is_amx_tile_supported() else ""
            return f"{line.split(':', 1)[1].strip()}{amx}"
    return platform.processor() or "unknown CPU"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
