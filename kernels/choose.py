"""From scores to what is kept of them: the largest few of each row, or the largest that hold a share of its mass.

A row's entries are float32 and not negative. Sums are in float64, so that the order of the terms does not decide who is
kept, and a row's answer depends on that row alone.
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.kernels.layout import NULL_PAGE, PagedKV, QueryBlocks
from gossamer.kernels.native import compiles

Kind = Literal["tokens", "share", "mass", "part", "weight"]

PIECE = 1 << 20  # entries that are sorted at once


def choose_pages(
    mass: Tensor, kv: PagedKV, blocks: QueryBlocks, *, kind: Kind, value: float, least: int = 0, recent: int = 0
) -> Tensor:
    """mass [G, N, L] float32, 0 for pages that are not past -> [G, N, L] bool, the past pages that a budget admits.

    A past page of a block lies before the page of the block's origin and was not released. By kind: as many as make
    `value` tokens; as make a share of the pages up to the block's last query; the largest that hold that much of the
    row's sum (choose_mass); those of at least `value` times the row's largest; those of at least `value`. The first two
    count the block's own pages, the first page and those of the `recent` tokens before the block, which are read
    anyway, and take pages without mass too where there are no others. With `least`, what that many tokens would admit
    is added, and with `recent` always the pages of these.
    """
    if mass.is_cuda:
        from gossamer.kernels.triton.choose import launch_pages

        return launch_pages(mass, kv, blocks, kind=kind, value=value, least=least, recent=recent)
    if compiles():
        from gossamer.kernels.native.choose import launch_pages as launch_on_cpu

        return launch_on_cpu(mass, kv, blocks, kind=kind, value=value, least=least, recent=recent)
    return choose_pages_torch(mass, kv, blocks, kind=kind, value=value, least=least, recent=recent)


def choose_pages_torch(
    mass: Tensor, kv: PagedKV, blocks: QueryBlocks, *, kind: Kind, value: float, least: int = 0, recent: int = 0
) -> Tensor:
    """What choose_pages means."""
    size, pos, page = kv.page_size, blocks.pos.numpy(), np.arange(kv.table.shape[1], dtype=np.int32)
    first, seen = pos // blocks.size * blocks.size // size, (pos + blocks.count.numpy() - 1) // size + 1
    past = (page < first[:, None]) & (kv.table.numpy()[blocks.seq.numpy()] != NULL_PAGE)
    near = past & (page >= (first - -(-recent // size))[:, None])

    def largest(pages: int | NDArray[np.int32]) -> Tensor:
        ranked = np.maximum(mass.numpy(), np.finfo(np.float32).tiny)
        np.copyto(ranked, 0.0, where=~past)
        if recent:
            np.copyto(ranked, 2.0, where=near)
        ranked[..., 0] = past[:, 0] * np.float32(3.0)
        keep = np.maximum(pages - (seen - first), 0)
        return choose_count(torch.from_numpy(ranked), torch.from_numpy(keep))

    if kind == "tokens":
        chosen = largest(-(-int(value) // size))
    elif kind == "share":
        chosen = largest(np.ceil(seen.astype(np.float32) * np.float32(value)).astype(np.int32))
    elif kind == "mass":
        chosen = choose_mass(mass, value)
    elif kind == "part":
        chosen = (mass >= value * mass.amax(-1, keepdim=True)) & (mass > 0)
    else:
        chosen = mass >= value
    if least:
        chosen |= largest(-(-least // size))
    return chosen.logical_or_(torch.from_numpy(near)) if recent else chosen


def choose_count(mass: Tensor, keep: Tensor) -> Tensor:
    """mass [..., L] float32, keep [...] int32 (or what broadcasts to it) -> [..., L] bool, on a CPU.

    In each row the `keep` largest entries that are > 0; of equal entries those with the lower index.
    """
    rows, wanted = _rows(mass), keep.expand(mass.shape[:-1]).reshape(-1)
    mask = torch.empty(rows.shape, dtype=torch.bool)
    step = _rows_at_once(mass)
    for low in range(0, len(rows), step):
        row, k, chosen = (each[low : low + step] for each in (rows, wanted, mask))
        if row.numel() == 0:
            continue
        k = torch.minimum(k.long().clamp(min=0)[:, None], (row > 0).sum(-1, keepdim=True))
        most = int(k.max())
        if most == 0:
            chosen.zero_()
            continue
        least = row.topk(most).values.gather(-1, (k - 1).clamp(min=0))  # the last entry that is kept
        torch.ge(row, least, out=chosen)
        if bool((chosen.sum(-1, keepdim=True) == k).all()):
            continue
        above, equal = row > least, row == least
        spare = k - above.sum(-1, keepdim=True)
        chosen.copy_(above | (equal & (equal.cumsum(-1, dtype=torch.int32) <= spare)))
    return mask.view(mass.shape)


def choose_mass(mass: Tensor, share: float) -> Tensor:
    """mass [..., L] float32 -> [..., L] bool, on a CPU: in each row the entries >= t, where t is the largest for which
    they add up to at least `share` of the row's sum. Equal entries are kept or left together; share 1 keeps all that
    are > 0, share 0 none."""
    assert 0 <= share <= 1
    if share in (0, 1) or mass.numel() == 0:  # 1: a sum may round to the whole before the smallest entry is in it
        return (mass > 0) & (share == 1)
    rows = _rows(mass)
    mask = torch.empty(rows.shape, dtype=torch.bool)
    step = _rows_at_once(mass)
    for low in range(0, len(rows), step):
        row = rows[low : low + step].numpy()
        falling = np.sort(row)[:, ::-1]  # several times as fast as torch's
        sums = falling.cumsum(-1, dtype=np.float64)
        last = (sums < sums[:, -1:] * share).sum(-1, keepdims=True)  # the first entry that makes it enough
        least = np.take_along_axis(falling, last, -1)
        np.logical_and(row >= least, row > 0, out=mask[low : low + step].numpy())
    return mask.view(mass.shape)


def choose_tokens(mass: Tensor, most: int, share: float) -> Tensor:
    """mass [..., K] float32 -> [..., min(most, K)] int32: positions, ascending, -1 behind the last.

    In each row the `most` largest entries that are > 0 (of equal ones the lower index), taken from the largest on and
    only until they add up to `share` of the row's sum; share 1 takes `most` whatever they add up to, share 0 none.
    """
    assert 0 <= share <= 1 and most >= 0
    if mass.is_cuda:
        from gossamer.kernels.triton.choose import launch_tokens

        return launch_tokens(mass, most, share)
    if compiles():
        from gossamer.kernels.native.choose import launch_tokens as launch_on_cpu

        return launch_on_cpu(mass, most, share)
    return choose_tokens_torch(mass, most, share)


def choose_tokens_torch(mass: Tensor, most: int, share: float) -> Tensor:
    """What choose_tokens means."""
    rows, k = _rows(mass), min(most, mass.shape[-1])
    if share == 0 or len(rows) * k == 0:
        found = torch.full((len(rows), k), -1, dtype=torch.int32)
    else:
        found = _positions(choose_count(rows, torch.full((len(rows),), k, dtype=torch.int32)), k)
    if 0 < share < 1:
        found = _until(rows, found, share)
    return found.view(*mass.shape[:-1], k)


def _until(rows: Tensor, found: Tensor, share: float) -> Tensor:
    """rows [R, K], found [R, k] ascending positions and then -1 -> of these, from the largest entry on, as many as it
    takes to hold `share` of the row; ascending again."""
    k = found.shape[1]
    taken = torch.where(found >= 0, rows.gather(1, found.clamp(min=0).long()), 0.0)
    # A float that is not negative and its bits are in the same order, and with the index no two keys are equal.
    rank = torch.arange(k - 1, -1, -1, device=rows.device)
    order = ((taken.view(torch.int32).long() << 32) | rank).argsort(-1, descending=True)
    falling = taken.gather(1, order)
    keep = falling > 0
    before = falling.cumsum(-1, dtype=torch.float64)[:, :-1]
    keep[:, 1:] &= before < rows.sum(-1, keepdim=True, dtype=torch.float64) * share
    behind = rows.shape[1]
    position = torch.where(keep, found.gather(1, order), behind).sort(-1).values
    return torch.where(position < behind, position, -1)


def _positions(mask: Tensor, k: int) -> Tensor:
    """mask [R, K] bool with at most k entries set in a row -> [R, k] int32, their columns, ascending, then -1."""
    row, chosen = mask.nonzero().unbind(1)
    if len(row) == len(mask) * k:  # k in every row
        return chosen.int().view(len(mask), k)
    count = torch.bincount(row, minlength=len(mask))
    found = torch.full((len(mask), k), -1, dtype=torch.int32)
    found[row, torch.arange(len(row)) - (count.cumsum(0) - count)[row]] = chosen.int()
    return found


def _rows(mass: Tensor) -> Tensor:
    assert mass.dtype == torch.float32
    return mass.contiguous().view(mass.shape[:-1].numel(), mass.shape[-1])


def _rows_at_once(mass: Tensor) -> int:
    return max(1, PIECE // max(1, mass.shape[-1]))
