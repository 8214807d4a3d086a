"""Keys and values in FP8 with a scale per token: what is stored, what is read, and what it costs in bits and bytes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attend_cases import Life, run, uniform
from engines import ask, running_engine
from kernel_cases import Case, check, make_case, reference
from kernel_checks import run_interpreted
from selector_cases import BACKENDS, Backend
from test_kernels_antidiagonal import reference as antidiagonals
from test_kernels_probe import reference as probed
from torch import Tensor

from gossamer.attention.policy import DENSE, AttentionPolicy, HeadPolicy
from gossamer.kernels.antidiagonal import antidiagonal_mass
from gossamer.kernels.dense_prefill import chunks, dense_prefill
from gossamer.kernels.fp8 import FP8, dequantise, quantise
from gossamer.kernels.layout import UNLIMITED
from gossamer.kernels.page_summaries import page_bounds, page_labels, page_means, page_pools
from gossamer.kernels.paged_decode import paged_decode
from gossamer.kernels.paged_prefill import paged_prefill
from gossamer.kernels.probe import probe_mass
from gossamer.kernels.store import store
from gossamer.kvcache.cache import KVCache
from gossamer.kvcache.groups import group_heads
from gossamer.kvcache.retention import KeepAll
from gossamer.kvcache.sizing import bytes_per_page
from gossamer.server.config import ConfigError, ServerConfig, make_config
from gossamer.server.engine.model import Model

WINDOWS = ((0, UNLIMITED), (64, 256), (3, 70), (0, 100))
HALF_STEP = 2.0**-4  # the most by which a number is off, relative to it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 3e4])
def test_every_number_is_off_by_a_sixteenth_at_most(dtype: torch.dtype, size: float) -> None:
    x = (torch.randn(200, 96, generator=torch.Generator().manual_seed(1)).clamp(-2, 2) * size / 2).to(dtype)
    x[7] = 0
    stored, scale = quantise(x)
    assert stored.dtype == FP8 and scale.dtype == torch.bfloat16 and scale.shape == (200,)
    read = dequantise(stored, scale, torch.float32)
    largest = x.float().abs().amax(-1, keepdim=True)
    error, allowed = (read - x.float()).abs(), x.float().abs() * HALF_STEP + largest / 448 * 2.0**-9
    assert (error <= allowed).all() and (read[7] == 0).all()
    top = x.float().abs().argmax(-1, keepdim=True)  # is next to exact: its scale is made for it
    assert (error.gather(1, top) <= 0.004 * largest).all()


def test_what_is_not_finite_stays_so() -> None:
    x = torch.randn(4, 64)
    x[1, 3], x[2, 5] = torch.inf, torch.nan
    read = dequantise(*quantise(x), torch.float32)
    assert read[[0, 3]].isfinite().all() and read[[1, 2]].isnan().all()


def kernel(case: Case) -> Callable[..., None]:
    return paged_decode if case.blocks.size == 1 else paged_prefill


def attended(case: Case, softcap: float = 0.0, sinks: Tensor | None = None) -> tuple[Tensor, Tensor]:
    out, lse = case.blank()
    kernel(case)(case.q, case.kv, case.blocks, case.index, out, lse, scale=case.scale, softcap=softcap, sinks=sinks)
    return out, lse


@pytest.mark.parametrize("tile", [1, 64])
def test_store_writes_what_is_read_again(tile: int) -> None:
    """Only the tokens' own places, with keys of all sizes."""
    spans = [(past, 1 if tile == 1 else new) for past, new in ((130, 70), (0, 40), (300, 3))]
    case = make_case(spans, tile=tile, heads=(0, 2), fp8=True)
    assert case.kv.scale is not None
    k, v = torch.randn(2, case.q.shape[0], 3, 64) * torch.logspace(-6, 3, case.q.shape[0])[:, None, None]
    before = [x.float() for x in (case.kv.k, case.kv.v, *case.kv.scale)]
    store(k, v, case.kv, case.blocks)
    written = torch.zeros(case.kv.k.shape[1:3], dtype=torch.bool)
    for row in case.blocks.rows:
        for i in range(row.count):
            page, place = int(case.kv.table[row.seq, (row.pos + i) // 64]), (row.pos + i) % 64
            written[page, place] = True
            for pool, scale, given in zip((case.kv.k, case.kv.v), case.kv.scale, (k, v), strict=True):
                expected = dequantise(*quantise(given[row.token + i, [0, 2]]), torch.float32)
                found = dequantise(pool[:, page, place], scale[:, page, place], torch.float32)
                assert torch.equal(found, expected)
    after = [x.float() for x in (case.kv.k, case.kv.v, *case.kv.scale)]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:, ~written].nan_to_num(-1), new[:, ~written].nan_to_num(-1))


@pytest.mark.parametrize(
    ("dtype", "density", "shuffled"),
    [
        (torch.float32, 1.0, False), (torch.float32, 1.0, True), (torch.float32, 0.5, True),
        (torch.bfloat16, 0.5, False), (torch.float16, 1.0, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tile", [1, 64])
def test_attention_of_what_is_stored(tile: int, density: float, shuffled: bool, dtype: torch.dtype) -> None:
    """As exactly as of other keys and values: in place, side by side, scattered, by single tokens."""
    spans = [(past, 1 if tile == 1 else new) for past, new in ((0, 70), (500, 60), (1100, 3), (20, 20))]
    for tokens, windows in ((0, ()), (30, WINDOWS)):
        options = {"tile": tile, "density": density, "shuffled": shuffled, "tokens": tokens, "windows": windows}
        case = make_case(spans, dtype=dtype, fp8=True, heads=(0, 1, 3), ratio=3, **options)  # type: ignore[arg-type]
        keys, values = ([x.to(dtype).double() for x in each] for each in (case.keys, case.values))
        case = replace(case, keys=keys, values=values)  # a CPU reads numbers of the queries' type
        sinks = torch.randn(case.q.shape[1])
        for softcap, given in ((0.0, None), (3.0, sinks)):
            check(*attended(case, softcap, given), reference(case, softcap, given), dtype)


@pytest.mark.parametrize("tile", [1, 64])
def test_attention_is_near_that_of_other_keys(tile: int) -> None:
    """A sixteenth of each number at most, and by chance more often less: about 3 % of the answer's size."""
    spans = [(600, 1 if tile == 1 else 100)]
    exact, rounded = (make_case(spans, tile=tile, fp8=fp8, seed=3, dim=128) for fp8 in (False, True))
    (right, right_lse), (found, found_lse) = attended(exact), attended(rounded)
    due = ~right_lse.isnan()
    error = (found[due] - right[due]).norm() / right[due].norm()
    assert 0.005 < error < 0.06
    assert (found_lse[due] - right_lse[due]).abs().max() < 0.05


def test_any_strides() -> None:
    case = make_case([(900, 300)], density=0.5, tokens=20, fp8=True)
    kv = case.kv
    assert kv.scale is not None
    k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (kv.k, kv.v))
    scale = kv.scale.transpose(1, 2).contiguous().transpose(1, 2)
    other = replace(case, kv=replace(kv, k=k, v=v, scale=scale))
    for mine, theirs in zip(attended(other), attended(case), strict=True):
        assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())


def test_dense_hand_over() -> None:
    case = make_case([(130, 300), (0, 70)], fp8=True)
    out, lse = case.blank()
    for chunk, _ in chunks(case.blocks):
        dense_prefill(case.q, case.kv, chunk, out, scale=case.scale)
    expected, due = reference(case)
    due = ~due.isnan()
    torch.testing.assert_close(out[due].double(), expected[due], atol=2e-5, rtol=2e-5)
    assert out[~due].isnan().all() and lse.isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimates_from_the_keys_themselves(dtype: torch.dtype) -> None:
    case = make_case([(200, 75), (20, 9)], fp8=True, dtype=dtype, windows=WINDOWS[:2])
    case.q.mul_(4)
    found = antidiagonal_mass(case.q, case.kv, case.blocks, 16, scale=case.scale)
    torch.testing.assert_close(found.double(), antidiagonals(case, 16), atol=1e-5, rtol=1e-4)
    for mine, right in zip(
        probe_mass(case.q, case.kv, case.blocks, 40, scale=case.scale), probed(case, 40), strict=True
    ):
        torch.testing.assert_close(mine.double(), right, atol=1e-6, rtol=1e-4)


def test_summaries_of_what_is_stored() -> None:
    case = make_case([(192, 1)], fp8=True, tile=1)
    kv, full = case.kv, case.kv.table[0, :3]
    keys = case.keys[0][:192].unflatten(0, (3, 64)).permute(2, 0, 1, 3)  # [G, 3, S, D]
    shape, where = kv.k.shape[:2], full.long()
    means, bounds = torch.zeros(*shape, 64), torch.zeros(*shape, 4, 2, 64)
    labels, pooled = torch.zeros(*shape, 64, 3), torch.zeros(*shape, 3, 64)
    channels = torch.tensor([[5, 1, 60], [0, -1, 7]], dtype=torch.int32)
    page_means(kv.k, full, means, kv.key_scale)
    page_bounds(kv.k, full, bounds, kv.key_scale)
    page_labels(kv.k, full, channels, labels, kv.key_scale)
    page_pools(kv.k, full, torch.zeros(3, dtype=torch.int32), torch.zeros(0), 1.0, pooled, kv.key_scale)
    parts = keys.unflatten(2, (4, 16))
    taken = torch.stack([keys[0][..., [5, 1, 60]], keys[1][..., [0, 0, 7]] * torch.tensor([1, 0, 1])])
    for found, right in (
        (means, keys.mean(2)),
        (bounds, torch.stack((parts.amin(3), parts.amax(3)), 3)),
        (labels, taken),
        (pooled, torch.stack((keys.amax(2), keys.amin(2), keys.mean(2)), 2)),
    ):
        torch.testing.assert_close(found[:, where].double(), right, atol=1e-6, rtol=1e-6)
    page_means(kv.v, full, means, kv.value_scale)
    values = case.values[0][:192].unflatten(0, (3, 64)).permute(2, 0, 1, 3)
    torch.testing.assert_close(means[:, where].double(), values.mean(2), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS, ids=[backend.name for backend in BACKENDS])
def test_everything_selected_equals_dense(backend: Backend) -> None:
    """In several steps, so that keys which come back from pages were rounded, and no others are used."""
    both = backend.everything(2, 2, 32), DENSE.prefill
    head = HeadPolicy(both[not backend.prompts], both[not backend.generated], KeepAll())
    everything, dense = uniform("all", head, head), uniform("dense", DENSE, DENSE)
    policy = AttentionPolicy("both", (everything, dense))
    found, right, whole = (
        run(policy, [Life(270, 264, point, seed=2)], lambda n=n: n, fp8=True)[0]
        for point, n in ((everything, 100), (dense, 100), (dense, 270))
    )
    torch.testing.assert_close(found, right, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(whole, right, atol=2e-5, rtol=2e-5)


def test_a_page_costs_what_the_pool_allocates() -> None:
    groups = group_heads([[KeepAll()] * 3] * 5)
    cache = KVCache(groups, [3], ratio=1, head_dim=128, dtype=torch.bfloat16, fp8=True)
    (pool,) = cache.pools
    assert pool.k.dtype == pool.v.dtype == FP8 and pool.scale is not None
    expected = bytes_per_page(groups[0], 128, torch.bfloat16, {}, fp8=True)
    assert cache.stats()[0].bytes_per_page == expected == 15 * 2 * 64 * 130
    assert pool.k.nbytes + pool.v.nbytes + pool.scale.nbytes == 3 * expected
    for layer in range(5):  # each has its own
        (kv,) = cache.room(1, 1).views.layer(layer)
        assert kv.scale is not None and kv.scale.shape == (2, 3, 3, 64)
        assert kv.scale.data_ptr() == pool.scale[:, 3 * layer :].data_ptr()
    assert expected / bytes_per_page(groups[0], 128, torch.bfloat16, {}) == 130 / 256
    known = bytes_per_page(groups[0], 128, torch.bfloat16, {"means": (128,)}, fp8=True)
    assert known - expected == 15 * 128 * 2  # what is known of a page keeps the model's type


def test_an_engine_holds_four_times_as_many_tokens(checkpoint: Path, model: Model) -> None:
    """Beside float32, of 32 dimensions; a prefix is found again, and its tokens are those of the first time."""
    prompt = torch.randint(4, 60, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    held = {}
    for kind in ("auto", "fp8"):
        options = {"model": model, "kv_cache_dtype": kind, "kv_cache_memory": 4 * 2**20}
        with running_engine(checkpoint, **options) as engine:  # type: ignore[arg-type]
            first, second = ask(engine, prompt), None
            tokens = first.tokens()
            second = ask(engine, prompt)
            assert second.tokens() == tokens and second.cached == 256
            held[kind] = engine.token_capacity
            assert engine.stats().kv_dtype == {"auto": "float32", "fp8": "float8_e4m3fn"}[kind]
    assert 3.6 < held["fp8"] / held["auto"] < 3.9  # 128 bytes to 34, in whole pages


def test_prefixes_of_another_type_are_others(checkpoint: Path, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    salts: list[bytes] = []
    table = KVCache.table
    monkeypatch.setattr(KVCache, "table", lambda cache, rules, salt: salts.append(salt) or table(cache, rules, salt))
    for kind in ("auto", "fp8", "fp8_e4m3"):
        with running_engine(checkpoint, model=model, kv_cache_dtype=kind) as engine:
            ask(engine, [5] * 20, max_tokens=1).tokens()
    assert salts[0] != salts[1] == salts[2]


def test_the_setting() -> None:
    assert not ServerConfig().fp8_cache
    assert ServerConfig(kv_cache_dtype="fp8").fp8_cache and ServerConfig(kv_cache_dtype="fp8_e4m3").fp8_cache
    with pytest.raises(ConfigError) as error:
        make_config({"kv_cache_dtype": "int4"})
    assert str(error.value) == "--kv-cache-dtype must be one of auto, fp8, fp8_e4m3, not 'int4'."


def test_triton_equals_the_torch_forms() -> None:
    run_interpreted("fp8_interpreted.py")
