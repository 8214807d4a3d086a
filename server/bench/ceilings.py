"""The two ceilings of a device, measured: how fast it multiplies matrices and moves bytes."""

from collections.abc import Callable

import torch

from gossamer.server.bench.clock import now, race
from gossamer.server.bench.work import Ceilings

ROUNDS = 7
PATIENCE = 3.0  # seconds; some processors multiply float16 a hundred times slower than others
MATRIX = {"cpu": 1024, "cuda": 8192}
COPIED = {"cpu": 1 << 27, "cuda": 1 << 32}  # bytes
READ = {"cpu": 1 << 28, "cuda": 1 << 31}


def measure_ceilings(dtype: torch.dtype, device: str) -> Ceilings:
    """The best of several, of a product of square matrices of noise and of the faster of copying and reading."""
    size = MATRIX[device]
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return Ceilings(2 * size**3 / _best(lambda: a @ b, device), max(_copy_bandwidth(device), read_bandwidth(device)))


def _best(call: Callable[[], object], device: str) -> float:
    times: list[float] = []
    while len(times) < ROUNDS and sum(times) < PATIENCE:
        times += race({"": call}, 1, device, warm_up=0)[""]
    return min(times)


def _copy_bandwidth(device: str) -> float:
    """Bytes read and written per second."""
    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _best(lambda: target.copy_(source), device)


def read_bandwidth(device: str) -> float:
    """Bytes per second at which this device reads a large tensor, the best of several."""
    data = torch.ones(READ[device], dtype=torch.uint8, device=device).view(torch.float32)
    times = []
    for _ in range(ROUNDS):
        began = now(device)
        data.sum()
        times.append(now(device) - began)
    return data.numel() * data.element_size() / min(times)
