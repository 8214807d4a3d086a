"""What a request changes in the model's logits before a token is chosen: forbidden tokens, biases and penalties.

In vLLM's order: tokens forbidden by min_tokens, logit_bias, repetition penalty, frequency penalty, presence penalty.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.server.engine.request import SamplingParams


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

    @property
    def changed(self) -> bool:
        """Whether anything in this file touches the next token's logits."""
        return self.penalised or len(self.bias_ids) > 0 or self.forbids

    @property
    def forbids(self) -> bool:
        return self.step < self.params.min_tokens and len(self.forbid) > 0

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
            self._prompt_seen = torch.from_numpy(seen).to(device)
        return self._prompt_seen


def adjust(logits: Tensor, rows: Sequence[SampleRow]) -> None:
    """Change `logits` [R, V] float32 in place. Every row depends on its own SampleRow alone."""
    forbidden = _flat(logits, [(i, row.forbid, None) for i, row in enumerate(rows) if row.forbids])
    if forbidden is not None:
        logits[forbidden[0], forbidden[1]] = -torch.inf
    biased = _flat(logits, [(i, row.bias_ids, row.bias) for i, row in enumerate(rows) if len(row.bias_ids)])
    if biased is not None:
        logits[biased[0], biased[1]] += biased[2]
    penalised = [(i, row) for i, row in enumerate(rows) if row.penalised]
    if penalised:
        _penalise(logits, penalised)


def _penalise(logits: Tensor, rows: Sequence[tuple[int, SampleRow]]) -> None:
    seen_rows = [(i, row) for i, row in rows if row.repeats]
    if seen_rows:
        index = _to(logits, np.array([i for i, _ in seen_rows]))
        seen = torch.stack([row.prompt_seen(logits.shape[1], logits.device) for _, row in seen_rows])
        written = _flat(logits, [(n, row.output_counts()[0], None) for n, (_, row) in enumerate(seen_rows)])
        if written is not None:
            seen[written[0], written[1]] = True
        factor = _to(logits, np.array([[row.params.repetition_penalty] for _, row in seen_rows], dtype=np.float32))
        chosen = logits[index]
        logits[index] = torch.where(seen, torch.where(chosen > 0, chosen / factor, chosen * factor), chosen)
    parts = []
    for i, row in rows:
        ids, counts = row.output_counts()
        params = row.params
        if len(ids) and (params.frequency_penalty or params.presence_penalty):
            parts.append(
                (i, ids, -(counts * np.float32(params.frequency_penalty) + np.float32(params.presence_penalty)))
            )
    counted = _flat(logits, parts)
    if counted is not None:
        logits[counted[0], counted[1]] += counted[2]


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
    return torch.from_numpy(values).to(logits.device, non_blocking=True)
