"""From memory to pages: how many pages each group of heads gets."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from gossamer.kernels.fp8 import FP8, SCALE
from gossamer.kernels.layout import PAGE_SIZE, UNLIMITED
from gossamer.kvcache.groups import HeadGroup
from gossamer.kvcache.retention import Retention

# A group that releases its pages gets, beyond what running sequences can hold, one page for this many tokens' pages of
# the groups that keep all: the windows at which cached prefixes can be continued.
_PAGES_PER_CACHED_PAGE = 16


@dataclass(frozen=True, slots=True)
class Sizing:
    """num_pages: pages per group. token_capacity: tokens that running sequences can hold together at every operating
    point, where their lengths are whole pages; never less than one sequence of the maximum model length."""

    num_pages: tuple[int, ...]
    token_capacity: int


def bytes_per_page(
    group: HeadGroup,
    head_dim: int,
    dtype: torch.dtype,
    summaries: Mapping[str, tuple[int, ...]],
    page_size: int = PAGE_SIZE,
    *,
    fp8: bool = False,
) -> int:
    """Bytes of keys, values and summaries (by name, the shape for one head) in one page of a group: its heads of all
    layers. With `fp8`, keys and values take a byte a number, and a scale each."""
    token = head_dim * FP8.itemsize + SCALE.itemsize if fp8 else head_dim * dtype.itemsize
    known = sum(prod(shape) for shape in summaries.values()) * dtype.itemsize
    return group.num_heads * (2 * page_size * token + known)


def longest_sequence(
    bytes_available: int,
    rules: Sequence[Sequence[Retention]],
    page_bytes: Sequence[int],
    max_model_len: int,
    max_step_tokens: int,
    page_size: int = PAGE_SIZE,
) -> int:
    """The longest sequence, up to max_model_len tokens, that fits alone at each operating point. Arguments as for
    `size_pools`; 0 when nothing fits."""

    def needed(length: int) -> int:
        return _bytes(_alone(rules, length, max_step_tokens, page_size), page_bytes)

    if needed(max_model_len) <= bytes_available:
        return max_model_len
    pages = (
        bisect_right(range(max_model_len // page_size + 1), bytes_available, key=lambda n: needed(n * page_size)) - 1
    )
    return max(pages, 0) * page_size


def size_pools(
    bytes_available: int,
    groups: Sequence[HeadGroup],
    rules: Sequence[Sequence[Retention]],
    page_bytes: Sequence[int],
    max_num_seqs: int,
    max_model_len: int,
    max_step_tokens: int,
    page_size: int = PAGE_SIZE,
) -> Sizing:
    """Divide `bytes_available` among the pools of `groups`.

    rules[point][group]: the retention rule of each group at each operating point; a pool must serve all points.
    page_bytes: per group. max_num_seqs, max_step_tokens: sequences and tokens of a step. max_model_len: tokens.

    A group whose rule keeps all at some point grows with the tokens served. One that always releases needs no more than
    what max_num_seqs sequences keep, and gets a share on top for cached prefixes. Raises ValueError, one sentence, when
    one sequence of max_model_len does not fit.
    """
    assert groups
    assert len(groups) == len(page_bytes)
    assert all(len(point) == len(groups) for point in rules)
    least = _alone(rules, max_model_len, max_step_tokens, page_size)
    if _bytes(least, page_bytes) > bytes_available:
        needed = _bytes(least, page_bytes)
        longest = longest_sequence(bytes_available, rules, page_bytes, max_model_len, max_step_tokens, page_size)
        raise ValueError(
            f"One sequence of {max_model_len} tokens, the maximum model length, needs {_size(needed)} of KV cache and "
            f"{_size(bytes_available)} is available: lower the maximum to {longest} tokens or less, or give the KV "
            "cache more memory."
        )
    bounds = [
        _bound([point[g] for point in rules], max_num_seqs, max_step_tokens, page_size) for g in range(len(groups))
    ]

    def pages_for(pages: int) -> list[int]:
        return [
            max(low, pages if bound is None else min(pages, bound + -(-pages // _PAGES_PER_CACHED_PAGE)))
            for low, bound in zip(least, bounds, strict=True)
        ]

    # Each group gets at least one page in `_PAGES_PER_CACHED_PAGE`, so this many pages are always too many.
    too_many = _PAGES_PER_CACHED_PAGE * (bytes_available // sum(page_bytes) + 1)
    pages = bisect_right(range(too_many), bytes_available, key=lambda n: _bytes(pages_for(n), page_bytes)) - 1
    running = max_num_seqs * max_model_len
    tokens = max(pages, -(-max_model_len // page_size)) * page_size
    return Sizing(tuple(pages_for(pages)), tokens if None in bounds else min(tokens, running))


def _alone(rules: Sequence[Sequence[Retention]], length: int, step_tokens: int, page_size: int) -> list[int]:
    """Per group, the pages of one sequence of `length` tokens at the point that needs most."""
    return [
        max(rule.most_pages(length, step_tokens, page_size) for rule in column) for column in zip(*rules, strict=True)
    ]


def _bound(rules: Sequence[Retention], max_num_seqs: int, max_step_tokens: int, page_size: int) -> int | None:
    """The pages that `max_num_seqs` sequences of any length hold at most, or None when that depends on their lengths.

    The tokens of a step are shared by its sequences: beyond its first, each adds its own share and one broken page.
    """
    each = 0
    for rule in rules:
        if rule.window >= UNLIMITED:
            return None
        each = max(each, rule.most_pages(UNLIMITED, 1, page_size) + 1)
    return max_num_seqs * each + -(-max_step_tokens // page_size)


def _bytes(pages: Sequence[int], page_bytes: Sequence[int]) -> int:
    return sum(count * size for count, size in zip(pages, page_bytes, strict=True))


def _size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**28 else f"{count / 2**20:.1f} MiB"
