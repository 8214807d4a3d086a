"""From sampled tokens to the text of one choice: when it ends, and what of it may be shown."""

from collections.abc import Collection
from dataclasses import dataclass

from gossamer.server.engine.detokenizer import Detokenizer
from gossamer.server.engine.request import Delta, FinishReason, TokenLogprob
from gossamer.server.engine.sampler import Sampled
from gossamer.server.engine.sequence import Sequence
from gossamer.server.engine.stops import StopChecker

NOT_FINITE = "The model computed no finite probabilities for this choice; try again, and report it if it happens again."


@dataclass(slots=True)
class Choice:
    """Turns each new token into a `Delta`. Touched by the engine thread alone."""

    sequence: Sequence
    detokenizer: Detokenizer
    stops: StopChecker
    eos_ids: Collection[int]
    max_length: int  # prompt and output together

    def accept(self, sampled: Sampled) -> Delta:
        """Append the token to the sequence and say what it adds; the last delta of the choice has a finish reason."""
        if not sampled.finite:
            return self.fail(NOT_FINITE)
        params, sequence, token = self.sequence.request.params, self.sequence, sampled.token
        sequence.append(token)
        logprobs = () if sampled.logprob is None else (sampled.logprob,)
        may_stop = sequence.generated > params.min_tokens or sequence.generated >= params.max_tokens
        named = token in params.stop_token_ids
        if may_stop and (named or (token in self.eos_ids and not params.ignore_eos)):
            text = self.detokenizer.push(token) if params.include_stop_str_in_output else ""
            text = self._rest(text)
            return self._delta(text, (token,), logprobs, "stop", token if named else None)
        text, stop = self._show(self.detokenizer.push(token))
        if stop is not None:
            return self._delta(text, (token,), logprobs, "stop", stop)
        if sequence.generated >= params.max_tokens or len(sequence.tokens) >= self.max_length:
            return self._delta(text + self._rest(""), (token,), logprobs, "length")
        return self._delta(text, (token,), logprobs)

    def finish_empty(self) -> Delta:
        """A choice that asked for no tokens."""
        return self._delta("", (), (), "length")

    def fail(self, message: str) -> Delta:
        """End the choice with an error, after the text that was ready."""
        return Delta(index=self.sequence.index, text="", tokens=(), finish_reason="error", message=message)

    def _show(self, text: str) -> tuple[str, str | None]:
        """What may be shown of new text, and the stop string that it completes."""
        if self.sequence.generated < self.sequence.request.params.min_tokens:
            return self.stops.skip(text), None
        return self.stops.push(text)

    def _rest(self, text: str) -> str:
        """All that was held back, once no stop string can come any more."""
        shown, stop = self._show(text + self.detokenizer.flush())
        return shown if stop is not None else shown + self.stops.flush()

    def _delta(
        self,
        text: str,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprob, ...],
        finish_reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
    ) -> Delta:
        return Delta(
            index=self.sequence.index,
            text=text,
            tokens=tokens,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )
