"""Which heads can stream: attention with gradients, DuoAttention's trained α, its texts, and rankings compared."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from small_tokenizers import save_chatml, save_llama2
from tiny_models import save_byte_tokenizer, save_tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.attention.profiling import differentiable
from gossamer.attention.profiling.differentiable import Logits, full_attention, streaming_attention
from gossamer.attention.profiling.heads import (
    Mixture,
    agreement,
    distance,
    mixing,
    streaming_distance,
    streaming_heads,
    train_heads,
)
from gossamer.attention.profiling.passkeys import Passkeys, TrainingText, find_answers
from gossamer.attention.profiling.tasks import Filler, Message

LAYERS, HEADS, GROUPS, DIM = 3, 4, 2, 32  # of tiny_models
FILLER = Path(__file__).parent.parent / "CONTRIBUTING.md"


def by_formula(q: Tensor, k: Tensor, v: Tensor, logits: Logits, sink: int, recent: int) -> Tensor:
    """Softmax over the whole matrix, in float64."""
    k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], 0) for x in (k, v))
    scores = logits.scale * q @ k.transpose(1, 2)
    if logits.softcap:
        scores = logits.softcap * torch.tanh(scores / logits.softcap)
    query, key = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
    seen = (key <= query) & ((key < sink) | (key > query - recent))
    weight = scores.masked_fill(~seen, -torch.inf).exp()
    total = weight.sum(-1, keepdim=True)
    if logits.sinks is not None:
        total = total + logits.sinks.exp()[:, None, None]
    return weight / total @ v


@pytest.mark.parametrize(
    ("length", "sink", "recent"), [(1, 4, 8), (12, 4, 8), (37, 0, 7), (150, 5, 16), (96, 40, 16), (301, 64, 100)]
)
@pytest.mark.parametrize("family", ["plain", "softcap", "sinks"])
def test_attention_with_gradients_is_the_softmax_over_what_may_be_seen(
    length: int, sink: int, recent: int, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(differentiable, "MOST_LOGITS", 6 * 20 * 150)  # several pieces
    generator = torch.Generator().manual_seed(length)
    made = {"generator": generator, "dtype": torch.float64}
    q, k, v = (torch.randn(heads, length, 8, **made).requires_grad_() for heads in (6, 2, 2))
    sinks = torch.randn(6, **made) if family == "sinks" else None
    logits = Logits(0.7, 2.0 if family == "softcap" else None, sinks)
    weight = torch.randn(6, length, 8, **made)
    for found, expected in (
        (full_attention(q, k, v, logits), by_formula(q, k, v, logits, 0, length)),
        (streaming_attention(q, k, v, logits, sink=sink, recent=recent), by_formula(q, k, v, logits, sink, recent)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        slopes = (torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (found, expected))
        for mine, theirs in zip(*slopes, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-10)


def tiny(path: Path, family: str, dtype: torch.dtype = torch.float32, **extra: Any) -> Any:
    save_tiny_model(path, family, **extra)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def text_of(length: int, seed: int = 0, answers: int = 12) -> TrainingText:
    tokens = torch.randint(4, 300, (length,), generator=torch.Generator().manual_seed(seed))
    return TrainingText(tokens, torch.arange(length) >= length - answers)


FULL = torch.zeros(LAYERS, GROUPS, dtype=torch.bool)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss", "exaone4", "qwen3_moe", "granite"])
def test_where_no_head_streams_the_states_are_the_models_own(tmp_path: Path, family: str) -> None:
    model, text = tiny(tmp_path, family), text_of(161)
    states: list[Tensor] = []
    hook = model.model.register_forward_hook(lambda *seen: states.append(seen[-1].last_hidden_state))
    assert streaming_distance(model, [text], FULL, sink=4, recent=16) == 0.0
    hook.remove()
    with torch.no_grad():
        own = model.model(text.tokens[None], use_cache=False).last_hidden_state
    assert len(states) == 3  # one token to see the layers' shapes, the model as it is, and mixed
    for found in states[1:]:
        torch.testing.assert_close(found, own, rtol=2e-3, atol=2e-3)


def test_where_all_heads_stream_the_states_are_those_under_the_mask(tmp_path: Path) -> None:
    model, text = tiny(tmp_path, "llama"), text_of(161)
    with torch.no_grad():
        model.model.norm.weight *= 3.0  # no part of the distance
    query, key = torch.arange(161)[:, None], torch.arange(161)
    seen = (key <= query) & ((key < 5) | (key > query - 16))
    mask = torch.zeros(161, 161).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        own, streamed = (
            model.model(text.tokens[None], attention_mask=each, use_cache=False).last_hidden_state[0, text.decisive]
            for each in (None, mask)
        )
    expected = float((streamed - own).square().mean() / own.square().mean())
    assert 0.1 < expected < 2.0
    assert streaming_distance(model, [text], ~FULL, sink=5, recent=16) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt_oss"])
def test_the_slope_of_alpha_is_that_of_finite_differences(tmp_path: Path, family: str) -> None:
    more = {"num_local_experts": 2} if family == "gpt_oss" else {}  # all chosen: which are is no smooth function
    model, text = tiny(tmp_path, family, torch.float64, **more), text_of(90)
    if family == "gpt_oss":
        model.set_experts_implementation("eager")  # the others know no float64
    with mixing(model) as (windows, kv_heads):
        assert kv_heads == GROUPS

        def far(alpha: Tensor) -> Tensor:
            return distance(model, text, Mixture(windows, alpha, 4, 16))

        alpha = 0.3 + 0.5 * torch.rand(LAYERS, GROUPS, generator=torch.Generator().manual_seed(1)).double()
        (slope,) = torch.autograd.grad(far(alpha.requires_grad_()), [alpha])
        eps = 0.01
        for layer, head in FULL.logical_not().nonzero().tolist():
            step = torch.zeros_like(alpha)
            step[layer, head] = eps
            with torch.no_grad():
                rise = float(far(alpha + step) - far(alpha - step)) / (2 * eps)
            assert float(slope[layer, head]) == pytest.approx(rise, rel=1e-2, abs=1e-6)
            assert (windows[layer] is None) == (slope[layer, head] != 0)


@pytest.mark.parametrize(
    ("needed", "dtype"), [((1, 1), torch.float32), ((0, 0), torch.bfloat16), ((2, 1), torch.float16)]
)
def test_training_finds_the_head_that_matters(tmp_path: Path, needed: tuple[int, int], dtype: torch.dtype) -> None:
    model = tiny(tmp_path, "llama", dtype)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight *= 0.02  # else random layers make much of any difference
            for head in range(GROUPS):
                if (number, head) != needed:  # its query heads' part of the output projection
                    layer.self_attn.o_proj.weight[:, head * 2 * DIM : (head + 1) * 2 * DIM] *= 0.001
    losses: list[float] = []
    alpha = trained(model, 30, lambda step, loss: losses.append(loss) if step == len(losses) else None)
    assert alpha.dtype == torch.float32
    assert len(losses) == 30
    assert losses[0] == pytest.approx(0.05, abs=1e-6)  # the model as it is, and the penalty of every head
    assert losses[-1] < 0.03
    others = torch.ones_like(FULL)
    others[needed] = False
    assert alpha[needed] > 0.6 and alpha[others].max() < 0.2
    assert alpha.min() >= 0.0 and alpha.max() <= 1.0


def trained(model: Any, steps: int, report: Callable[[int, float], None] = lambda *_: None) -> Tensor:
    return train_heads(
        model, lambda number: text_of(150, number), steps=steps, sink=4, recent=16, rate=0.06, report=report
    )


def test_training_is_repeatable(tmp_path: Path) -> None:
    model = tiny(tmp_path, "qwen3_moe")
    first = trained(model, 4)
    assert torch.equal(first, trained(model, 4))
    assert first.unique().numel() > 1


def test_layers_with_a_window_of_their_own_are_left_alone(tmp_path: Path) -> None:
    model, text = tiny(tmp_path / "some", "gemma3_text"), text_of(120)

    def train(module: Any) -> Tensor:
        return train_heads(module, lambda _: text, steps=2, sink=4, recent=16, report=lambda *_: None)

    alpha = train(model)
    own = [kind == "sliding_attention" for kind in model.config.layer_types]
    assert own == [True, True, False]
    assert alpha.isnan().all(1).tolist() == own and alpha[2].isfinite().all()
    streaming = [streaming_distance(model, [text], each, sink=4, recent=16) for each in (FULL, ~FULL)]
    assert streaming[0] == 0.0 < streaming[1]
    windows = torch.tensor(own)[:, None].expand(-1, GROUPS)
    assert streaming_distance(model, [text], windows, sink=4, recent=16) == 0.0
    everywhere = tiny(tmp_path / "all", "mistral")
    with pytest.raises(ValueError, match="sliding window of its own"):
        train(everywhere)
    assert train(tiny(tmp_path / "longer", "mistral", sliding_window=2048)).isfinite().all()


def test_the_model_is_as_before_even_after_a_failure(tmp_path: Path) -> None:
    model, text = tiny(tmp_path, "llama").train(), text_of(40)
    model.model.norm.weight.requires_grad_(False)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    nothing = TrainingText(text.tokens, torch.zeros_like(text.decisive))
    with pytest.raises(ValueError, match="training text 0 has no decisive token"):
        train_heads(model, lambda _: nothing, steps=1, report=lambda *_: None)
    assert model.config._attn_implementation == "eager" and model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(layer) for layer in model.model.layers)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes, forwards or backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.size = max([self.size, *(each.numel() for each in tree_leaves(out) if isinstance(each, Tensor))])
        return out


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_no_tensor_grows_with_the_square_of_the_length(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(differentiable, "MOST_LOGITS", 4 * 1024 * 8)  # eight rows of the longer text
    model = tiny(tmp_path, family)
    sizes = []
    for length in (256, 1024):
        with Largest() as largest:
            train_heads(model, lambda _, n=length: text_of(n), steps=1, sink=4, recent=16, report=lambda *_: None)
        sizes.append(largest.size)
    assert sizes[1] <= 4.2 * sizes[0]


def chat_encoder(path: str) -> Callable[[list[Message]], list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(path)

    def encode(chat: list[Message]) -> list[int]:
        ids: list[int] = tokenizer(
            tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False
        ).input_ids
        return ids

    return encode


@pytest.mark.parametrize("family", ["bytes", "chatml", "llama2"])
def test_answers_are_found_whatever_the_template_and_the_tokenizer(tmp_path: Path, family: str) -> None:
    if family == "bytes":
        save_byte_tokenizer(tmp_path)
    else:
        {"chatml": save_chatml, "llama2": save_llama2}[family](tmp_path)
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    answers = ("12345", "7", "12345", "a key, the fox", "  99 ")  # one twice, one the template may trim
    chat = [{"role": "system", "content": "assistant 12345"}] if family == "chatml" else []
    for answer in answers:
        chat += [{"role": "user", "content": f"What of {answer}? 12345"}, {"role": "assistant", "content": answer}]
    ids, found = find_answers(chat, chat_encoder(str(tmp_path)))
    assert ids == chat_encoder(str(tmp_path))(chat)
    for answer, place in zip(answers, found, strict=True):
        shown = tokenizer.decode(ids[place.start : place.stop])
        assert answer.strip() == shown.strip()
        assert "?" in tokenizer.decode(ids[max(0, place.start - 24) : place.start])


def test_a_template_that_loses_replies_is_refused() -> None:
    def forgetful(chat: Sequence[Message]) -> list[int]:
        return [ord(char) for message in chat[-3:] for char in message["content"]]

    chat = [{"role": role, "content": f"{role} {n}"} for n in range(3) for role in ("user", "assistant")]
    with pytest.raises(ValueError, match="does not show each reply"):
        find_answers(chat, forgetful)


def test_passkeys_are_asked_for_far_from_where_they_stand(tmp_path: Path) -> None:
    save_byte_tokenizer(tmp_path)
    encode_chat = chat_encoder(str(tmp_path))
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    filler = Filler(FILLER.read_text("utf-8").splitlines(), encode)
    texts = Passkeys(filler, encode_chat, 2000, 4000, keys=5, seed=3)
    lengths = []
    for number in range(4):
        text, again = texts(number), texts(number)
        assert torch.equal(text.tokens, again.tokens) and torch.equal(text.decisive, again.decisive)
        lengths.append(text.tokens.numel())
        written = tokenizer.decode(text.tokens)
        document, *replies = written.split("<|assistant|>")
        values = [reply.split("<|end|>")[0] for reply in replies]
        assert len(values) == 5 and all(document.count(value) == 1 for value in values)
        following = text.tokens[1:][text.decisive[:-1]]  # what the decisive states have to say
        assert tokenizer.decode(following) == "".join(values)
    assert len(set(lengths)) == 4 and min(lengths) >= 1970 and max(lengths) <= 4030
    same = Passkeys(filler, encode_chat, 3000, 3000, keys=10)
    assert all(abs(same(number).tokens.numel() - 3000) <= 30 for number in range(3))
    others = Passkeys(filler, encode_chat, 2000, 4000, keys=5, seed=4)
    assert not torch.equal(others(0).tokens, texts(0).tokens)


def test_the_least_alphas_stream_and_a_seed_draws_among_equals() -> None:
    alpha = torch.tensor([[0.9, 0.1, 1.0, 1.0], [1.0, 0.5, 1.0, 1.0], [torch.nan] * 4])
    for seed in range(5):
        few = streaming_heads(alpha, 3 / 8, seed)
        assert few.nonzero().tolist() == [[0, 0], [0, 1], [1, 1]]
    drawn = [streaming_heads(alpha, 0.5, seed) for seed in range(20)]
    assert all(int(each.sum()) == 4 and not each[2].any() for each in drawn)
    assert all(bool((each | ~few).all()) for each in drawn)
    assert len({tuple(each.flatten().tolist()) for each in drawn}) > 1
    assert torch.equal(streaming_heads(alpha, 0.5, 7), streaming_heads(alpha, 0.5, 7))
    assert streaming_heads(alpha, 0.0).sum() == 0 and streaming_heads(alpha, 1.0).sum() == 8


def test_rankings_are_compared_by_rank_and_by_what_they_choose() -> None:
    alpha = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, torch.nan]])
    same = agreement(alpha, alpha**3, 3 / 7)
    assert (same.correlation, same.overlap) == (pytest.approx(1.0), 1.0)
    assert same.by_chance == pytest.approx(3 / 7)
    reverse = agreement(alpha, -alpha, 3 / 7)
    assert (reverse.correlation, reverse.overlap) == (pytest.approx(-1.0), 0.0)
    other = torch.tensor([[1.0, 1.0, 3.0, 9.0], [2.0, torch.nan, 5.0, 0.0]])  # six are known in both
    # ranks 0..5 against 0.5 0.5 3 5 2 4
    ranks = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0], [0.5, 0.5, 3.0, 5.0, 2.0, 4.0]])
    found = agreement(alpha, other, 0.5)
    assert found.correlation == pytest.approx(float(torch.corrcoef(ranks)[0, 1]))
    assert (found.overlap, found.by_chance) == (pytest.approx(2 / 3), 0.5)  # 0 1 2 against 0 1 4
    assert math.isnan(agreement(alpha, torch.ones(2, 4), 0.5).correlation)
