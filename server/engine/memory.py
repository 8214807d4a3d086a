"""How much memory the KV cache may take."""

from pathlib import Path

import torch

CPU_SHARE = 0.4  # of the memory that is free when the model is loaded

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


def cache_memory(device: torch.device, gpu_utilization: float, reserve: int) -> int:
    """Bytes for keys and values. `gpu_utilization` is the share of a GPU's memory that the whole server may take,
    `reserve` the bytes that a step needs for its activations."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free - (1.0 - gpu_utilization) * total) - reserve
    return int(free_host_memory() * CPU_SHARE)


def free_host_memory() -> int:
    """Bytes that this process may still take: the machine's, or its container's if that is less."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    try:
        limit = int(_CGROUP_LIMIT.read_text()) - int(_CGROUP_USED.read_text())
    except (OSError, ValueError):
        return available
    return min(available, limit)
