"""Tiles that were measured to be fastest on one kind of GPU: configs/kernels/<device>.json, which
benchmarks/tune_kernels.py writes. A kernel that is not in there, and a GPU without a file, gets the kernel's own tile,
so nothing is ever tuned while a request waits."""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

import torch


def tuned(
    kernel: str, tile: dict[str, int], device: torch.device, *, most: int | None = None, **case: int
) -> dict[str, int]:
    """`tile` with the options that are faster on this device in this case; they never take more rows than `most`, which
    is what the tile takes where nothing is said."""
    if device.type != "cuda":
        return tile
    faster = tiles_of(torch.cuda.get_device_name(device)).get(name_of(kernel, **case), {})
    most = tile.get("M", 0) if most is None else most
    return tile if faster.get("M", 0) > most else {**tile, **faster}


def name_of(kernel: str, **case: int) -> str:
    """An entry's name: the kernel, and what of its arguments decides."""
    return " ".join([kernel, *(f"{name}={int(value)}" for name, value in case.items())])


def file_name(device: str) -> str:
    """`device` as torch names it, for example NVIDIA H200."""
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split()) + ".json"


@cache
def tiles_of(device: str) -> Mapping[str, Mapping[str, int]]:
    """All that is known of a device, read once."""
    file = files("gossamer") / "configs" / "kernels" / file_name(device)
    if not file.is_file():
        return {}
    tiles: Mapping[str, Mapping[str, int]] = json.loads(file.read_text("utf-8"))["tiles"]
    return tiles
