"""How much of a query block's attention each past token would get, judged by a few channels of its key."""

from dataclasses import dataclass

from torch import Tensor

from gossamer.kernels.cpu_scores import mass_torch
from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.native import reads


def label_mass(
    q: Tensor, kv: PagedKV, blocks: QueryBlocks, labels: Tensor, channels: Tensor, *, scale: float
) -> Tensor:
    """Mass, as in score_pages but of the tokens of past pages, by labels: what a token's key holds in the channels of
    its head. logit = scale * sum_j q[channels[g, j]] * label_j; a channel of -1 does not count.

    q [T, H, D], labels [G, P, S, r] (any strides, unit in D and r), channels [G, r] int32 -> [G, N, L * S] float32.
    """
    if q.is_cuda:
        from gossamer.kernels.triton.score_tokens import launch

        return launch(q, kv, blocks, labels, channels, scale=scale)
    if reads(labels, labels.shape[3], q.shape[2]) and blocks.single:
        from gossamer.kernels.native.scores import launch as launch_on_cpu

        return launch_on_cpu(q, kv, blocks, labels, columns=labels.shape[2], channels=channels, scale=scale)
    return label_mass_torch(q, kv, blocks, labels, channels, scale=scale)


def label_mass_torch(
    q: Tensor, kv: PagedKV, blocks: QueryBlocks, labels: Tensor, channels: Tensor, *, scale: float
) -> Tensor:
    """What label_mass means; also how the CPU runs it for prompts."""
    return mass_torch(q, kv, blocks, _Labels(labels, channels.long()), scale=scale)


@dataclass(frozen=True, slots=True)
class _Labels:
    table: Tensor  # [G, P, S, r]
    channels: Tensor  # [G, r] int64

    @property
    def per_page(self) -> int:
        return self.table.shape[2]

    def keys(self, own: slice, known: Tensor) -> Tensor:
        labels, none = known.float().flatten(1, 2), self.channels[own, None] < 0
        return (labels.masked_fill(none, 0.0) if bool(none.any()) else labels)[:, None]

    def queries(self, own: slice, q: Tensor) -> Tensor:
        channels = self.channels[own, None].expand(-1, q.shape[1], -1)
        return q.gather(2, channels.clamp_min(0))
