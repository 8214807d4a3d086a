"""The passes of score_pages.py with tokens as columns, whose keys are their labels."""

from torch import Tensor

from gossamer.kernels.layout import PagedKV, QueryBlocks
from gossamer.kernels.triton.score_pages import mass


def launch(q: Tensor, kv: PagedKV, blocks: QueryBlocks, labels: Tensor, channels: Tensor, *, scale: float) -> Tensor:
    """As gossamer.kernels.score_tokens.label_mass."""
    strides = (*labels.stride()[:3], 0, 0)
    size, dim = labels.shape[2:]
    return mass(q, kv, blocks, labels, strides, dim=dim, scale=scale, per_page=size, channels=channels.contiguous())
