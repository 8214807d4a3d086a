"""Which heads can stream: DuoAttention's trained α (Xiao et al. 2024, arXiv 2410.10819).

Each KV head's output is mixed, α * full + (1 - α) * streaming attention, with one α per head and all weights frozen.
α falls where that leaves the model's final states at the answers as they are: heads that need far tokens keep theirs.

    texts = Passkeys(filler, encode_chat, shortest=1024, longest=32768)
    alpha = train_heads(module, texts, steps=500, report=print)
    stream = streaming_heads(alpha, share=0.5)
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from gossamer.attention.profiling.differentiable import Logits, full_attention, streaming_attention
from gossamer.attention.profiling.passkeys import TrainingText

MIXTURE = "gossamer-mixture"  # the name that our attention function has inside transformers
SCALE = 2.0**14  # of the loss while it is differentiated, so that float16 holds what the mean leaves of a state's slope
RAMP = 0.2  # share of the steps in which the rate rises, and of those in which it falls


@dataclass(frozen=True, slots=True)
class Mixture:
    """What a pass makes of the attention of each layer. windows: per layer, the model's own (None: none); alpha
    [layers, KV heads], or None for the model as it is."""

    windows: tuple[int | None, ...]
    alpha: Tensor | None
    sink: int
    recent: int


def train_heads(
    module: nn.Module,
    texts: Callable[[int], TrainingText],
    *,
    steps: int,
    sink: int = 64,
    recent: int = 256,
    rate: float = 0.02,
    penalty: float = 0.05,
    report: Callable[[int, float], None],
) -> Tensor:
    """α of a causal language model of transformers -> [layers, KV heads] float32 in 0..1, NaN in layers that have a
    sliding window of their own: they stream already, and are left as they are.

    Step n reads texts(n) twice: as the model is, and mixed. The loss is the mean squared difference of the final states
    where they decide answers, relative to their own mean square, plus `penalty` times the mean α; Adam takes steps of
    `rate`, which rises over the first fifth and falls over the last. `report` gets each step's number and loss.
    One layer's activations are in memory at a time, and the states between layers. The model's weights, attention and
    mode are as before afterwards. Deterministic on a CPU; on a GPU but for the order in which its kernels add.
    Raises ValueError when every layer has a window, or a text has no decisive token.
    """
    with mixing(module) as (windows, kv_heads):
        device = next(module.parameters()).device
        free = torch.tensor([window is None for window in windows], device=device)
        if not free.any():
            raise ValueError("every layer of this model has a sliding window of its own: there are no heads to train")
        alpha = torch.ones(len(windows), kv_heads, device=device, requires_grad=True)
        optimizer = torch.optim.Adam([alpha], lr=rate)
        for step in range(steps):
            text = texts(step)
            if not text.decisive.any():
                raise ValueError(f"training text {step} has no decisive token, so there is nothing to compare")
            mixture = Mixture(windows, alpha, sink, recent)
            loss = distance(module, text, mixture) + penalty * alpha[free].mean()
            (slope,) = torch.autograd.grad(loss * SCALE, [alpha])
            alpha.grad = slope / SCALE
            optimizer.param_groups[0]["lr"] = rate * _pace(step, steps)
            optimizer.step()
            with torch.no_grad():
                alpha.clamp_(0.0, 1.0)
            report(step, loss.item())
    return alpha.detach().where(free[:, None], torch.nan).cpu()


def streaming_distance(
    module: nn.Module, texts: Sequence[TrainingText], stream: Tensor, *, sink: int = 64, recent: int = 256
) -> float:
    """What `distance` is where the heads in `stream` [layers, KV heads] bool stream and no others do; the texts' mean.
    Layers with a window of their own are left as they are."""
    with mixing(module) as (windows, _):
        mixture = Mixture(windows, 1.0 - stream.float().to(next(module.parameters()).device), sink, recent)
        return sum(float(distance(module, text, mixture)) for text in texts) / len(texts)


def distance(module: nn.Module, text: TrainingText, mixture: Mixture) -> Tensor:
    """How far the final states that decide answers are from the model's own: mean squared, as a share of their mean
    square. DuoAttention takes no share; but the scale of final states is each family's own, and would decide how much
    streams at one penalty."""
    device = next(module.parameters()).device
    tokens, decisive = text.tokens.to(device), text.decisive.to(device)
    with torch.no_grad():
        wanted = final_states(module, tokens, replace(mixture, alpha=None))[decisive]
    found = final_states(module, tokens, mixture)[decisive]
    wide = torch.promote_types(wanted.dtype, torch.float32)
    found, wanted = found.to(wide), wanted.to(wide)
    return (found - wanted).square().mean() / wanted.square().mean()


def final_states(module: nn.Module, tokens: Tensor, mixture: Mixture) -> Tensor:
    """[T, E], what the language model's head reads of the tokens [T]."""
    decoder: Any = module.get_decoder()  # type: ignore[operator]
    places = torch.arange(tokens.numel(), device=tokens.device)
    with torch.set_grad_enabled(mixture.alpha is not None and mixture.alpha.requires_grad):
        output = decoder(input_ids=tokens[None], position_ids=places[None], use_cache=False, mixture=mixture)
    states: Tensor = output.last_hidden_state[0]
    return states


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: None,
    *,
    mixture: Mixture | dict[int, tuple[int, int | None]],
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D], as transformers' attention functions. Without a
    mixture it notes each layer's KV heads and window in the dict instead."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    q, k, v = query[0], key[0], value[0]
    if isinstance(mixture, dict):
        mixture[layer] = (k.shape[0], sliding_window)
        return torch.zeros_like(query).transpose(1, 2), None
    logits = Logits(scaling if scaling is not None else q.shape[2] ** -0.5, softcap, s_aux)
    window = mixture.windows[layer]
    if window is not None:
        return streaming_attention(q, k, v, logits, sink=0, recent=window).transpose(0, 1)[None], None
    out = full_attention(q, k, v, logits)
    if mixture.alpha is not None:
        streamed = streaming_attention(q, k, v, logits, sink=mixture.sink, recent=mixture.recent)
        alpha = mixture.alpha[layer].repeat_interleave(q.shape[0] // k.shape[0])[:, None, None]
        out = (alpha * out + (1.0 - alpha) * streamed).to(out.dtype)
    return out.transpose(0, 1)[None], None


def _shape(module: nn.Module) -> tuple[tuple[int | None, ...], int]:
    """Each layer's own window, and the number of KV heads, as the layers report them for one token."""
    seen: dict[int, tuple[int, int | None]] = {}
    device = next(module.parameters()).device
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with torch.no_grad():
        decoder: Any = module.get_decoder()  # type: ignore[operator]
        decoder(input_ids=zero, position_ids=zero, use_cache=False, mixture=seen)
    longest = int(getattr(module.config, "max_position_embeddings", 0)) or 2**20
    windows = (seen[layer][1] for layer in range(len(seen)))
    # one that no text outgrows is none
    return tuple(window if window is not None and window < longest else None for window in windows), seen[0][0]


@contextmanager
def mixing(module: Any) -> Iterator[tuple[tuple[int | None, ...], int]]:
    """The model with our attention, without gradients of weights, and with one layer's activations in memory, while
    `distance` and `final_states` are used; gives what a Mixture wants to know, and the number of KV heads."""
    AttentionInterface.register(MIXTURE, _attend)
    before, training = module.config._attn_implementation, module.training
    moving = [parameter for parameter in module.parameters() if parameter.requires_grad]
    layers = list(module.get_decoder().layers)
    own = [vars(layer).get("forward") for layer in layers]
    module.requires_grad_(False).eval().set_attn_implementation(MIXTURE)
    for layer in layers:
        layer.forward = partial(_again, layer.forward)
    try:
        yield _shape(module)
    finally:
        for layer, forward in zip(layers, own, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
        module.train(training).set_attn_implementation(before)
        for parameter in moving:
            parameter.requires_grad_(True)


def _again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The layer's pass, computed again when its gradient is wanted."""
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)


def _pace(step: int, steps: int) -> float:
    """The rate's share at a step: from a tenth to all over the first fifth, and down to nothing over the last."""
    ramp = RAMP * steps
    return min(1.0, 0.1 + 0.9 * step / ramp, (steps - step) / ramp)


def streaming_heads(alpha: Tensor, share: float, seed: int = 0) -> Tensor:
    """The `share` of heads with the least α, [layers, KV heads] bool, out of those that α is known of (not NaN).

    Exactly that many, rounded: DuoAttention cuts at a quantile, where many heads are alike; which of equal heads stream
    is drawn by `seed`.
    """
    places = _drawn(alpha.isfinite().flatten().nonzero()[:, 0], seed)
    order = places[alpha.flatten()[places].argsort(stable=True)]
    chosen = torch.zeros(alpha.numel(), dtype=torch.bool)
    chosen[order[: round(share * len(order))]] = True
    return chosen.view(alpha.shape)


def _drawn(places: Tensor, seed: int) -> Tensor:
    return places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))]


@dataclass(frozen=True, slots=True)
class Agreement:
    """How alike two rankings of heads are. correlation: Spearman's, NaN where one of them ranks all alike; overlap: the
    share of heads that stream by one that do so by the other; by_chance: what that would be of unrelated rankings."""

    correlation: float
    overlap: float
    by_chance: float


def agreement(alpha: Tensor, other: Tensor, share: float, seed: int = 0) -> Agreement:
    """Both [layers, KV heads], larger where a head needs more far tokens; heads that are NaN in either are left out."""
    known = alpha.isfinite() & other.isfinite()
    one, two = (torch.where(known, each.double(), torch.nan) for each in (alpha, other))
    ranks = torch.stack([_ranks(each[known]) for each in (one, two)])
    chosen = [streaming_heads(each, share, seed + n) for n, each in enumerate((one, two))]
    count = int(chosen[0].sum())
    both = int((chosen[0] & chosen[1]).sum())
    total = max(1, int(known.sum()))
    return Agreement(float(torch.corrcoef(ranks)[0, 1]), both / max(1, count), count / total)


def _ranks(values: Tensor) -> Tensor:
    """Places in ascending order; equal values share the mean of theirs."""
    below = (values[:, None] > values).sum(1).double()
    alike = (values[:, None] == values).sum(1).double()
    return below + (alike - 1.0) / 2.0
