"""The step that both attention kernels repeat: one tile of keys into a running softmax. Logits are in base 2."""

import torch
import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
# Arguments that differ from step to step and are no strides of vectors: no kernel is compiled again for their values.
VARYING = ("num", "rows", "parts", "tiles", "blocks", "pieces", "chunks", "table_b", "index_g", "token_g")


def factors(scale: float, softcap: float) -> tuple[float, float]:
    """(scale, cap) as `logits` wants them."""
    return (2 * LOG2_E * scale / softcap, LOG2_E * softcap) if softcap > 0 else (LOG2_E * scale, 0.0)


def capability(device: torch.device) -> int:
    """80 for an A100, 90 for an H100; the interpreter plays the latter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


def programs(items: int, per_sm: int, device: torch.device) -> int:
    """How many programs share a list of at most so many items: no more than run at once, `per_sm` to a multiprocessor.
    The interpreter has two of these."""
    chip = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return max(1, min(items, int(chip) * per_sm))


def along_row(width: int, most: int) -> dict[str, int]:
    """How many entries of such a row a program looks at together, at most so many, and over how many warps they lie."""
    columns = min(most, triton.next_power_of_2(width))
    return {"COLUMNS": columns, "num_warps": 16 if columns > 4096 else 8 if columns > 1024 else 4}


def register_limit(per_sm: int, warps: int) -> dict[str, int]:
    """The compiler option that lets so many programs of so many warps share a multiprocessor's 65,536 registers. None
    for one: the most that a thread can have is the limit then."""
    each = 2**16 // (32 * warps * per_sm) // 8 * 8
    return {"maxnreg": each} if per_sm > 1 and each < 255 else {}


@triton.jit
def logits(products, scale, cap, SOFTCAP: tl.constexpr):
    """Products of queries and keys -> logits in base 2."""
    if SOFTCAP:  # tanh by exp: infinity and 0 at the far ends give 1 and -1
        return cap - 2.0 * cap / (tl.exp2(products * scale) + 1.0)
    return products * scale


@triton.jit
def load_rows(ptr, at, there, ROWS: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr):
    """Rows [N, WIDE] that begin at ptr + at [N]; zero where not `there` [N] (when ROWS) and behind DIM."""
    d = tl.arange(0, WIDE)
    ptrs = ptr + at[:, None] + d[None]
    if ROWS and DIM != WIDE:
        return tl.load(ptrs, mask=there[:, None] & (d < DIM)[None], other=0.0)
    if ROWS:
        return tl.load(ptrs, mask=there[:, None], other=0.0)
    if DIM != WIDE:
        return tl.load(ptrs, mask=(d < DIM)[None], other=0.0)
    return tl.load(ptrs)


@triton.jit
def add_keys(
    q, k, v, best, total, acc, visible, scale, cap,
    MASKED: tl.constexpr, SOFTCAP: tl.constexpr, k_scale=None, v_scale=None, SCALED: tl.constexpr = False,
):  # fmt: skip
    """q [M, D]; k, v [N, D]; best, total [M]; acc [M, D]; visible [M or 1, N] when MASKED; k_scale, v_scale [N], which
    keys and values are to be multiplied by, when SCALED."""
    products = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SCALED:
        products *= k_scale[None]
    scores = logits(products, scale, cap, SOFTCAP)
    if MASKED:
        scores = tl.where(visible, scores, -float("inf"))
    top = tl.maximum(best, tl.max(scores, 1))
    shift = top
    if MASKED:  # a row that has seen nothing yet has no maximum to subtract
        shift = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp2(scores - shift[:, None])
    decay = tl.exp2(best - shift)
    total = total * decay + tl.sum(weight, 1)
    if SCALED:
        weight *= v_scale[None]
    acc = tl.dot(weight.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return top, total, acc


@triton.jit
def add_sink(best, total, sink):
    """The softmax's extra logit `sink` [M], natural -> best, total, and the factor for what was summed before."""
    sink = sink.to(tl.float32) * 1.4426950408889634
    top = tl.maximum(best, sink)
    decay = tl.exp2(best - top)
    return top, total * decay + tl.exp2(sink - top), decay
