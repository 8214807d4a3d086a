"""A server at a URL: any that speaks OpenAI's API. One of ours also lets each request choose its operating point."""

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any

from gossamer.server.eval.question import Answer, EvalError, Likelihood, Passage, Question, Use

AT_ONCE = 8  # requests about one document
TIMEOUT = 3600.0  # seconds; a long prompt is silent until its reply is whole
SERVED = "served"  # the only point of a server that has none


class Remote:
    """Raises EvalError with one sentence."""

    def __init__(self, url: str, model: str, key: str | None, asked: Sequence[str]) -> None:
        """asked: operating points; none for all that the server offers. Its dense one, if there is one, comes first."""
        self._url = url.rstrip("/")
        self._fingerprints: dict[str, str] = {}
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        card = _card(self._call("/models"), model, self._url)
        self._model: str = card["id"]
        self._most: int | None = card.get("max_model_len")
        offered: list[str] = card.get("attention_policies") or []
        self._ours = bool(offered)
        for point in asked:
            if point not in offered and point != "dense":
                has = f"it offers {', '.join(offered)}" if offered else "it offers none, so leave --policy out"
                raise EvalError(f"The server has no operating point {point!r} that requests may choose; {has}.")
        self.baseline = self._dense(offered)
        chosen = [point for point in asked if point != "dense"] or offered or [SERVED]
        first = [] if self.baseline is None else [self.baseline]
        self.points = tuple(dict.fromkeys([*first, *([] if set(asked) == {"dense"} else chosen)]))
        if not self.points:
            raise EvalError("The server has no dense operating point that requests may choose; name another --policy.")

    def check_length(self, longest: int) -> None:
        """Before anything is asked: a prompt and its reply have so many tokens at most."""
        if self._most is not None and longest > self._most:
            raise EvalError(
                f"The longest request has {longest} tokens, but the server takes {self._most}; give shorter --lengths."
            )

    def ask(self, point: str, questions: Sequence[Question]) -> list[Answer]:
        first = self._ask(point, questions[0])
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return [first, *pool.map(lambda question: self._ask(point, question), questions[1:])]

    def read(self, point: str, passage: Passage) -> Likelihood:
        """By echo with log-probabilities. One token is generated, since some servers refuse to generate none."""
        body = {"prompt": list(passage.tokens), "max_tokens": 1, "echo": True, "logprobs": 1}
        given = self._call("/completions", self._body(point, body))
        try:
            logprobs = given["choices"][0]["logprobs"]["token_logprobs"][: len(passage.tokens)]
            scored = tuple(float(each) for each in logprobs[-passage.scored :])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise EvalError(
                "The server gives no log-probabilities of prompts (echo with logprobs), which perplexity needs; leave "
                "that suite out."
            ) from error
        if len(logprobs) != len(passage.tokens):
            raise EvalError(
                f"The server read {len(logprobs)} tokens where {len(passage.tokens)} were sent; give MODEL the model "
                "that it serves."
            )
        return Likelihood(scored, _use(given))

    def fingerprints(self) -> dict[str, str]:
        return dict(self._fingerprints)

    def _ask(self, point: str, question: Question) -> Answer:
        if question.chat:
            given = self._call("/chat/completions", self._body(point, {"messages": list(question.chat)}, question.most))
        else:
            given = self._call("/completions", self._body(point, {"prompt": question.prompt}, question.most))
        try:
            choice = given["choices"][0]
            text = choice["message"]["content"] if question.chat else choice["text"]
        except (KeyError, IndexError, TypeError) as error:
            raise EvalError(f"The server at {self._url} did not answer as OpenAI's API does.") from error
        if isinstance(said := given.get("system_fingerprint"), str):
            self._fingerprints[point] = said
        return Answer(text or "", _use(given))

    def _body(self, point: str, own: dict[str, Any], most: int | None = None) -> dict[str, Any]:
        """Greedy, whatever the model's own defaults are."""
        body: dict[str, Any] = {"model": self._model, **own, "temperature": 0}
        if most is not None:
            body["max_tokens"] = most
        if self._ours:  # others may not know these fields
            body |= {"attention": {"policy": point}, "repetition_penalty": 1.0}
            body |= {"presence_penalty": 0, "frequency_penalty": 0}
        return body

    def _dense(self, offered: Sequence[str]) -> str | None:
        """The first point offered that says it is dense by its policy, not for want of length."""
        for point in offered:
            given = self._call("/completions", self._body(point, {"prompt": "Hello"}, 1))
            if (given.get("usage", {}).get("attention") or {}).get("dense_because") == "policy":
                return point
        return None

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self._url + path, data, self._headers)
            with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                given = json.load(reply)
        except urllib.error.HTTPError as error:
            raise EvalError(f"The server at {self._url} refused {path}: {_reason(error)}") from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise EvalError(
                f"The server at {self._url} cannot be reached ({reason}); start it, or give another --url."
            ) from error
        except ValueError as error:
            raise EvalError(
                f"{self._url}{path} is not OpenAI's API; give the base URL, such as http://127.0.0.1:8000/v1."
            ) from error
        if not isinstance(given, dict):
            raise EvalError(f"The server at {self._url} did not answer as OpenAI's API does.")
        return given


def _card(listed: dict[str, Any], model: str, url: str) -> dict[str, Any]:
    """Of the model that is meant: the one of this name, or the only one served (under whatever names)."""
    cards = listed.get("data")
    if not isinstance(cards, list) or not cards or not all(isinstance(c, dict) and "id" in c for c in cards):
        raise EvalError(f"The server at {url} lists no models.")
    named: list[dict[str, Any]] = [card for card in cards if model in (card["id"], card.get("root"))]
    if not named and len({card.get("root") or card["id"] for card in cards}) > 1:
        names = ", ".join(str(card["id"]) for card in cards)
        raise EvalError(f"The server at {url} serves {names}; give one of these as MODEL.")
    return (named or cards)[0]


def _use(given: dict[str, Any]) -> Use:
    """From `usage`; what a server does not say is 0 or None."""
    usage = given.get("usage") or {}
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    read = usage.get("attention") or {}
    return Use(
        usage.get("prompt_tokens") or 0,
        cached,
        usage.get("completion_tokens") or 0,
        read.get("prefill_density"),
        read.get("decode_density"),
    )


def _reason(error: urllib.error.HTTPError) -> str:
    """The server's own sentence, or its status."""
    try:
        said = json.load(error)["error"]["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"status {error.code}."
    text = " ".join(str(said).split())[:300]
    return text if text.endswith(".") else f"{text}."
