"""Dense attention of a prompt's chunk by torch's own fused kernels, over a copy of its pages side by side.

n queries behind p earlier tokens make n * (p + n) products and copy p + n keys: the copy is little where n is large.
"""

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from gossamer.kernels.layout import BlockRow, PagedKV, QueryBlocks

LEAST_QUERIES = 256


def torch_is_faster(q: Tensor, kv: PagedKV, chunk: BlockRow) -> bool:
    """Whether to hand a chunk that reads everything over to `dense_prefill`: on a GPU, where flash attention knows the
    type and the head size, where the view has all the layer's heads, and where the copy pays.

    Not measured yet on a GPU; LEAST_QUERIES is an estimate.
    """
    known = q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    return q.is_cuda and known and kv.heads.numel() * kv.ratio == q.shape[1] and chunk.count >= LEAST_QUERIES


def chunks(blocks: QueryBlocks) -> list[tuple[BlockRow, list[int]]]:
    """The tiles of each sequence as one chunk, and which tiles these are."""
    found: list[tuple[BlockRow, list[int]]] = []
    for n, row in enumerate(blocks.rows):
        if found and found[-1][0].seq == row.seq:
            chunk, tiles = found[-1]
            tiles.append(n)
            found[-1] = (chunk._replace(count=chunk.count + row.count), tiles)
        else:
            found.append((row, [n]))
    return found


def dense_prefill(q: Tensor, kv: PagedKV, chunk: BlockRow, out: Tensor, *, scale: float) -> None:
    """The chunk's queries attend to every key before them and their own, through all heads of the layer.

    q, out [T, H, D]. As paged_prefill with everything selected and no window, softcap or sink; no log-sum-exp.
    """
    length, own = chunk.pos + chunk.count, slice(chunk.token, chunk.token + chunk.count)
    physical = kv.table[chunk.seq, : -(-length // kv.page_size)]
    k, v = (pool.index_select(1, physical).flatten(1, 2)[None, :, :length] for pool in (kv.k, kv.v))
    found = torch.nn.functional.scaled_dot_product_attention(
        q[own].transpose(0, 1)[None],
        k,
        v,
        attn_mask=causal_lower_right(chunk.count, length),
        scale=scale,
        enable_gqa=kv.ratio > 1,
    )
    out[own] = found[0].transpose(0, 1)
