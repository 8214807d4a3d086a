"""FP8 keys and values in the Triton kernels, under Triton's interpreter, against the torch forms; test_fp8.py runs this
file in a process of its own, because TRITON_INTERPRET has to be set before Triton is imported."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from kernel_cases import make_case
from torch import Tensor

from gossamer.kernels import page_summaries as twins
from gossamer.kernels.antidiagonal import antidiagonal_mass_torch
from gossamer.kernels.fp8 import FP8, dequantise, quantise
from gossamer.kernels.layout import UNLIMITED
from gossamer.kernels.paged_decode import paged_decode_torch
from gossamer.kernels.paged_prefill import paged_prefill_torch
from gossamer.kernels.probe import probe_mass_torch
from gossamer.kernels.store import store_torch
from gossamer.kernels.triton import antidiagonal, fp8, page_summaries, paged_decode, paged_prefill, probe, store

assert os.environ.get("TRITON_INTERPRET") == "1", "test_fp8.py runs this file"

WINDOWS = ((0, UNLIMITED), (64, 256), (3, 70), (0, 100))
SPANS = [(130, 70), (0, 40), (300, 3)]
DTYPES = {torch.float32: 1e-5, torch.float16: 1e-3}


@pytest.fixture(params=[80, 90], ids=["by bits", "by the chip"])
def chip(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Float32 queries read FP8 in another way on each; float16 ones in one way."""
    monkeypatch.setattr(fp8, "capability", lambda device: request.param)
    return int(request.param)


@triton.jit
def _widen(x_ptr, out_ptr, FORM: tl.constexpr):
    i = tl.arange(0, 256)
    tl.store(out_ptr + i, fp8.widen(tl.load(x_ptr + i), out_ptr.dtype.element_ty, FORM))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("form", [fp8.CHIP, fp8.BITS])
def test_every_byte(dtype: torch.dtype, form: int) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(torch.int8)
    out = torch.zeros(256, dtype=dtype)
    _widen[(1,)](every, out, FORM=form)
    right = every.view(FP8).float()
    finite = right.isfinite()
    assert torch.equal(out.float()[finite] * (256 if form == fp8.BITS else 1), right[finite]) and finite.sum() == 254


@triton.jit
def _quantise(x_ptr, bytes_ptr, scale_ptr, N: tl.constexpr, D: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * D + tl.arange(0, D)[None]
    found, scale = fp8.quantise(tl.load(x_ptr + at))
    tl.store(bytes_ptr + at, found)
    tl.store(scale_ptr + i, scale)


def test_quantised_to_the_bit() -> None:
    """As torch does it: every size of number, ties, what is too small, what is not finite."""
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-30, 30, 64)[:, None]
    x[1], x[2] = x[1] ** 9, torch.linspace(-448, 448, 64)
    x[3] = torch.linspace(-0.02, 0.02, 64)
    x[3, 0] = 448  # the scale is 1
    x[4] = torch.arange(64) / 32 + 16
    x[4, 0] = 448  # ties, many of them
    x[5], x[6, 3], x[7, 9] = 0, torch.inf, torch.nan
    found, scale = torch.zeros(64, 64, dtype=torch.int8), torch.zeros(64)
    _quantise[(1,)](x, found, scale, N=64, D=64)
    right, right_scale = quantise(x)
    torch.testing.assert_close(scale, right_scale.float(), rtol=0, atol=0, equal_nan=True)
    known = scale.isfinite()
    assert known.sum() == 62
    assert torch.equal(found.view(FP8)[known].float(), right[known].float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [1, 32])
@pytest.mark.parametrize(("softcap", "tokens"), [(0.0, 0), (3.0, 70)])
def test_attention(chip: int, dtype: torch.dtype, tile: int, softcap: float, tokens: int) -> None:
    spans = [(past, 1 if tile == 1 else new) for past, new in SPANS]
    windows = WINDOWS if tokens else ()
    case = make_case(
        spans, tile=tile, dtype=dtype, dim=80 if tokens else 32, tokens=tokens, density=0.5, windows=windows,
        heads=(0, 2), fp8=True, seed=1,
    )  # fmt: skip
    launch, twin = (
        (paged_decode.launch, paged_decode_torch) if tile == 1 else (paged_prefill.launch, paged_prefill_torch)
    )
    results = []
    for kernel in (launch, twin):
        out, lse = case.blank()
        kernel(case.q, case.kv, case.blocks, case.index, out, lse, scale=case.scale, softcap=softcap)
        results.append((out, lse))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=DTYPES[dtype], rtol=DTYPES[dtype], equal_nan=True)
    assert results[0][0].isfinite().any()


def test_small_values_in_float16() -> None:
    """Weights times scales would leave its range if these were what they are."""
    case = make_case([(700, 40)], tile=32, dtype=torch.float16, dim=32, fp8=True, heads=(0,))
    assert case.kv.scale is not None
    case.kv.scale[1] *= 2.0**-12
    out, lse = case.blank()
    paged_prefill.launch(case.q, case.kv, case.blocks, case.index, out, lse, scale=case.scale)
    twin, _ = case.blank()
    paged_prefill_torch(case.q.float(), case.kv, case.blocks, case.index, twin, lse, scale=case.scale)
    due = ~twin.isnan()
    torch.testing.assert_close(out[due], twin[due], atol=1e-6, rtol=5e-3)


@pytest.mark.parametrize("tile", [1, 24])
@pytest.mark.parametrize("dtype", DTYPES)
def test_store(tile: int, dtype: torch.dtype) -> None:
    case = make_case([(past, 1 if tile == 1 else new) for past, new in SPANS], tile=tile, dim=80, fp8=True)
    sizes = torch.logspace(-3, 3, case.q.shape[0])[:, None, None]
    k, v = ((torch.randn(case.q.shape[0], 2, 80) * sizes).to(dtype) for _ in range(2))
    k[3, 1, 7] = torch.nan
    read = []
    for kernel in (store.launch, store_torch):
        assert case.kv.scale is not None
        kv = replace(case.kv, k=case.kv.k.clone(), v=case.kv.v.clone(), scale=case.kv.scale.clone())
        kernel(k, v, kv, case.blocks)
        assert kv.scale is not None
        keys, values = kv.scale
        read.append(torch.stack((dequantise(kv.k, keys, torch.float32), dequantise(kv.v, values, torch.float32))))
        assert not torch.equal(kv.scale.nan_to_num(), case.kv.scale.nan_to_num())
    torch.testing.assert_close(read[0], read[1], rtol=0, atol=0, equal_nan=True)


def test_estimates_from_the_keys_themselves(chip: int) -> None:
    dtype = torch.float16 if chip == 80 else torch.float32
    case = make_case(SPANS, ratio=2, dim=32, tile=32, windows=WINDOWS[:3], dtype=dtype, heads=(2, 0), fp8=True)
    given = (case.q, case.kv, case.blocks)
    found = antidiagonal.launch(*given, 16, scale=case.scale)
    right = antidiagonal_mass_torch(*given, 16, scale=case.scale)
    torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-4)
    assert (right > 0).any()
    for mine, theirs in zip(
        probe.launch(*given, 20, scale=case.scale), probe_mass_torch(*given, 20, scale=case.scale), strict=True
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
        assert (theirs > 0).any()


def test_summaries(chip: int) -> None:
    case = make_case([(192, 1)], fp8=True, tile=1, dim=80)
    kv = case.kv
    physical = torch.cat((kv.table[0, :3], torch.tensor([-1], dtype=torch.int32)))
    channels = torch.tensor([[5, 1, 70], [0, -1, 7]], dtype=torch.int32)
    first, inv_freq = torch.arange(4, dtype=torch.int32) * 64, torch.logspace(-3, 0, 36)
    shape = kv.k.shape[:2]

    def every(form: Any, prefix: str) -> list[Tensor]:
        tables = [torch.zeros(*shape, *own) for own in ((80,), (4, 2, 80), (64, 3), (3, 80))]
        names = [getattr(form, prefix.format(name)) for name in ("means", "bounds", "labels", "pools")]
        rest = [(), (), (channels,), (first, inv_freq, 1.25)]
        for call, table, more in zip(names, tables, rest, strict=True):
            call(kv.k, physical, *more, table, kv.key_scale)
        return tables

    for mine, theirs in zip(every(page_summaries, "launch_{}"), every(twins, "page_{}_torch"), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=2e-6)
        assert (mine[:, kv.table[0, :3].long()] != 0).any()
