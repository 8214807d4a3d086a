"""Attention that makes a long training step cheap: most rows look nearby, the rows that matter look everywhere.

In a document of 32K tokens only the questions, their answers and the facts have anything to find far away. Here every
row attends to its own chunk, the chunk before and the first token; the rows named in `events` attend causally to all
keys. Without `events` it is plain causal attention, which is also what the model is evaluated and served with. Rows
appended to a cached document attend to all of it, and gradients stop at the cached keys and values. Rows of different
`blocks` do not see each other, save for block 0, which all see: several questions, each asked alone, in one pass.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "events"
CHUNK = 128


def attend(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: None,
    scaling: float,
    events: Tensor | None = None,
    blocks: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """q [B, H, T, d], k and v [B, G, T, d], events [B, E] ascending or None, blocks [B, T] or None -> [B, T, H, d]."""
    if q.shape[2] < k.shape[2]:
        return _appended(q, k, v, scaling, blocks), None
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    if blocks is not None:
        seen = ((blocks[:, :, None] == blocks[:, None]) | (blocks[:, None] == 0)).tril()
        out = scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=scaling)
    elif events is None:
        out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    else:
        out = _everywhere(_nearby(q, k, v, scaling), q, k, v, events, scaling)
    return out.transpose(1, 2), None


def _nearby(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """Rows attend to their chunk, the chunk before and token 0. All [B, H, T, d]."""
    batch, heads, length, width = q.shape
    count = -(-length // CHUNK)
    tail = count * CHUNK - length
    q, k, v = (pad(x, (0, 0, 0, tail)) for x in (q, k, v))

    def windows(x: Tensor) -> Tensor:  # [B * H, count, 1 + 2 * CHUNK, d]
        own = x.reshape(batch * heads, count, CHUNK, width)
        before = torch.cat([own[:, -1:], own[:, :-1]], 1)
        return torch.cat([own[:, :1, :1].expand(-1, count, -1, -1), before, own], 2)

    row, key = torch.arange(CHUNK, device=q.device)[:, None], torch.arange(1 + 2 * CHUNK, device=q.device)[None]
    seen = (key <= row + 1 + CHUNK).expand(count, -1, -1).clone()
    seen[0, :, : 1 + CHUNK] = False  # nothing stands before the first chunk,
    seen[1:2, :, 0] = False  # and token 0 stands within the window of the second
    rows = q.reshape(batch * heads, count, CHUNK, width)
    return scaled_dot_product_attention(rows, windows(k), windows(v), attn_mask=seen, scale=scaling).view_as(q)[
        :, :, :length
    ]


def _everywhere(out: Tensor, q: Tensor, k: Tensor, v: Tensor, events: Tensor, scaling: float) -> Tensor:
    """`out` with the rows in `events` [B, E] replaced by causal attention to all keys."""
    index = events[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    seen = torch.arange(k.shape[2], device=q.device) <= events[:, None, :, None]  # [B, 1, E, T]
    rows = scaled_dot_product_attention(q.gather(2, index), k, v, attn_mask=seen, scale=scaling)
    return out.scatter(2, index, rows)


def _appended(q: Tensor, k: Tensor, v: Tensor, scaling: float, blocks: Tensor | None) -> Tensor:
    """q [B, H, E, d] behind C cached tokens, k and v [B, G, C + E, d], blocks [B, E] -> [B, E, H, d]."""
    batch, heads, rows, width = q.shape
    groups, cached = k.shape[1], k.shape[2] - rows
    packed = q.reshape(batch, groups, -1, width) * scaling
    old = packed @ k[:, :, :cached].detach().transpose(2, 3)
    new = (packed @ k[:, :, cached:].transpose(2, 3)).view(batch, groups, -1, rows, rows)
    hidden = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1)[None]
    if blocks is not None:
        hidden = hidden | (blocks[:, :, None] != blocks[:, None])
    new = new.masked_fill(hidden[:, None, None], float("-inf")).view(batch, groups, -1, rows)
    weights = torch.cat([old, new], -1).softmax(-1)
    out = weights[..., :cached] @ v[:, :, :cached].detach() + weights[..., cached:] @ v[:, :, cached:]
    return out.view(batch, heads, rows, width).transpose(1, 2)


def register() -> None:
    """Make `attn_implementation="events"` known to transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
