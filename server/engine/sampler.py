"""From logits to tokens, for a whole batch at once.

A choice's token depends on its own logits, parameters, seed and step: not on its batch mates, not on whether it was
preempted. Each token uses one uniform number, a hash of (seed, step), against the cumulative distribution over the
vocabulary. The distribution is held as integers (40 bits below the most likely token's weight), because integer sums do
not depend on the order of summation, which on a GPU changes with the size of the batch.

Order, as in vLLM: forbidden tokens, logit_bias, penalties (logits.py), temperature, min_p, top_k, top_p. top_p counts
the mass of what min_p and top_k left. Ties are broken towards the smaller token id. Log-probabilities are those of the
model, before all of this.
"""

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gossamer.server.engine.logits import SampleRow, Turn, adjust
from gossamer.server.engine.request import TokenLogprob
from gossamer.server.engine.transfer import numbers_to_device, to_device

_UNIT = 1 << 40  # weight of the most likely token; a million tokens still sum up below 2**63
_ID_BITS = 20  # vocabularies of up to a million tokens
_LEAST = -9999.0  # in place of minus infinity, which JSON cannot hold
_CACHED = 1 << 17  # logits that a CPU works on at a time
_CHUNK = 1 << 24  # logits that any other device works on at a time


@dataclass(frozen=True, slots=True)
class Sampled:
    """The next token of one choice. `finite` is False when the model's logits held NaN or infinity: the token then
    means nothing.
    """

    token: int
    logprob: TokenLogprob | None
    finite: bool


@dataclass(frozen=True, slots=True)
class Draw:
    """The next tokens of a batch, still on the device."""

    tokens: Tensor  # [R] int64
    table: Tensor  # [R, 2 + ...] float64: the token, whether the logits were finite, log-probabilities where asked for
    wanted: tuple[int | None, ...]  # per row, its `logprobs`

    def read(self, table: Tensor) -> list[Sampled]:
        """What each row gets. `table`: the same numbers on the host."""
        return [
            Sampled(
                token=int(line[0]),
                logprob=_read(int(line[0]), line[2:], wanted) if line[1] else None,
                finite=bool(line[1]),
            )
            for line, wanted in zip(table.tolist(), self.wanted, strict=True)
        ]


class Sampler:
    """Chooses the next tokens, and scores given ones. Holds no state, and never reads the device."""

    def draw(self, logits: Tensor, turns: Sequence[Turn], unread: Tensor | None = None) -> Draw:
        """`logits` [R, V] float, one row per turn, left unchanged; R at least 1, V at most 2**20. The rows are not told
        of their tokens here. `unread`: the tokens of the step before, where a turn says that its row's lies there.
        """
        assert logits.shape[0] == len(turns) > 0 and logits.shape[1] <= 1 << _ID_BITS
        peak, token = logits.max(dim=1)  # the first of equal maxima; NaN when there is one
        finite = peak.isfinite()
        scores = logits
        if any(turn.changed for turn in turns):
            scores = logits.to(torch.float32, copy=True)
            adjust(scores, turns, unread)
            peak, token = scores.max(dim=1)
        drawn = [i for i, turn in enumerate(turns) if not turn.row.params.greedy]
        if drawn:
            some = _draw_all(_select(scores, drawn), _select(peak, drawn), [turns[i] for i in drawn])
            token = some if len(drawn) == len(turns) else token.index_copy(0, _index(drawn, logits), some)
        columns = [token.double()[:, None], finite.double()[:, None]]
        wanted = tuple(turn.row.params.logprobs for turn in turns)
        asked = [(i, top) for i, top in enumerate(wanted) if top is not None]
        if asked:
            index = [i for i, _ in asked]
            most = min(max(top for _, top in asked), logits.shape[1])
            part = _logprobs_all(_select(logits, index), _select(token, index), most)
            columns.append(part.new_zeros(len(turns), part.shape[1]).index_copy(0, _index(index, logits), part))
        return Draw(token, torch.cat(columns, dim=1), wanted)  # float64 holds ids and float32 exactly

    def score(self, logits: Tensor, next_tokens: Sequence[int], top: int) -> Tensor:
        """Log-probabilities of given tokens, for `read_scores`. `logits` [N, V], row i before `next_tokens[i]`; `top`:
        how many of the most likely, too. -> [N, 2 + 2 * top] float64.
        """
        assert logits.shape[0] == len(next_tokens)
        tokens = numbers_to_device(next_tokens, logits.device)
        top = min(top, logits.shape[1])
        if not len(next_tokens):
            return torch.zeros(0, 2 + 2 * top, dtype=torch.float64, device=logits.device)
        return torch.cat([tokens.double()[:, None], _logprobs_all(logits, tokens, top)], dim=1)


def read_scores(table: Tensor) -> list[TokenLogprob] | None:
    """What `Sampler.score` found, on the host. None when the logits held NaN or infinity."""
    lines = table.tolist()
    if any(line[1] != line[1] for line in lines):
        return None
    return [TokenLogprob(int(line[0]), line[1], _top(line[2:])) for line in lines]


def uniform(seed: int, step: int) -> float:
    """The number in [0, 1) that chooses token `step` of a choice: 53 bits of a hash of (seed, step). Any integers."""
    key = struct.pack("<QQ", seed & (2**64 - 1), step & (2**64 - 1))
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def _parts(logits: Tensor) -> list[slice]:
    """Rows to work on at a time: on a CPU so few that what is written is still in the cache when it is read, elsewhere
    so few that float64 copies do not fill the memory.
    """
    height = max(1, (_CACHED if logits.device.type == "cpu" else _CHUNK) // logits.shape[1])
    return [slice(i, i + height) for i in range(0, logits.shape[0], height)]


def _draw_all(scores: Tensor, peak: Tensor, turns: Sequence[Turn]) -> Tensor:
    return torch.cat([_draw(scores[part].float(), peak[part].float(), turns[part]) for part in _parts(scores)])


def _logprobs_all(logits: Tensor, tokens: Tensor, top: int) -> Tensor:
    return torch.cat([_logprobs(logits[part], tokens[part], top) for part in _parts(logits)])


def _draw(scores: Tensor, peak: Tensor, turns: Sequence[Turn]) -> Tensor:
    """[D] tokens by chance from `scores` [D, V] float32; `peak` [D] holds each row's maximum."""
    rows = [turn.row for turn in turns]
    numbers = [(max(turn.row.params.temperature, 1e-5), uniform(turn.row.seed, turn.step)) for turn in turns]
    host = to_device(torch.tensor(numbers, dtype=torch.float64), scores.device)
    relative = (scores - peak[:, None]).div_(host[:, :1].float()).double()
    weights = relative.exp_().mul_(_UNIT).round_().long()
    weights.masked_fill_(scores == peak[:, None], _UNIT)  # also where every token is forbidden: infinity minus infinity
    filtered = [i for i, row in enumerate(rows) if row.params.top_p < 1 or row.params.top_k > 0 or row.params.min_p > 0]
    if filtered:
        kept = _filtered(_select(weights, filtered), [rows[i] for i in filtered])
        weights = kept if len(filtered) == len(rows) else weights.index_copy_(0, _index(filtered, scores), kept)
    mass = weights.cumsum(dim=1)
    total = mass[:, -1:]
    target = (host[:, 1:] * total).floor().long().clamp_(max=total - 1)
    # The first token with mass above the target, so never one of weight 0; the bound is for rows that are not finite.
    return torch.searchsorted(mass, target, right=True)[:, 0].clamp_(max=scores.shape[1] - 1)


def _filtered(weights: Tensor, rows: Sequence[SampleRow]) -> Tensor:
    """[D, V] weights with those outside min_p, top_k and top_p set to 0. The most likely token always stays."""
    vocab = weights.shape[1]
    numbers = [(row.params.min_p, row.params.top_k or vocab, row.params.top_p) for row in rows]
    host = to_device(torch.tensor(numbers, dtype=torch.float64), weights.device)
    least, depth, share = host[:, :1], host[:, 1:2], host[:, 2:]
    weights = weights.masked_fill(weights < (least * _UNIT).ceil(), 0)
    deepest = min(vocab, max(row.params.top_k or vocab for row in rows))
    if deepest == vocab and all(row.params.top_p == 1 and not row.params.top_k for row in rows):
        return weights
    # One integer orders tokens by weight and then by id, so equal weights are cut at the same place everywhere.
    order = (weights << _ID_BITS) | torch.arange(vocab - 1, -1, -1, device=weights.device)
    ranked = (_ranked_on_cpu if order.device.type == "cpu" else _ranked_on_gpu)(order, deepest)
    mass = (ranked >> _ID_BITS).masked_fill(torch.arange(deepest, device=weights.device) >= depth, 0)
    up_to = mass.cumsum(dim=1)
    keep = (mass > 0) & (up_to - mass < share * up_to[:, -1:])
    last = ranked.masked_fill(~keep, torch.iinfo(torch.int64).max).amin(dim=1, keepdim=True)
    return weights.masked_fill(order < torch.minimum(last, ranked[:, :1]), 0)


def _ranked_on_cpu(order: Tensor, deepest: int) -> Tensor:
    """The largest `deepest` of each row, largest first. NumPy sorts integers some 15 times faster than torch."""
    return torch.from_numpy(np.sort(order.numpy(), axis=1)).flip(1)[:, :deepest]


def _ranked_on_gpu(order: Tensor, deepest: int) -> Tensor:
    if 4 * deepest < order.shape[1]:
        return order.topk(deepest, dim=1).values
    return order.sort(dim=1, descending=True).values[:, :deepest]


def _logprobs(logits: Tensor, tokens: Tensor, top: int) -> Tensor:
    """[N, 1 + 2 * top] float64 on the device: the token's log-probability, then the ids and log-probabilities of the
    most likely.
    """
    exact = logits.double()
    lse = exact.logsumexp(dim=1, keepdim=True)
    found = tokens[:, None]
    lse = lse.where(lse.isfinite(), torch.nan)
    parts = []
    if top:
        bits = logits.float().view(torch.int32)
        bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # integers in the order of the floats
        ids = torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
        ranked = ((bits << 32) | ids).topk(top, dim=1).values
        best = logits.shape[1] - 1 - (ranked & 0xFFFFFFFF)
        found = torch.cat([found, best], dim=1)
        parts = [best.double()]
    # Rounded to float32 once for the token and the list alike, so that equal tokens have equal floats.
    values = (exact.gather(1, found) - lse).float().clamp_(min=_LEAST).double()
    return torch.cat([values[:, :1], *parts, values[:, 1:]], dim=1)


def _read(token: int, line: list[float], wanted: int | None) -> TokenLogprob | None:
    if wanted is None:
        return None
    return TokenLogprob(token, line[0], _top(line[1:])[:wanted])


def _top(line: list[float]) -> tuple[tuple[int, float], ...]:
    half = len(line) // 2
    return tuple(zip(map(int, line[:half]), line[half:], strict=True))


def _index(rows: list[int], like: Tensor) -> Tensor:
    return numbers_to_device(rows, like.device)


def _select(values: Tensor, rows: list[int]) -> Tensor:
    """The rows named, in order: `values` itself when that is all of them."""
    return values if len(rows) == values.shape[0] else values[_index(rows, values)]
