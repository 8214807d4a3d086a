"""What the operating system is asked for where the cache lies in the host's memory."""

import ctypes
import mmap
import sys

from torch import Tensor

LARGE_PAGE = 2 << 20  # bytes


def ask_for_large_pages(table: Tensor) -> None:
    """Let Linux back a tensor on a CPU with pages of 2 MiB as it is filled: of keys scattered over gigabytes each would
    otherwise cost a look into the page tables. Advice only; where it is not taken nothing changes."""
    if table.device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    first = -(-table.data_ptr() // LARGE_PAGE) * LARGE_PAGE
    last = (table.data_ptr() + table.nbytes) // LARGE_PAGE * LARGE_PAGE
    if first < last:
        advise = ctypes.CDLL(None).madvise
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        advise(first, last - first, mmap.MADV_HUGEPAGE)
