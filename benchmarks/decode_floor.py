"""What torch's own calls on a CPU reach when generated tokens read few pages, for benchmarks/sparse_attention.py.

The least that a backend has to do, on the same cache but without us: no rules for windows, no shared launches, no head
that differs from another. "copied": pages in given places are copied side by side, since torch's fused attention reads
rows at one stride, and attended to in one call. "chosen": pages are scored by their mean keys first, and the best are
taken. "labelled": single tokens are, by a few channels of their keys.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gossamer.kernels.layout import PAGE_SIZE, PagedKV
from gossamer.kvcache.summaries import Labels, MeanKeys


class Floor:
    """Sequences of one length; `tokens` keys are read for each."""

    def __init__(self, q: Tensor, kv: PagedKV, length: int, tokens: int, labels: Labels) -> None:
        """q [B, H, D]"""
        groups, held = kv.k.shape[:2]
        self.q = q.unflatten(1, (groups, -1)).transpose(0, 1)  # [G, B, ratio, D]
        self.pools = [pool.view(groups * held, -1) for pool in (kv.k, kv.v)]
        physical = kv.table[:, : length // PAGE_SIZE].long()
        self.page = torch.arange(groups)[:, None, None] * held + physical  # [G, B, L / S], counted over G * P
        self.means = kv.summaries[MeanKeys().name].flatten(0, 1)[self.page]  # [G, B, L / S, D]
        known = kv.summaries[labels.name].flatten(0, 1)[self.page]  # [G, B, L / S, S, r]
        self.labels = known.flatten(2, 3).contiguous()
        channels = labels.of(kv).long()[:, None, None].expand(-1, *self.q.shape[1:3], -1)
        self.few = self.q.gather(3, channels)  # [G, B, ratio, r]
        self.pages, self.step = tokens // PAGE_SIZE, length // tokens
        self.room = torch.empty(2, *self.q.shape[:2], tokens, q.shape[2], dtype=q.dtype)
        self.round = 0

    def contestants(self) -> Mapping[str, Callable[[], None]]:
        return {"copied": self.copied, "chosen": self.chosen, "labelled": self.labelled}

    def size(self, name: str) -> int:
        """Bytes that a contestant has to read."""
        looked_at = {"copied": (), "chosen": (self.means,), "labelled": (self.labels,)}[name]
        return sum(each.numel() * each.element_size() for each in (self.room, *looked_at))

    def copied(self) -> None:
        """In other places each round, as nothing that was just read lies in a core's cache."""
        places = torch.arange(self.pages) * self.step + self.round * 7 % self.step
        self._attend(self.page[:, :, places])

    def chosen(self) -> None:
        scores = (self.q @ self.means.transpose(2, 3)).amax(2)
        self._attend(self.page.gather(2, scores.topk(self.pages, sorted=False).indices))

    def labelled(self) -> None:
        scores = (self.few @ self.labels.transpose(2, 3)).amax(2)
        token = scores.topk(self.pages * PAGE_SIZE, sorted=False).indices
        self._attend(self.page.gather(2, token // PAGE_SIZE) * PAGE_SIZE + token % PAGE_SIZE, PAGE_SIZE)

    def _attend(self, place: Tensor, parts: int = 1) -> None:
        """place: pages counted over G * P, or what lies in one of so many parts of them."""
        at = place.flatten()
        for pool, room in zip(self.pools, self.room, strict=True):
            torch.index_select(pool.view(len(pool) * parts, -1), 0, at, out=room.view(len(at), -1))
        op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        op(self.q, *self.room, scale=self.q.shape[-1] ** -0.5)
