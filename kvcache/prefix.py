"""Reuse of computed prefixes: the hash chain of a sequence, the index of one pool, and the search for a reuse point."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from gossamer.kernels.layout import NULL_PAGE
from gossamer.kvcache.retention import Retention

_STRIDE = 256  # pages hashed per conversion of tokens to bytes, so that a search that ends early hashes little


class HashChain:
    """One key per full page of a sequence: SHA-256 over the previous key and the page's tokens.

    The first key hangs on the salt, so chains with different salts share no key. Keys are computed once and only as
    far as asked; they depend on nothing but salt and tokens, so they stay valid when the sequence loses its pages.
    """

    __slots__ = ("_page_size", "_seed", "keys")

    def __init__(self, salt: bytes, page_size: int) -> None:
        # The two prefixes keep a salt that spells a page from being one.
        self._seed = hashlib.sha256(b"salt" + salt).digest()
        self._page_size = page_size
        self.keys: list[bytes] = []

    def extend(self, tokens: Sequence[int], num_pages: int) -> list[bytes]:
        """The chain's keys, at least `num_pages` of them. `tokens` are the sequence's tokens from its first on; those
        of pages whose keys are known are not read again."""
        keys, size = self.keys, self._page_size
        while len(keys) < num_pages:
            first, last = len(keys), min(num_pages, len(keys) + _STRIDE)
            packed = memoryview(np.asarray(tokens[first * size : last * size], dtype="<i4").tobytes())
            assert len(packed) == (last - first) * size * 4, "a page is hashed only when all its tokens are known"
            key = keys[-1] if keys else self._seed
            for page in range(last - first):
                digest = hashlib.sha256(b"page" + key)
                digest.update(packed[page * size * 4 : (page + 1) * size * 4])
                key = digest.digest()
                keys.append(key)
        return keys


class PrefixIndex:
    """Which page of one pool holds the tokens that a key stands for. A key names one page, a page has one key."""

    __slots__ = ("_key_of", "_page_of")

    def __init__(self) -> None:
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._page_of)

    def __contains__(self, page: int) -> bool:
        return page in self._key_of

    def __iter__(self) -> Iterator[tuple[bytes, int]]:
        return iter(self._page_of.items())

    def find(self, key: bytes) -> int:
        """The physical page of a key, or NULL_PAGE."""
        return self._page_of.get(key, NULL_PAGE)

    def key(self, page: int) -> bytes | None:
        return self._key_of.get(page)

    def enter(self, key: bytes, page: int) -> bool:
        """Make a full page findable. False when the key already has a page, which then stays."""
        if key in self._page_of:
            return False
        assert page not in self._key_of, f"page {page} is entered under a second key"
        self._page_of[key] = page
        self._key_of[page] = key
        return True

    def forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]

    def clear(self) -> None:
        self._page_of.clear()
        self._key_of.clear()


def reusable_pages(
    chain: HashChain,
    tokens: Sequence[int],
    limit: int,
    indexes: Sequence[PrefixIndex],
    rules: Sequence[Retention],
    page_size: int,
) -> int:
    """The largest m <= limit // page_size such that a sequence can go on at position m * page_size: for each group,
    every page below m that its rule has not released at that position is in its index.

    Linear in the number of pages: pages from the start are looked up until the first miss, and the tails, which differ
    from m to m, are searched downwards without looking at a page of a group twice.
    """
    most = limit // page_size
    known = [most] * len(rules)  # per group: its pages known[g] ... most - 1 are present
    for group, (index, rule) in enumerate(zip(indexes, rules, strict=True)):
        released = rule.released(most * page_size, page_size)
        head = min(most, released.start) if released else most  # pages kept from the start, whatever m <= most
        for page in range(head):
            if page == len(chain.keys):
                chain.extend(tokens, min(most, page + _STRIDE))
            if index.find(chain.keys[page]) == NULL_PAGE:
                most = page
                break
        known[group] = most if released else 0
    keys = chain.extend(tokens, most)
    group = settled = 0
    while most and settled < len(rules):
        stop = rules[group].released(most * page_size, page_size).stop
        known[group] = min(known[group], most)
        while known[group] > stop:
            if indexes[group].find(keys[known[group] - 1]) == NULL_PAGE:
                # The tail of a shorter prefix begins no later, so no prefix that ends above the hole can do without it.
                most, settled = known[group] - 1, 0
                break
            known[group] -= 1
        else:
            settled += 1
            group = (group + 1) % len(rules)
    return most
