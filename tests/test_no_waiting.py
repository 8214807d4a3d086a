"""On a GPU, neither a forward pass nor the choice of tokens waits for the device or for a copy: seen on tensors without
data.

Tensors on torch's device "meta" have a shape and no numbers, so reading one raises. Here they say that they lie on a
GPU, and Triton's kernels are not launched."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from selector_cases import gate, labels
from tiny_models import FAMILIES, VOCAB, save_tiny_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gossamer.attention.policy import DENSE, AttentionPolicy, HeadPolicy, OperatingPoint
from gossamer.attention.quality import QualitySampler
from gossamer.attention.selectors import BlockSparse, Budget, DoubleSparsity, SinkRecent, VerticalSlash
from gossamer.attention.step import Span, plan_step
from gossamer.kvcache.cache import KVCache
from gossamer.kvcache.groups import group_heads
from gossamer.kvcache.retention import KeepAll, KeepSinkRecent
from gossamer.kvcache.table import PageTable
from gossamer.server.engine.executor import Executor
from gossamer.server.engine.fused import fuse
from gossamer.server.engine.graphs import DecodeGraphs, Tensors
from gossamer.server.engine.logits import SampleRow
from gossamer.server.engine.model import Model
from gossamer.server.engine.request import Request, SamplingParams
from gossamer.server.engine.sampler import Sampler
from gossamer.server.engine.scheduler import Part
from gossamer.server.engine.sequence import Sequence

pytest.importorskip("triton")

RATIO, DIM, GPU = 2, 32, torch.device("meta")
FEW, MASS = Budget("tokens", 192), Budget("mass", 0.6, least=128, recent=64)
LENGTHS = (70, 250, 515)


def head(prefill: Any, decode: Any) -> HeadPolicy:
    return HeadPolicy(prefill, decode, KeepAll())


def every_backend() -> AttentionPolicy:
    """Every backend, budget and score, at three points."""
    prefill, decode = (gate(phase, 2, RATIO, DIM, FEW, device="meta") for phase in ("prefill", "decode"))
    some = labels(2, DIM, "meta")
    gates = head(prefill, decode)
    means = head(BlockSparse(FEW, corrects=True), BlockSparse(MASS, corrects=True, above=100))
    bounds = head(BlockSparse(MASS, "antidiagonal", 8, above=300), BlockSparse(FEW, "bounds"))
    tokens = head(VerticalSlash(40, 30, mass=0.9), DoubleSparsity(some, 40, mass=0.8))
    more = head(VerticalSlash(40, 30), DoubleSparsity(some, 40))
    streaming = HeadPolicy(SinkRecent(64, 128), SinkRecent(64, 128), KeepSinkRecent(64, 128))
    keeping = HeadPolicy(DENSE.prefill, DENSE.decode, KeepSinkRecent(64, 128))
    heads = {
        "exact": ((DENSE, DENSE), (DENSE, DENSE), (keeping, DENSE)),
        "sparse": ((means, tokens), (gates, gates), (streaming, bounds)),
        "other": ((means, more), (bounds, bounds), (streaming, DENSE)),
    }
    return AttentionPolicy("all", tuple(OperatingPoint(name, each) for name, each in heads.items()))


class NoNumbers(TorchFunctionMode):
    """Refuses tensors made from numbers of the host, which are copied there and waited for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = (kwargs or {}).get("device")
        assert func not in (torch.tensor, torch.as_tensor) or device in (None, "cpu"), "numbers sent to the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[None]:
    with NoCopies(), NoNumbers():
        yield


class NoCopies(TorchDispatchMode):
    """Refuses copies between host and device that one of them waits for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            places = {each.device.type for each in tree_leaves((args, found)) if isinstance(each, Tensor)}
            free = (kwargs or {}).get("non_blocking", len(args) > 2 and args[2])
            assert len(places) == 1 or free, "a copy that the host waits for"
        return found


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without one."""
    monkeypatch.setattr("triton.runtime.jit.JITFunction.run", lambda *args, **options: None)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: tensor.device == GPU))
    torch.use_deterministic_algorithms(False)  # nothing could be filled


@pytest.fixture
def there(gpu: None, checkpoint: Path, model: Model) -> Model:
    """The model on that GPU."""
    return on_gpu(checkpoint, model)


def on_gpu(checkpoint: Path, like: Model) -> Model:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint)
    with GPU:
        module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="gossamer").eval()
    return Model(module, like.shape, config.model_type, torch.bfloat16, GPU, (), {})


@pytest.fixture
def cache(gpu: None) -> KVCache:
    """Books on the host, pages on that GPU."""
    return make_cache()


def make_cache(*, fp8: bool = False) -> KVCache:
    groups, summaries = group_heads(every_backend().rules()), every_backend().summaries()
    few = [64] * len(groups)
    return KVCache(
        groups, few, ratio=RATIO, head_dim=DIM, dtype=torch.bfloat16, device=GPU, summaries=summaries, fp8=fp8
    )


def tables_of(cache: KVCache) -> list[PageTable]:
    tables = [cache.table([KeepAll()] * len(cache.groups), b"") for _ in LENGTHS]
    for table, length in zip(tables, LENGTHS, strict=True):
        cache.grow(table, length)
    return tables


@pytest.mark.parametrize("names", [("exact",) * 3, ("sparse",) * 3, ("sparse", "exact", "other")], ids=",".join)
@pytest.mark.parametrize("new", [1, 300])
def test_a_forward_pass(there: Model, cache: KVCache, names: tuple[str, ...], new: int) -> None:
    """A token of each sequence, or the end of a prompt beside tokens of others."""
    check_forward(there, cache, names, new)


@pytest.mark.parametrize("new", [1, 300])
def test_a_forward_pass_with_fp8(there: Model, new: int) -> None:
    check_forward(there, make_cache(fp8=True), ("sparse", "exact", "other"), new)


def check_forward(there: Model, cache: KVCache, names: tuple[str, ...], new: int) -> None:
    points, tables = map(every_backend().point, names), tables_of(cache)
    spans = [Span(69, 1, 60), Span(249, 1, 60), Span(515 - new, new, 515 if new > 1 else 60)]
    tokens = torch.zeros(2 + new, dtype=torch.int64, device=GPU)
    with no_waiting():
        step = plan_step(spans, cache.views(tables), list(points), RATIO, GPU)
        logits = there.forward(tokens, tokens, step, tokens[:3])
    assert logits.shape == (3, VOCAB) and logits.device == GPU


@pytest.mark.parametrize("names", [("exact",), ("sparse",), ("sparse", "exact", "other")], ids=",".join)
def test_a_recorded_step(there: Model, cache: KVCache, names: tuple[str, ...]) -> None:
    check_recorded(there, cache, names)


def test_a_recorded_step_with_fp8(there: Model) -> None:
    check_recorded(there, make_cache(fp8=True), ("sparse", "exact", "other"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
def test_every_family(gpu: None, tmp_path: Path, model: Model, cache: KVCache, family: str, fused: bool) -> None:
    there = on_gpu(save_tiny_model(tmp_path, family), model)
    source = dict(vars(sys.modules[type(there.module).__module__]))
    plain = norms(there.module)
    if fused:
        assert fuse(there.module, family)
        assert norms(there.module) != plain and all("Liger" in name for name in norms(there.module))
    assert dict(vars(sys.modules[type(there.module).__module__])) == source, "models to come would change"
    check_recorded(there, cache, ("exact",))


@pytest.mark.parametrize(("activation", "fused"), [("silu", True), ("relu", False), ("gelu", False)])
def test_only_activations_that_are_meant_are_fused(
    gpu: None, tmp_path: Path, model: Model, activation: str, fused: bool
) -> None:
    module = on_gpu(save_tiny_model(tmp_path, hidden_act=activation), model).module
    assert fuse(module, "llama")
    layers = [each for name, each in module.named_modules() if name.endswith(".mlp")]
    assert layers and all(("forward" in vars(each)) is fused for each in layers)
    assert all("Liger" in name for name in norms(module))


def norms(module: torch.nn.Module) -> list[str]:
    """What the norms of the layers call themselves."""
    return [each._get_name() for name, each in module.named_modules() if name.endswith("layernorm")]


def check_recorded(there: Model, cache: KVCache, names: tuple[str, ...]) -> None:
    def record(run: Callable[[], Tensors]) -> tuple[Callable[[], None], Tensors]:
        with no_waiting():
            return (lambda: None), run()

    graphs = DecodeGraphs(there, cache, 4, 16, every_backend().points, record)
    recording = graphs._make(4, 16, tuple(map(every_backend().point, names)))
    assert recording.logits.shape == (4, VOCAB) and recording.reads.read[True].shape == (4,)


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"logprobs": 3},
    {"top_p": 0.9, "min_p": 0.01},
    {"top_k": 5, "logprobs": 0},
    {"presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.5, "logit_bias": ((3, 2.0),), "min_tokens": 50},
]


@pytest.mark.parametrize("looks", [False, True], ids=["", "looking-twice"])
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "recorded"])
def test_whole_steps(there: Model, cache: KVCache, graphs: bool, looks: bool) -> None:
    """A scored prompt and the newest tokens of others; then the next token of each, twice, before anything is read."""
    point = every_backend().points[looks]
    executor, replayed = Executor(there, cache, Sampler()), list[None]()
    if looks:
        executor.quality = QualitySampler(1.0, (None,) * 3)
    if graphs:
        executor.graphs = DecodeGraphs(
            there, cache, 8, 64, (point,), lambda run: ((lambda: replayed.append(None)), run())
        )
        executor.graphs.record_ahead(lambda line: None)
    parts = list[Part]()
    for n, fields in enumerate(SAMPLED):
        params, first = SamplingParams(**{"max_tokens": 90, **fields}), n == 0
        request = Request(id=str(n), prompt=[5] * (70 + n), params=params, prompt_logprobs=2 if first else None)
        row = SampleRow(params, seed=n, prompt=request.prompt, forbid=[1, 2])
        table = cache.table([KeepAll()] * len(cache.groups), b"")
        sequence = Sequence(request, 0, n, point, table, row, [*request.prompt])
        if not first:
            sequence.append(7)
            cache.grow(table, sequence.prompt_length)
        parts.append(Part(sequence, table.length, sequence.pending, True))
    before = None
    for turn in range(3):
        for part in parts:
            cache.grow(part.sequence.table, part.new)
        with no_waiting():
            before = executor.launch(parts, before)
        assert list(before.choices) == [part.sequence for part in parts]
        assert before.draw is not None and before.draw.tokens.device == GPU
        assert [sequence.index for sequence in before.scored] == [0] * (turn == 0)
        for part in parts:
            part.sequence.unread = 1
        parts = [Part(part.sequence, part.first + part.new, 1, True) for part in reversed(parts)]
        assert (before.watch is not None) == looks
        if before.watch is not None:
            assert before.watch.made and before.watch.found.device == GPU
            assert {check.decode for check in before.watch.made} == ({False, True} if turn == 0 else {True})
    assert len(replayed) == (2 if graphs and not looks else 0)


def test_what_waits_is_seen(gpu: None) -> None:
    numbers = torch.ones(3, device=GPU)
    with no_waiting():
        torch.tensor([1, 2]).to(GPU, non_blocking=True)
        with pytest.raises(AssertionError):
            torch.tensor([1, 2], device=GPU)
        with pytest.raises(AssertionError):
            torch.tensor([1, 2]).to(GPU)
        for read in (lambda: numbers.sum().item(), numbers.tolist, numbers.nonzero, lambda: numbers[numbers > 0]):
            with pytest.raises(RuntimeError):
                read()
