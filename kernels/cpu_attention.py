"""Attention over keys that lie in one tensor, with its log-sum-exp, and the joining of such parts. For the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor]  # out [B, R, M, D] of some keys, and their lse [B, R, M] float32

CAPPED_SCORES = 1 << 23  # scores written out at once when they are capped


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    visible: Tensor | None = None,
    causal: bool = False,
) -> Part:
    """q [B, R, M, D]; k, v [B, n, D], any strides with unit stride in D: the R * M queries of b read the keys of b.

    visible: bool, [B, M or 1, n], what a query may see, None for everything; causal (for M == n): query m sees the
    keys 0 ... m. Returns out [B, R, M, D] and lse [B, R, M] float32; a query that sees nothing gets 0 and -inf.
    """
    if q.shape[2] == 1:  # one block of R rows is faster than R blocks of one row
        out, lse = _attend(q.transpose(1, 2), k, v, scale, softcap, visible, causal)
        out, lse = out.transpose(1, 2), lse.transpose(1, 2)
    else:
        out, lse = _attend(q, k, v, scale, softcap, visible, causal)
    if visible is None:
        return out, lse
    return out, lse.masked_fill(~visible.any(-1)[:, None], -torch.inf)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, visible: Tensor | None, causal: bool
) -> Part:
    if softcap > 0:
        return _attend_capped(q, k, v, scale, softcap, visible, causal)
    bias = None
    if visible is not None:
        bias = torch.zeros(visible.shape, dtype=torch.float32).masked_fill_(~visible, -torch.inf)[:, None]
    shape = (-1, q.shape[1], -1, -1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.to(k.dtype),
        k[:, None].expand(shape),
        v[:, None].expand(shape),
        dropout_p=0.0,
        is_causal=causal,
        attn_mask=bias,
        scale=scale,
    )
    return out, lse


def _attend_capped(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, visible: Tensor | None, causal: bool
) -> Part:
    """torch's own kernel knows no cap, so the scores are written out, some rows at a time, in float32."""
    batch, ratio, queries, dim = q.shape
    keys, values = k.float().transpose(1, 2), v.float()
    out = torch.empty(batch, ratio, queries, dim)
    lse = torch.empty(batch, ratio, queries)
    block = max(1, CAPPED_SCORES // (batch * ratio * k.shape[1]))
    for begin in range(0, queries, block):
        rows = slice(begin, min(begin + block, queries))
        count = rows.stop - rows.start
        flat = q[:, :, rows].float().reshape(batch, ratio * count, dim)
        scores = torch.bmm(flat, keys).mul_(scale / softcap).tanh_().mul_(softcap).unflatten(1, (ratio, count))
        if causal:
            query = torch.arange(rows.start, rows.stop)[:, None]
            scores.masked_fill_(torch.arange(k.shape[1]) > query, -torch.inf)
        if visible is not None:
            shown = visible if visible.shape[1] == 1 else visible[:, rows]
            scores.masked_fill_(~shown[:, None], -torch.inf)
        total = scores.logsumexp(-1, keepdim=True)
        weights = (scores - total.clamp(min=torch.finfo(torch.float32).min)).exp_()
        out[:, :, rows] = torch.bmm(weights.flatten(1, 2), values).unflatten(1, (ratio, count))
        lse[:, :, rows] = total[..., 0]
    return out, lse


def merge(parts: Sequence[Part], sinks: Tensor | None = None) -> Part:
    """Join what disjoint sets of keys gave to the same queries. sinks [B, R]: a logit without a value for each head.

    At least one part (or the sink) has to hold a visible key for each query.
    """
    if len(parts) == 1 and sinks is None:
        return parts[0]
    logits = [lse for _, lse in parts]
    if sinks is not None:
        logits.append(sinks.float()[..., None].expand_as(logits[0]))
    total = torch.logsumexp(torch.stack(logits), 0)
    out = torch.zeros(parts[0][0].shape)
    for each, lse in parts:
        out.addcmul_(each.float(), (lse - total).exp_()[..., None])
    return out, total
