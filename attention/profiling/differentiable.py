"""Causal attention of a whole text with gradients, in memory that grows with the text and not with its square.

Full, or over the first tokens and the most recent ones, exact to the token. q [H, T, D], k and v [G, T, D], after RoPE;
query head h reads KV head h * G // H. Logits are scale * q . k, then softcap * tanh(logits / softcap) where there is a
softcap; `sinks` [H] is one more logit per query head, which has no value. All return [H, T, D].
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

MOST_LOGITS = 2**27  # computed at once where torch has no kernel: with a softcap or sinks


@dataclass(frozen=True, slots=True)
class Logits:
    """How a family makes weights of products: what its layers hand to their attention function."""

    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def plain(self) -> bool:
        """Whether torch's own kernels can do it."""
        return not self.softcap and self.sinks is None


def full_attention(q: Tensor, k: Tensor, v: Tensor, logits: Logits) -> Tensor:
    """Every query reads all keys up to its own."""
    heads, length = q.shape[:2]
    if logits.plain:
        # grouped heads are repeated here: not every kernel takes them, and without one torch makes the whole matrix
        k, v = (x.repeat_interleave(heads // x.shape[0], 0) for x in (k, v))
        out = scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, scale=logits.scale)
        return out[0]
    rows = max(1, min(length, MOST_LOGITS // (heads * length)))
    parts = []
    for first in range(0, length, rows):
        last = min(first + rows, length)
        place = torch.arange(last, device=q.device)
        seen = place <= place[first:, None]
        parts.append(_once(q[None, :, first:last], k[None, :, :last], v[None, :, :last], seen[None], logits)[0])
    return torch.cat(parts, 1)


def streaming_attention(q: Tensor, k: Tensor, v: Tensor, logits: Logits, *, sink: int, recent: int) -> Tensor:
    """A query at p reads the keys j <= p with j < sink or j > p - recent (KeepSinkRecent's meaning).

    Queries go in N tiles of `recent`, each against the sink, the tile before and its own.
    """
    length = q.shape[1]
    if length <= sink + recent:
        return full_attention(q, k, v, logits)
    tail = -length % recent
    q, k, v = (pad(x, (0, 0, 0, tail)).unflatten(1, (-1, recent)).transpose(0, 1) for x in (q, k, v))  # [N, *, R, D]
    k, v = (torch.cat([_sink(x, sink), x.roll(1, 0), x], 2) for x in (k, v))
    seen = _seen(q.shape[0], sink, recent, q.device)
    if logits.plain:
        out = _packed(q, k, v, seen, logits.scale)
    else:
        tiles = max(1, MOST_LOGITS // (q.shape[1] * recent * seen.shape[2]))
        cuts = [slice(first, first + tiles) for first in range(0, q.shape[0], tiles)]
        out = torch.cat([_once(q[own], k[own], v[own], seen[own], logits) for own in cuts])
    return out.transpose(0, 1).flatten(1, 2)[:, :length]


def _sink(x: Tensor, sink: int) -> Tensor:
    """The first `sink` tokens of [N, G, R, D], before every tile: [N, G, sink, D]."""
    return x.transpose(0, 1).flatten(1, 2)[:, :sink].expand(x.shape[0], -1, -1, -1)


def _seen(tiles: int, sink: int, recent: int, device: torch.device) -> Tensor:
    """[N, R, sink + 2 R] bool. A key of the sink that also stands in a tile or the one before is read there."""
    begin = torch.arange(tiles, device=device)[:, None] * recent
    row, first = torch.arange(recent, device=device), torch.arange(sink, device=device)
    near = torch.cat([begin - recent + row, begin + row], 1)[:, None]  # [N, 1, 2 R]
    query = (begin + row)[:, :, None]
    close = (near >= 0) & (near <= query) & ((near > query - recent) | (near < sink))
    far = (first < begin - recent)[:, None].expand(-1, recent, -1)
    return torch.cat([far, close], 2)


def _packed(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Tiles [N, H, R, D] through torch's kernels; the queries of a KV head's group stand below each other, since
    the kernels that take a mask take no grouped heads."""
    ratio = q.shape[1] // k.shape[1]
    rows = q.unflatten(1, (-1, ratio)).flatten(2, 3)
    out = scaled_dot_product_attention(rows, k, v, attn_mask=seen.repeat(1, ratio, 1)[:, None], scale=scale)
    found: Tensor = out.unflatten(2, (ratio, -1)).flatten(1, 2)
    return found


def _once(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, logits: Logits) -> Tensor:
    """`_softmax`, whose weights are computed again when the gradient is wanted."""
    out: Tensor = checkpoint(_softmax, q, k, v, seen, logits, use_reentrant=False, preserve_rng_state=False)
    return out


def _softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, logits: Logits) -> Tensor:
    """q [N, H, R, D], k and v [N, G, K, D], seen [N, R, K]: softmax attention by its formula."""
    wide = torch.promote_types(q.dtype, torch.float32)
    ratio = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(ratio, 1) for x in (k, v))
    scores = (q @ k.transpose(2, 3)).to(wide) * logits.scale
    if logits.softcap:
        scores = logits.softcap * torch.tanh(scores / logits.softcap)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if logits.sinks is not None:
        more = logits.sinks.to(wide)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, more], -1)
    out: Tensor = scores.softmax(-1)[..., : k.shape[2]].to(v.dtype) @ v
    return out
