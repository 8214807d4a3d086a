"""What every backend must do: everything selected is dense, batches and chunks change nothing, little is little."""

import random

import pytest
import torch
from attend_cases import Life, run, uniform
from selector_cases import BACKENDS, Backend
from torch import Tensor

from gossamer.attention.policy import DENSE, AttentionPolicy, HeadPolicy, OperatingPoint
from gossamer.attention.selectors import Dense, Selector
from gossamer.attention.step import TILE_ROWS
from gossamer.kvcache.retention import KeepAll

every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=[backend.name for backend in BACKENDS])


def head(backend: Backend, selector: Selector) -> HeadPolicy:
    return HeadPolicy(selector if backend.prompts else Dense(), selector if backend.generated else Dense(), KeepAll())


def alone(point: OperatingPoint) -> AttentionPolicy:
    return AttentionPolicy("p", (point,))


def dense_point(heads: int) -> OperatingPoint:
    return uniform("dense", *[DENSE] * heads)


RATIOS, DIMS = (1, 2, 4, 8, 16), (64, 96, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# every ratio with every head size; the types go round, so that each meets every ratio and every head size
SHAPES = [(ratio, dim, DTYPES[(i + j) % 3]) for i, ratio in enumerate(RATIOS) for j, dim in enumerate(DIMS)]


@every_backend
@pytest.mark.parametrize(("ratio", "dim", "dtype"), SHAPES)
def test_everything_selected_is_dense(backend: Backend, ratio: int, dim: int, dtype: torch.dtype) -> None:
    heads, exact = 2, dense_point(2)
    point = uniform("all", *[head(backend, backend.everything(heads, ratio, dim))] * heads)
    for length, chunk in ((1, 1), (63, 100), (64, 20), (65, 64), (330, 77), (1000, 640)):
        sizes = length, max(1, length - 5)
        (out,) = run(alone(point), [Life(*sizes, point, 1, ratio, dim, dtype)], lambda chunk=chunk: chunk)  # type: ignore[misc]
        (expected,) = run(alone(exact), [Life(*sizes, exact, 1, ratio, dim, dtype)], lambda chunk=chunk: chunk)  # type: ignore[misc]
        if backend.exact:
            assert torch.equal(out, expected)
        else:
            close = 2e-6 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(out, expected, atol=close, rtol=10 * close)


@every_backend
def test_everything_selected_is_dense_over_4097_tokens(backend: Backend) -> None:
    heads, ratio, dim = 1, 2, 64
    point, exact = uniform("all", head(backend, backend.everything(heads, ratio, dim))), dense_point(heads)
    (out,) = run(alone(point), [Life(4097, 4090, point, 1, ratio, dim)], lambda: 1024)
    (expected,) = run(alone(exact), [Life(4097, 4090, exact, 1, ratio, dim)], lambda: 1024)
    torch.testing.assert_close(out, expected, atol=5e-6, rtol=5e-5)


def outputs(backend: Backend, chunk: int, together: bool) -> list[Tensor]:
    """Three sequences of different lengths under a backend that reads little, and one that is dense."""
    sparse = uniform("sparse", *[head(backend, backend.little(2, 2, 32))] * 2)
    policy = AttentionPolicy("p", (dense_point(2), sparse))
    points = [policy.points[0], policy.points[1], policy.points[1], policy.points[1]]
    lives = [Life(n, n - 8, point, n) for n, point in zip((300, 40, 520, 410), points, strict=True)]
    return run(policy, lives, lambda: chunk, together=together)


@every_backend
def test_little_is_read_and_neighbours_in_a_batch_change_nothing(backend: Backend) -> None:
    together, one_by_one = outputs(backend, 128, True), outputs(backend, 128, False)
    for mixed, single in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(mixed, single, atol=2e-6, rtol=2e-5)
    exact = dense_point(2)
    (dense,) = run(alone(exact), [Life(520, 512, exact, 520)], lambda: 128)
    rows = slice(300, 512) if backend.prompts else slice(512, 520)
    assert (together[2][rows] - dense[rows]).abs().max() > 1e-3


PROBED = ("columns", "diagonals")  # the probe is the chunk's end: what a chunk is decides what is read


@every_backend
def test_chunks_of_whole_tiles_change_nothing(backend: Backend) -> None:
    """Prompts may be cut anywhere between tiles, as the scheduler does; of a probing backend the chunk is part of the
    method, so there only generated tokens are compared."""
    tile = TILE_ROWS // 2
    sparse = uniform("sparse", *[head(backend, backend.little(2, 2, 32))] * 2)
    rng, answers = random.Random(3), []
    for sizes in ([1000], [tile], [tile, 3 * tile, 2 * tile]):
        (out,) = run(alone(sparse), [Life(520, 512, sparse, 7)], lambda sizes=sizes: rng.choice(sizes))  # type: ignore[misc]
        answers.append(out[512:] if backend.name in PROBED else out)
    for other in answers[1:]:
        torch.testing.assert_close(answers[0], other, atol=2e-6, rtol=2e-5)


def test_heads_of_one_layer_may_all_differ() -> None:
    """Each head of a mixed layer gives what it gives in a layer of its own kind."""
    makers = [
        backend for backend in BACKENDS if backend.name in ("mean-corrected", "bounds", "columns", "double-sparsity")
    ]
    heads = len(makers)
    policies = [head(backend, backend.little(heads, 2, 32)) for backend in makers]
    mixed = uniform("mixed", *policies)
    (out,) = run(alone(mixed), [Life(400, 390, mixed, 2)], lambda: 128)
    for number, policy in enumerate(policies):
        same = uniform("same", *[policy] * heads)
        (expected,) = run(alone(same), [Life(400, 390, same, 2)], lambda: 128)
        own = slice(2 * number, 2 * number + 2)
        torch.testing.assert_close(out[:, own], expected[:, own], atol=2e-6, rtol=2e-5)
