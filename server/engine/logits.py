"""What a request changes in the model's logits before a token is chosen: forbidden tokens, biases and penalties.

In vLLM's order: tokens forbidden by min_tokens, logit_bias, repetition penalty, frequency penalty, presence penalty.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.server.engine.request import SamplingParams
from gossamer.server.engine.transfer import to_device


class SampleRow:
    """One choice as the sampler sees it: made once, told of every token, and independent of the batch it is in.

    `seed` is resolved by the engine (the request's or a random one, changed by the choice's index; any integer).
    `forbid` are the tokens that may not come before `params.min_tokens`: the model's end tokens (unless ignored) and
    the request's stop tokens. All ids must be below the number of logits. `output` are tokens chosen already, for a
    choice that is rebuilt.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        seed: int,
        prompt: Sequence[int] = (),
        output: Iterable[int] = (),
        forbid: Iterable[int] = (),
    ) -> None:
        self.params = params
        self.seed = seed
        self.step = 0  # tokens chosen so far
        self.forbid = np.array(sorted(set(forbid)) if params.min_tokens else [], dtype=np.int64)
        bias = dict(params.logit_bias)
        self.bias_ids = np.array(list(bias), dtype=np.int64)
        self.bias = np.array(list(bias.values()), dtype=np.float32)
        self.penalised = (
            params.presence_penalty != 0.0 or params.frequency_penalty != 0.0 or params.repetition_penalty != 1.0
        )
        self.repeats = params.repetition_penalty != 1.0
        self._prompt = prompt if self.repeats else ()
        self._prompt_seen: Tensor | None = None
        self._slots: dict[int, int] = {}  # token -> its place in the two arrays below
        self._ids = np.zeros(64, dtype=np.int64)
        self._counts = np.zeros(64, dtype=np.float32)
        for token in output:
            self.append(token)

    def append(self, token: int) -> None:
        """`token` has been chosen."""
        self.step += 1
        if not self.penalised:
            return
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        self._counts[slot] += 1

    def output_counts(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The different tokens chosen so far, and how often each was."""
        return self._ids[: len(self._slots)], self._counts[: len(self._slots)]

    def prompt_seen(self, vocab_size: int, device: torch.device) -> Tensor:
        """[vocab_size] bool: which tokens the prompt holds. Made once."""
        if self._prompt_seen is None or self._prompt_seen.device != device:
            seen = np.zeros(vocab_size, dtype=np.bool_)
            seen[np.asarray(self._prompt, dtype=np.int64)] = True
            self._prompt_seen = to_device(torch.from_numpy(seen), device)
        return self._prompt_seen


class Turn(NamedTuple):
    """A row's next token is due. Where the token before that is only on the device yet, `place` says where it lies
    among those of the step before."""

    row: SampleRow
    place: int | None = None

    @property
    def step(self) -> int:
        """Tokens chosen so far, on the host or not."""
        return self.row.step + (self.place is not None)

    @property
    def changed(self) -> bool:
        """Whether anything in this file touches the next token's logits."""
        return self.row.penalised or len(self.row.bias_ids) > 0 or self.forbids

    @property
    def forbids(self) -> bool:
        return self.step < self.row.params.min_tokens and len(self.row.forbid) > 0


def adjust(logits: Tensor, turns: Sequence[Turn], unread: Tensor | None = None) -> None:
    """Change `logits` [R, V] float32 in place. Every row depends on its own SampleRow alone, and on its token in
    `unread` [S] int64."""
    forbidden = _flat(logits, [(i, turn.row.forbid, None) for i, turn in enumerate(turns) if turn.forbids])
    if forbidden is not None:
        logits[forbidden[0], forbidden[1]] = -torch.inf
    biased = _flat(logits, [(i, t.row.bias_ids, t.row.bias) for i, t in enumerate(turns) if len(t.row.bias_ids)])
    if biased is not None:
        logits[biased[0], biased[1]] += biased[2]
    penalised = [(i, turn) for i, turn in enumerate(turns) if turn.row.penalised]
    if penalised:
        index = _to(logits, np.array([i for i, _ in penalised]))
        logits[index] = _penalised(logits[index], [turn for _, turn in penalised], unread)


def _penalised(logits: Tensor, turns: Sequence[Turn], unread: Tensor | None) -> Tensor:
    rows, counts = [turn.row for turn in turns], _counts(logits, turns, unread)
    factors = np.array(
        [[r.params.repetition_penalty, r.params.frequency_penalty, r.params.presence_penalty] for r in rows],
        dtype=np.float32,
    )
    repetition, frequency, presence = _to(logits, factors)[:, :, None].unbind(1)
    if any(row.repeats for row in rows):
        none = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        prompts = [row.prompt_seen(logits.shape[1], logits.device) if row.repeats else none for row in rows]
        seen = torch.stack(prompts) | (counts > 0)
        logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
    return torch.where(counts > 0, logits - (counts * frequency + presence), logits)


def _counts(logits: Tensor, turns: Sequence[Turn], unread: Tensor | None) -> Tensor:
    """[R, V] float32: how often each token was chosen so far."""
    counts = torch.zeros_like(logits)
    known = _flat(logits, [(n, *turn.row.output_counts()) for n, turn in enumerate(turns)])
    if known is not None:
        counts[known[0], known[1]] = known[2]
    late = [(n, turn.place) for n, turn in enumerate(turns) if turn.place is not None]
    if late:
        assert unread is not None
        row, place = _to(logits, np.array(late).T.copy()).unbind()
        counts[row, unread[place]] += 1
    return counts


def _flat(
    logits: Tensor, parts: Sequence[tuple[int, NDArray[np.int64], NDArray[np.float32] | None]]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """(row, tokens, values) of several rows, end to end on the device: row numbers, tokens, values. No (row, token)
    occurs twice.
    """
    if not parts:
        return None
    tokens = np.concatenate([ids for _, ids, _ in parts])
    if not len(tokens):
        return None
    assert tokens.min() >= 0 and tokens.max() < logits.shape[1], "a token id outside the model's vocabulary"
    rows = np.concatenate([np.full(len(ids), row) for row, ids, _ in parts])
    values = np.concatenate([np.zeros(len(ids), np.float32) if v is None else v for _, ids, v in parts])
    return _to(logits, rows), _to(logits, tokens), _to(logits, values)


def _to(logits: Tensor, values: NDArray[np.generic]) -> Tensor:
    return to_device(torch.from_numpy(values), logits.device)
