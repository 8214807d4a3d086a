"""kernels/choose.py, compiled for the CPU: a thread takes one row after another.

Masses are not negative, so that their bits, read as whole numbers, are in their order: the least entry that is kept is
found by halving the range of bits that it may be in, with a pass over the row for each half.
"""

import functools

import numpy as np
import torch
from numba import carray, njit
from torch import Tensor

from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.native.team import Body, bytes_at, compiled, float32_at, int32_at, job, run, take

KINDS = ("tokens", "share", "mass", "part", "weight")
LONG = 1 << 12  # entries of a row from which on a sample tells first what is worth a look
SAMPLED = 16  # one of so many
NEAR, FIRST = np.float32(2), np.float32(3)  # ranks above any mass, of the recent pages and of the first
TINY = np.finfo(np.float32).tiny
BEYOND = np.int32(0x7F800000)  # the bits of infinity

PAGES = np.dtype([
    *((name, "i8") for name in (
        "next", "items", "blocks", "mass", "width", "chosen", "seq", "pos", "count", "size", "table", "table_row",
        "page_size", "kind", "least", "recent",
    )),
    ("value", "f8"),
])  # fmt: skip
TOKENS = np.dtype([
    *((name, "i8") for name in ("next", "rows", "mass", "width", "most", "found")), ("share", "f8")
])  # fmt: skip


def launch_pages(
    mass: Tensor, kv: PagedKV, blocks: QueryBlocks, *, kind: str, value: float, least: int, recent: int
) -> Tensor:
    mass, taken = mass.contiguous(), torch.zeros(1, dtype=torch.int64)
    chosen = torch.empty(mass.shape, dtype=torch.bool)
    work = job(
        PAGES, next=taken, items=mass.shape[:2].numel(), blocks=len(blocks), mass=mass, width=mass.shape[2],
        chosen=chosen, seq=blocks.seq, pos=blocks.pos, count=blocks.count, size=blocks.size, table=kv.table,
        table_row=kv.table.stride(0), page_size=kv.page_size, kind=KINDS.index(kind), least=least, recent=recent,
        value=value,
    )  # fmt: skip
    run(choose_pages(), work)
    return chosen


def launch_tokens(mass: Tensor, most: int, share: float) -> Tensor:
    mass, taken = mass.contiguous(), torch.zeros(1, dtype=torch.int64)
    found = torch.empty(*mass.shape[:-1], min(most, mass.shape[-1]), dtype=torch.int32)
    work = job(
        TOKENS, next=taken, rows=mass.shape[:-1].numel(), mass=mass, width=mass.shape[-1], most=found.shape[-1],
        found=found, share=share,
    )  # fmt: skip
    run(choose_tokens(), work)
    return found


@njit(error_model="numpy")
def _count_from(bits, least):
    """How many entries are at least `least`; with a count of as many bits as an entry, sixteen are compared at once."""
    count = np.int32(0)
    for i in range(len(bits)):
        count = np.int32(count + np.int32(bits[i] >= least))
    return count


@njit(error_model="numpy")
def _as_many(bits, keep):
    """bits [L] int32 -> the `keep`-th largest (1 or more, and no more than are above 0), and how many equal to it are
    among the `keep` largest."""
    low, high = np.int32(1), BEYOND  # at least `keep` are as large as low, and fewer as high
    above = 0
    while high - low > 1:
        middle = np.int32(low + (high - low) // 2)
        count = _count_from(bits, middle)
        if count >= keep:
            low = middle
        else:
            high, above = middle, count
    return low, keep - above


@njit(error_model="numpy", fastmath={"reassoc"})
def _sum_from(bits, least):
    """The sum of the entries whose bits are at least `least`."""
    numbers, total = bits.view(np.float32), np.float64(0)
    for i in range(len(bits)):
        total += np.float64(numbers[i]) if bits[i] >= least else np.float64(0)
    return total


@njit(error_model="numpy")
def _as_much(bits, enough):
    """bits [L] int32 -> the largest number with which all entries that are as large or larger add up to `enough`, or 1;
    what those that are larger add up to."""
    low, high = np.int32(1), BEYOND
    above = np.float64(0)
    while high - low > 1:
        middle = np.int32(low + (high - low) // 2)
        total = _sum_from(bits, middle)
        if total >= enough:
            low = middle
        else:
            high, above = middle, total
    return low, above


@njit(error_model="numpy")
def _mark_largest(bits, keep, chosen):
    """Adds the `keep` largest entries that are above 0 to what is chosen; of equal ones those with the lower index."""
    keep = min(keep, _count_from(bits, np.int32(1)))
    if keep <= 0:
        return
    least, spare = _as_many(bits, keep)
    for i in range(len(bits)):
        if bits[i] > least:
            chosen[i] = 1
        elif bits[i] == least and spare > 0:
            chosen[i] = 1
            spare -= 1


@functools.cache
def choose_pages() -> Body:
    def body(address):
        work = carray(address, 1)[0]
        ranks = np.empty(work.width, np.float32)
        while True:
            item = take(work.next)
            if item >= work.items:
                return
            n = item % work.blocks
            mass = carray(float32_at(work.mass + 4 * item * work.width), work.width)
            chosen = carray(bytes_at(work.chosen + item * work.width), work.width)
            seq, pos = carray(int32_at(work.seq), work.blocks)[n], carray(int32_at(work.pos), work.blocks)[n]
            table = carray(int32_at(work.table + 4 * work.table_row * seq), work.width)
            first = np.int64(pos) // work.size * work.size // work.page_size
            seen = (np.int64(pos) + carray(int32_at(work.count), work.blocks)[n] - 1) // work.page_size + 1
            near = first - (work.recent + work.page_size - 1) // work.page_size
            chosen[:] = 0
            if work.kind <= 1 or work.least > 0:
                for i in range(work.width):
                    rank = max(mass[i], TINY)
                    if i >= first or table[i] < 0:
                        rank = np.float32(0)
                    elif i == 0:
                        rank = FIRST
                    elif i >= near:
                        rank = NEAR
                    ranks[i] = rank
            of_block = seen - first
            if work.kind == 0:
                pages = (np.int64(work.value) + work.page_size - 1) // work.page_size
                _mark_largest(ranks.view(np.int32), pages - of_block, chosen)
            elif work.kind == 1:
                pages = np.int64(np.ceil(np.float32(seen) * np.float32(work.value)))
                _mark_largest(ranks.view(np.int32), pages - of_block, chosen)
            elif work.kind == 2:
                _mark_mass(mass, work.value, chosen)
            else:
                least = np.float32(work.value)
                if work.kind == 3:
                    most = np.float32(0)
                    for share in mass:
                        most = max(most, share)
                    least = max(least * most, TINY)
                for i in range(work.width):
                    chosen[i] = mass[i] >= least
            if work.least > 0:
                pages = (work.least + work.page_size - 1) // work.page_size
                _mark_largest(ranks.view(np.int32), pages - of_block, chosen)
            if work.recent > 0:
                for i in range(max(near, 0), first):
                    chosen[i] = chosen[i] | (table[i] >= 0)

    return compiled(PAGES, body)


@njit(error_model="numpy")
def _mark_mass(mass, share, chosen):
    """Chooses the entries >= t, where t is the largest for which they add up to `share` of the sum, if they are > 0."""
    bits = mass.view(np.int32)
    least = BEYOND if share == 0 else np.int32(1)
    if 0 < share < 1:
        least, _ = _as_much(bits, _sum_from(bits, np.int32(1)) * share)
    for i in range(len(bits)):
        chosen[i] = bits[i] >= least


@functools.cache
def choose_tokens() -> Body:
    def body(address):
        work = carray(address, 1)[0]
        places, kept = np.empty(work.width, np.int32), np.empty(work.width, np.int32)
        sample = np.empty(work.width // SAMPLED + 1, np.int32)
        while True:
            row = take(work.next)
            if row >= work.rows:
                return
            bits = carray(int32_at(work.mass + 4 * row * work.width), work.width)
            found = carray(int32_at(work.found + 4 * row * work.most), work.most)
            found[:] = -1
            if work.most == 0 or work.share == 0:
                continue
            listed = _list_largest(bits, work.most, sample, places, kept)
            keep = min(work.most, listed)
            if keep == 0:
                continue
            least, spare = _as_many(kept[:listed], keep)
            if work.share < 1:
                enough = _sum_from(bits, np.int32(1)) * work.share
                if _sum_from(kept[:listed], least + np.int32(1)) + spare * np.float64(_number(least)) > enough:
                    least, above = _as_much(kept[:listed], enough)
                    spare = np.int64(np.ceil((enough - above) / np.float64(_number(least))))
            end = 0
            for i in range(listed):
                if kept[i] > least or (kept[i] == least and spare > 0):
                    found[end] = places[i]
                    end += 1
                    spare -= kept[i] == least

    return compiled(TOKENS, body)


@njit(error_model="numpy")
def _number(bits):
    """The float32 with these bits."""
    one = np.empty(1, np.int32)
    one[0] = bits
    return one.view(np.float32)[0]


@njit(error_model="numpy")
def _list_largest(bits, most, sample, places, kept):
    """Writes place and bits of some entries that are above 0, ascending by place, among them the `most` largest -> how
    many. In a long row it is those that are as large as a sample says that a quarter more than `most` of them are."""
    least = np.int32(1)
    enough = most // SAMPLED + most // (4 * SAMPLED) + 16
    count = len(bits) // SAMPLED
    if len(bits) >= LONG and enough < count:
        for i in range(count):
            sample[i] = bits[i * SAMPLED]
        if _count_from(sample[:count], np.int32(1)) >= enough:
            least, _ = _as_many(sample[:count], enough)
    listed = _list_from(bits, least, places, kept)
    return listed if listed >= most or least == 1 else _list_from(bits, np.int32(1), places, kept)


@njit(error_model="numpy")
def _list_from(bits, least, places, kept):
    listed = 0
    for i in range(len(bits)):
        places[listed], kept[listed] = i, bits[i]
        listed += bits[i] >= least
    return listed
