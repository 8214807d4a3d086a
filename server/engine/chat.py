"""The model's chat format: messages in, one text out, with the control tokens that clients spelled kept apart from the
template's own.
"""

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerFast

from gossamer.server.engine.request import InvalidRequest

_LAST_PRIVATE = 0x10FFFD  # the end of Unicode's private use areas
_FIRST_PRIVATE = 0xF0000


class ChatTemplate:
    """The Jinja template of a tokenizer, rendered in transformers' sandbox."""

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        """Raises ValueError when the template is not valid Jinja."""
        self._fast = fast
        template = fast.chat_template
        self.present = isinstance(template, str) or (isinstance(template, dict) and "default" in template)
        self._reserved = {
            *inspect.signature(fast.apply_chat_template).parameters,
            *fast.special_tokens_map,
            "messages",
            "conversations",
        }
        self._takes_lists = self.present and self._renders_parts()

    def render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[Any] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: dict[str, Any],
    ) -> str:
        """Raises InvalidRequest when there is no template, when it refuses, or when a variable has a name that is not
        free.
        """
        if not self.present:
            raise InvalidRequest(
                "This model has no chat template; use /v1/completions or start the server with --chat-template.",
                param="messages",
            )
        if taken := sorted(self._reserved & variables.keys()):
            raise InvalidRequest(f"chat_template_kwargs must not set {taken[0]}.", param="chat_template_kwargs")
        if not messages:
            raise InvalidRequest("messages must hold at least one message.", param="messages")
        if add_generation_prompt and continue_final_message:
            raise InvalidRequest(
                "continue_final_message needs add_generation_prompt set to false.", param="continue_final_message"
            )
        try:
            text = self._fast.apply_chat_template(
                messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **variables,
            )
        except Exception as error:  # a template can fail in any way that an expression can
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {_reason(error)}.", param="messages"
            ) from error
        return str(text)

    def plain_messages(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Messages as templates want them: text parts joined by newlines unless the template takes lists, no null
        content (except beside tool calls, where it is left out), and arguments of tool calls as objects.
        """
        return [self._plain_message(message) for message in messages]

    def _plain_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        plain = dict(message)
        content = plain.get("content")
        if isinstance(content, list | tuple):
            texts = [part if isinstance(part, str) else _part_text(part) for part in content]
            plain["content"] = (
                [{"type": "text", "text": text} for text in texts] if self._takes_lists else "\n".join(texts)
            )
        elif content is None and not plain.get("tool_calls"):
            plain["content"] = ""
        if plain.get("tool_calls"):
            plain["tool_calls"] = [_plain_call(call) for call in plain["tool_calls"]]
        return plain

    def _renders_parts(self) -> bool:
        """Whether the template prints the text of a list of parts, found by trying."""
        word = "gossamerprobe"

        def rendered(content: Any) -> str:
            try:
                text = self._fast.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
            except TemplateSyntaxError as error:
                raise ValueError(f"The chat template is not valid: {_reason(error)} (line {error.lineno}).") from error
            except Exception:  # some templates want more than a user's message, or no list
                return ""
            return str(text)

        listed = rendered([{"type": "text", "text": word}])
        return word in listed and listed == rendered(word)


class Masks:
    """Hides the spellings of control tokens in a client's strings behind private characters, one for each spelling,
    which no string of the request holds. A single character cannot be cut in two by a template, and has no case and no
    white space.
    """

    def __init__(self, controls: Iterable[str]) -> None:
        spellings = set(controls)
        # "<|" alone is hidden, too: a template that cuts or joins strings must not make a token of two halves.
        heads = {spelling[:2] for spelling in spellings if spelling[:2] in ("<|", "<｜")}
        longest_first = sorted(spellings | heads, key=lambda spelling: (-len(spelling), spelling))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._masks: dict[str, str] = {}  # what is hidden -> private character
        self._starts = {spelling[:2] for spelling in spellings}
        self._given: Any = None
        self._free: Iterator[str] | None = None  # private characters that the request does not use

    def __bool__(self) -> bool:
        return bool(self._masks)

    def hide(self, value: dict[str, Any]) -> dict[str, Any]:
        """`value` (strings, lists, dicts, numbers) with the spellings in all its strings hidden, keys included.

        To be called once, with everything that the template will see.
        """
        self._given = value
        return {name: self._hidden(item) for name, item in value.items()}

    def show(self, text: str) -> str:
        """A rendered text with what was hidden, as it was; also where the template wrote it as a JSON escape."""
        for spelling, mask in self._masks.items():
            text = text.replace(mask, spelling)
            text = text.replace(json.dumps(mask)[1:-1], json.dumps(spelling)[1:-1])
        return text

    def count(self, text: str) -> int:
        """How many control tokens `text` spells."""
        return len(self._pattern.findall(text))

    def _hidden(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._hide_parts([value])[0]
        if isinstance(value, Mapping):
            return {self._hidden(key): self._hidden(item) for key, item in value.items()}
        if not isinstance(value, list | tuple):
            return value
        if value and all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value):
            texts = self._hide_parts([part["text"] for part in value])  # templates print text parts side by side
            return [
                {**self._hidden({**part, "text": ""}), "text": text} for part, text in zip(value, texts, strict=True)
            ]
        return [self._hidden(item) for item in value]

    def _hide_parts(self, texts: list[str]) -> list[str]:
        """Hides spellings, also those that begin in one text and end in a later one."""
        joined = "".join(texts)
        if not any(start in joined for start in self._starts):
            return texts
        spans = [match.span() for match in self._pattern.finditer(joined)]
        result, offset = [], 0
        for text in texts:
            pieces, at = [], 0
            for begin, end in spans:
                low, high = max(begin - offset, 0), min(end - offset, len(text))
                if low < high:
                    pieces += [text[at:low], self._mask(text[low:high])]
                    at = high
            result.append("".join([*pieces, text[at:]]))
            offset += len(text)
        return result

    def _mask(self, spelling: str) -> str:
        if spelling not in self._masks:
            if self._free is None:
                taken = {char for text in _strings(self._given) for char in text if ord(char) >= _FIRST_PRIVATE}
                self._free = (
                    mask for code in range(_LAST_PRIVATE, _FIRST_PRIVATE, -1) if (mask := chr(code)) not in taken
                )
            try:
                self._masks[spelling] = next(self._free)
            except StopIteration:
                raise InvalidRequest(
                    "The messages use up Unicode's private characters; leave some out.", param="messages"
                ) from None
        return self._masks[spelling]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _part_text(part: Any) -> str:
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise InvalidRequest("Message contents may hold parts of type text only.", param="messages")


def _plain_call(call: Any) -> Any:
    """OpenAI's clients send the arguments of a tool call as JSON text; templates want the object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _reason(error: Exception) -> str:
    """The first line of what went wrong, short and without a full stop."""
    line = (str(error).strip() or type(error).__name__).partition("\n")[0]
    return (line[:200] + "…" if len(line) > 200 else line).rstrip(".")
