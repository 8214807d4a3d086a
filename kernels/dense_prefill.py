"""Dense attention of a prompt's chunk by others' kernels: flash-attn's where it is installed, otherwise torch's.

FlashAttention-3 reads the pages where they are. The others read a copy of them side by side: n queries behind p earlier
tokens make n * (p + n) products and copy p + n keys, so the copy is little where n is large.
"""

from enum import StrEnum

import torch
from torch import Tensor

from gossamer.kernels.flash_attention import flash_2, flash_3
from gossamer.kernels.fp8 import dequantise
from gossamer.kernels.layout import BlockRow, PagedKV, QueryBlocks

LEAST_QUERIES = 256


class Way(StrEnum):
    """Whose kernel attends."""

    TORCH = "torch"
    FLASH_2 = "flash-attn 2"
    FLASH_3 = "flash-attn 3"


def faster_way(q: Tensor, kv: PagedKV, chunk: BlockRow, softcap: float = 0.0) -> Way | None:
    """To whom `dense_prefill` should hand over a chunk that reads everything; None: our own kernel keeps it. Others get
    it on a GPU, where they know the type and the head size, where the view has all the layer's heads, and where a copy
    pays: FlashAttention-3 on Hopper, then FlashAttention-2, then torch, which knows no softcap.

    Not measured yet on a GPU: the order is that of published numbers, and LEAST_QUERIES is an estimate. A chunk's
    length, and so the last bits of its result, may depend on what else is in the step, as everywhere in the model on a
    GPU.
    """
    known = q.dtype in (torch.bfloat16, torch.float16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    whole = kv.heads.numel() * kv.ratio == q.shape[1]
    if not (q.is_cuda and known and whole and chunk.count >= LEAST_QUERIES):
        return None
    return next((way for way in ways(q, kv) if way is not Way.TORCH or not softcap), None)


def ways(q: Tensor, kv: PagedKV) -> list[Way]:
    """Those that are there on this device, the fastest first."""
    found = [Way.TORCH]
    if q.is_cuda and flash_2() is not None:
        found.insert(0, Way.FLASH_2)
    if q.is_cuda and kv.k.dtype == q.dtype and flash_3() is not None and _hopper(q.device):
        found.insert(0, Way.FLASH_3)
    return found


def _hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] == 9


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


def dense_prefill(
    q: Tensor,
    kv: PagedKV,
    chunk: BlockRow,
    out: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    way: Way = Way.TORCH,
) -> None:
    """The chunk's queries attend to every key before them and their own, through all heads of the layer, in order.

    q, out [T, H, D]. As paged_prefill with everything selected and no window or sink, and with Way.TORCH no softcap; no
    log-sum-exp. `way` is one of `ways`.
    """
    length, own = chunk.pos + chunk.count, slice(chunk.token, chunk.token + chunk.count)
    physical = kv.table[chunk.seq, : -(-length // kv.page_size)]
    if way is Way.FLASH_3:
        _in_place(q[own], kv, physical, length, out[own], scale, softcap)
        return
    if kv.scale is None:
        k, v = (pool.index_select(1, physical) for pool in (kv.k, kv.v))
    else:
        k, v = (
            dequantise(pool.view(torch.uint8).index_select(1, physical), scale.index_select(1, physical), q.dtype)
            for pool, scale in zip((kv.k, kv.v), kv.scale, strict=True)
        )
    k, v = (copy.flatten(1, 2)[None, :, :length] for copy in (k, v))
    if way is Way.FLASH_2:
        _side_by_side(q[own], k[0], v[0], out[own], scale, softcap)
        return
    assert not softcap
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


def _in_place(q: Tensor, kv: PagedKV, physical: Tensor, length: int, out: Tensor, scale: float, softcap: float) -> None:
    """q, out [n, H, D]; the last query is that of the last of `length` tokens, as flash-attn's causal mask has it."""
    attention = flash_3()
    assert attention is not None
    k, v = (pool.permute(1, 2, 0, 3) for pool in (kv.k, kv.v))
    lengths = torch.full((1,), length, dtype=torch.int32, device=q.device)
    found = attention(
        q[None], k, v, cache_seqlens=lengths, page_table=physical[None],
        softmax_scale=scale, causal=True, softcap=softcap,
    )  # fmt: skip
    out.copy_(found[0])


def _side_by_side(q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, softcap: float) -> None:
    """q, out [n, H, D]; k, v [G, length, D]; otherwise as `_in_place`."""
    attention = flash_2()
    assert attention is not None
    queries, length = q.shape[0], k.shape[1]
    ends = torch.arange(2, dtype=torch.int32, device=q.device)  # of no sequence and of one
    found = attention(
        q, k.transpose(0, 1), v.transpose(0, 1), ends * queries, ends * length, queries, length,
        softmax_scale=scale, causal=True, softcap=softcap,
    )  # fmt: skip
    out.copy_(found)
