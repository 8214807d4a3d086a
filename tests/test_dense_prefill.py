"""Chunks that read everything, handed over to others' kernels: to whom, and that these are told the right thing.

flash-attn is not installed here. Modules of its names stand for it, which keep to what its documentation says of the
calls, in float64: the causal mask is aligned to the last key, K and V have fewer heads, pages come from a table.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from kernel_cases import Case, make_case, reference
from torch import Tensor

from gossamer.attention.selectors.budget import Budget
from gossamer.kernels import flash_attention
from gossamer.kernels.dense_prefill import Way, chunks, dense_prefill, faster_way, ways
from gossamer.server.bench.kernel_contestants import Contest
from gossamer.server.bench.layer import Layer, Shape
from gossamer.server.bench.peers import sdpa

CALLS = (flash_attention.flash_2, flash_attention.flash_3, flash_attention.side_by_side)


def bottom_right(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, softcap: float) -> Tensor:
    """q [n, H, D], k and v [m, G, D] -> [n, H, D]"""
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    n, m, ratio = q.shape[0], k.shape[0], q.shape[1] // k.shape[1]
    keys, values = (x.double().repeat_interleave(ratio, 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->hnm", q.double(), keys) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        hidden = torch.arange(m) > torch.arange(n)[:, None] + m - n
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.einsum("hnm,mhd->nhd", scores.softmax(-1), values).to(q.dtype)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple[int, int] = (-1, -1), softcap: float = 0.0, alibi_slopes: Tensor | None = None,
    deterministic: bool = False, return_attn_probs: bool = False, block_table: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """FlashAttention-2's."""
    assert dropout_p == 0 and window_size == (-1, -1) and block_table is None and softmax_scale is not None
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and len(cu_seqlens_q) == len(cu_seqlens_k)
    out = torch.full_like(q, torch.nan)
    ends = [x.tolist() for x in (cu_seqlens_q, cu_seqlens_k)]
    assert (ends[0][-1], ends[1][-1]) == (q.shape[0], k.shape[0]) == (max_seqlen_q, max_seqlen_k)
    for b in range(len(cu_seqlens_q) - 1):
        mine, keys = (slice(end[b], end[b + 1]) for end in ends)
        out[mine] = bottom_right(q[mine], k[keys], v[keys], softmax_scale, causal, softcap)
    return out


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, page_table: Tensor,
    softmax_scale: float, causal: bool = False, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """FlashAttention-3's, with the arguments that concern reading a paged cache."""
    assert cache_seqlens.dtype == page_table.dtype == torch.int32
    assert cache_seqlens.shape == (q.shape[0],) and page_table.shape[0] == q.shape[0] and page_table.stride(-1) == 1
    assert k_cache.shape == v_cache.shape and k_cache.dtype == q.dtype
    found = []
    for b, length in enumerate(cache_seqlens.tolist()):
        used = page_table[b, : -(-length // k_cache.shape[1])].tolist()
        assert min(used) >= 0
        k, v = (cache[used].flatten(0, 1)[:length] for cache in (k_cache, v_cache))
        found.append(bottom_right(q[b], k, v, softmax_scale, causal, softcap))
    return torch.stack(found)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    for call in CALLS:
        call.cache_clear()
    yield
    for call in CALLS:
        call.cache_clear()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    second, third = ModuleType("flash_attn"), ModuleType("flash_attn_interface")
    second.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    third.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", second)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", third)


def on_gpu(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, 0))


SPANS = [(130, 70), (0, 65), (1000, 3), (63, 1)]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("way", Way)
@pytest.mark.parametrize("ratio", [1, 4])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_whoever_attends_gives_the_same(way: Way, ratio: int, softcap: float) -> None:
    if way is Way.TORCH and softcap:
        return
    case = replace(make_case(SPANS, ratio=ratio, dim=32, heads=(0, 1, 2)), scale=0.3)
    out, _ = case.blank()
    for chunk, tiles in chunks(case.blocks):
        assert tiles
        dense_prefill(case.q, case.kv, chunk, out, scale=case.scale, softcap=softcap, way=way)
    expected, _ = reference(case, softcap)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5, equal_nan=True)


def large(dtype: torch.dtype = torch.float16, **options: int) -> Case:
    return make_case([(0, 300)], dtype=dtype, **options)


@pytest.mark.usefixtures("installed")
def test_who_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    case, plain = large(), large(torch.float32)
    ((chunk, _),) = chunks(case.blocks)
    assert faster_way(case.q, case.kv, chunk) is None and ways(case.q, case.kv) == [Way.TORCH]  # on a CPU
    on_gpu(monkeypatch, 9)
    assert faster_way(case.q, case.kv, chunk) is faster_way(case.q, case.kv, chunk, 3.0) is Way.FLASH_3
    assert ways(case.q, case.kv) == [Way.FLASH_3, Way.FLASH_2, Way.TORCH]
    assert ways(case.q.bfloat16(), case.kv) == [Way.FLASH_2, Way.TORCH]  # the cache has another type
    assert faster_way(case.q, case.kv, chunk._replace(count=255)) is None
    assert faster_way(case.q, case.kv.only(slice(1)), chunk) is None
    assert faster_way(plain.q, plain.kv, chunk) is None
    for dim in (36, 264):
        odd = large(dim=dim)
        assert faster_way(odd.q, odd.kv, chunk) is None
    on_gpu(monkeypatch, 8)
    assert faster_way(case.q, case.kv, chunk) is Way.FLASH_2
    on_gpu(monkeypatch, 10)
    assert faster_way(case.q, case.kv, chunk, 3.0) is Way.FLASH_2


def test_without_flash_attn_it_is_torch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [])
    on_gpu(monkeypatch, 9)
    case = large()
    ((chunk, _),) = chunks(case.blocks)
    assert faster_way(case.q, case.kv, chunk) is Way.TORCH and faster_way(case.q, case.kv, chunk, 3.0) is None
    assert not caplog.records


def test_a_package_that_cannot_be_used_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))  # without the function
    on_gpu(monkeypatch, 8)
    case = large()
    ((chunk, _),) = chunks(case.blocks)
    for _ in range(2):
        assert faster_way(case.q, case.kv, chunk) is Way.TORCH
    assert [record.getMessage()[:43] for record in caplog.records] == ["flash_attn is installed, but cannot be used"]


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, causal: bool) -> Tensor:
    """Of either package: [B, T, H, D]."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    return torch.stack([bottom_right(*rows, scale, causal, 0.0) for rows in zip(q, k, v, strict=True)])


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("prompts", [False, True])
def test_the_kernel_table_has_what_is_installed(monkeypatch: pytest.MonkeyPatch, prompts: bool) -> None:
    """As contestants over keys and values side by side, and as those to whom a prompt is handed over."""
    layer = Layer(Shape(4, 2, 32, torch.float16, "cpu"), 1 if prompts else 2, 130)
    blocks = layer.prompts() if prompts else layer.newest()
    contest = Contest(layer, blocks, Budget("share", 0.5))
    usual = {each.op for each in contest.peers(print)}
    for name in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setattr(sys.modules[name], "flash_attn_func", flash_attn_func, raising=False)
    contest.shape = replace(contest.shape, device="cuda")
    refused: list[str] = []
    on_gpu(monkeypatch, 9)
    found = {each.op: each.call for each in contest.peers(refused.append)}
    handed = {f"attention, handed to {way}" for way in (*Way,)} if prompts else set()
    there = {name for name in found if not name.startswith("attention, torch")}
    assert there == {"attention, flash-attn 2", "attention, flash-attn 3"} | handed and usual == {"attention, torch"}
    answers = [found[f"attention, flash-attn {number}"]().transpose(1, 2) for number in (2, 3)]  # type: ignore[attr-defined]
    q = contest.q.view(layer.batch, -1, 4, 32).transpose(1, 2)
    expected = sdpa(q, *layer.whole, causal=prompts)
    for name in handed - {"attention, handed to torch"}:
        found[name]()
        answers.append(contest.out.transpose(0, 1)[None].clone())
    for answer in answers:
        torch.testing.assert_close(answer, expected, atol=2e-3, rtol=2e-3)
