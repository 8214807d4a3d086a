"""Seconds of calls that are made in turn, on whatever device they run."""

import time
from collections.abc import Callable, Mapping

import torch

FLUSHED = 1 << 28  # bytes; more than any GPU caches
AHEAD = 2_000_000  # cycles, about a millisecond
Calls = Mapping[str, Callable[[], object]]


def now(device: str) -> float:
    """The time, when the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter()


def race(calls: Calls, rounds: int, device: str, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of each call in each round. On a GPU between two events, with the cache full of something else."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    once = _round_on_cpu if device == "cpu" else _round_on_gpu
    for number in range(warm_up + rounds):
        for name, seconds in once(calls).items():
            if number >= warm_up:
                times[name].append(seconds)
    return times


def _round_on_cpu(calls: Calls) -> dict[str, float]:
    taken = {}
    for name, call in calls.items():
        began = time.perf_counter()
        call()
        taken[name] = time.perf_counter() - began
    return taken


def _round_on_gpu(calls: Calls) -> dict[str, float]:
    """The device waits before each call until the host has launched all of it: gaps between launches do not count."""
    flush = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
    torch.cuda.synchronize()
    events = {}
    for name, call in calls.items():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        torch.cuda._sleep(AHEAD)
        begin.record()
        call()
        end.record()
        events[name] = begin, end
    torch.cuda.synchronize()
    return {name: begin.elapsed_time(end) / 1e3 for name, (begin, end) in events.items()}
