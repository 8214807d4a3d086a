"""Dense attention of a prompt's chunk by torch's flash attention, over a copy of its pages side by side.

n queries behind p earlier tokens make n * (p + n) products and copy p + n keys: the copy is little where n is large.
"""

import torch
from torch import Tensor

from gossamer.kernels.fp8 import dequantise
from gossamer.kernels.layout import BlockRow, PagedKV, QueryBlocks

LEAST_QUERIES = 256


def torch_is_faster(q: Tensor, kv: PagedKV, chunk: BlockRow) -> bool:
    """Whether to hand a chunk that reads everything over to `dense_prefill`: on a GPU, where flash attention knows the
    type and the head size, where the view has all the layer's heads, and where the copy pays.

    Not measured yet on a GPU; LEAST_QUERIES is an estimate. A chunk's length, and so the last bits of its result, may
    depend on what else is in the step, as everywhere in the model on a GPU.
    """
    known = q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    return q.is_cuda and known and kv.heads.numel() * kv.ratio == q.shape[1] and chunk.count >= LEAST_QUERIES


def chunks(blocks: QueryBlocks) -> list[tuple[BlockRow, list[int]]]:
    """Neighbouring tiles of one sequence as a chunk, and which tiles these are."""
    found: list[tuple[BlockRow, list[int]]] = []
    first = 0
    for n, row in enumerate(blocks.rows):
        following = blocks.rows[n + 1] if n + 1 < len(blocks) else None
        if following is None or following.seq != row.seq or following.pos != row.pos + row.count:
            start = blocks.rows[first]
            found.append((start._replace(count=row.pos + row.count - start.pos), list(range(first, n + 1))))
            first = n + 1
    return found


def dense_prefill(q: Tensor, kv: PagedKV, chunk: BlockRow, out: Tensor, *, scale: float) -> None:
    """The chunk's queries attend to every key before them and their own, through all heads of the layer, in order.

    q, out [T, H, D]. As paged_prefill with everything selected and no window, softcap or sink; no log-sum-exp.
    """
    length, own = chunk.pos + chunk.count, slice(chunk.token, chunk.token + chunk.count)
    physical = kv.table[chunk.seq, : -(-length // kv.page_size)]
    if kv.scale is None:
        k, v = (pool.index_select(1, physical) for pool in (kv.k, kv.v))
    else:
        k, v = (
            dequantise(pool.view(torch.uint8).index_select(1, physical), scale.index_select(1, physical), q.dtype)
            for pool, scale in zip((kv.k, kv.v), kv.scale, strict=True)
        )
    k, v = (copy.flatten(1, 2)[None, :, :length] for copy in (k, v))
    side = q[own].transpose(0, 1)[None]
    if q.is_cuda:
        # The public function would read is_causal from the first key on, not to the last, and ask cuDNN, which builds
        # a plan for each new length. Flash attention takes grouped heads as they are.
        found = torch.ops.aten._scaled_dot_product_flash_attention(side, k, v, 0.0, True, scale=scale)[0]
    else:
        query, key = torch.arange(chunk.pos, length)[:, None], torch.arange(length)
        found = torch.nn.functional.scaled_dot_product_attention(
            side, k, v, attn_mask=key <= query, scale=scale, enable_gqa=True
        )
    out[own] = found[0].transpose(0, 1)
