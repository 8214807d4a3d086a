"""Log-probabilities in OpenAI's two shapes."""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any

from gossamer.server.api.facade import TextCoder
from gossamer.server.engine.request import TokenLogprob

LEAST = -9999.0  # JSON has no minus infinity


def spell(coder: TextCoder, token: int) -> str:
    """The token's text; bytes that are no whole characters are written as bytes:\\xe2\\x80."""
    raw = coder.token_bytes(token)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(coder: TextCoder, tokens: Sequence[TokenLogprob], top: int) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = spell(coder, token)
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(coder.token_bytes(token))}

    content = [
        {**entry(item.token, item.logprob), "top_logprobs": [entry(*other) for other in item.top[:top]]}
        for item in tokens
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """The older shape, whose text offsets run through all parts of one choice: the characters before a token, where
    one that several tokens spell counts with the last."""

    def __init__(self, coder: TextCoder, skip_special_tokens: bool) -> None:
        self._coder = coder
        self._skips = skip_special_tokens
        self._characters = getincrementaldecoder("utf-8")(errors="replace")
        self._offset = 0

    def part(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None], top: int) -> dict[str, Any]:
        """`logprobs` has one entry per token; None for the first token of a prompt."""
        spelled, values, tops, offsets = [], [], [], []
        for token, item in zip(tokens, logprobs, strict=True):
            text = spell(self._coder, token)
            spelled.append(text)
            values.append(None if item is None else max(item.logprob, LEAST))
            tops.append(None if item is None else self._top(item, top))
            offsets.append(self._offset)
            if not (self._skips and self._coder.decode([token]) == ""):  # a special token is not in the text
                self._offset += len(self._characters.decode(self._coder.token_bytes(token)))
        return {"tokens": spelled, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _top(self, item: TokenLogprob, top: int) -> dict[str, float]:
        """The most likely tokens and the token itself. Of two tokens with one spelling, the likelier one counts, so
        that a token is the map's maximum only if it is the most likely one."""
        named: dict[str, float] = {}
        for token, logprob in (*item.top[:top], (item.token, item.logprob)):
            named.setdefault(spell(self._coder, token), max(logprob, LEAST))
        return named
