"""The request bodies: which fields there are, of which types, and what is done about all others.

Explicit null means "not given" everywhere. A field is either used, or accepted because it cannot change the answer
(NEUTRAL), or accepted with the one value that asks for nothing (ONLY), or refused by name. Ranges are checked where
they are meant: in SamplingParams and Request.
"""

import difflib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import PydanticCustomError

from gossamer.server.engine.request import MAX_LOGIT_BIAS, MAX_STOP_STRINGS, MAX_STOP_TOKENS, InvalidRequest

MAX_MESSAGES = 8192
MAX_PARTS = 1024  # of one message
MAX_TEXT_OPTION = 256  # characters of a string in chat_template_kwargs

# Cannot change the answer: labels, bookkeeping at OpenAI, hints for speed.
NEUTRAL = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "prediction",
        "parallel_tool_calls",
    }
)
# Accepted with a value that asks for nothing.
ONLY: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "response_format": ({"type": "text"},),
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "verbosity": ("medium",),
        "bad_words": ([],),
        "use_beam_search": (False,),
        "length_penalty": (1, 1.0),
        "spaces_between_special_tokens": (True,),
        "detokenize": (True,),
        "audio": (),
        "web_search_options": (),
        "suffix": (),
        "chat_template": (),
        "documents": (),
        "allowed_token_ids": (),
        "prompt_logprobs": (),
        "truncate_prompt_tokens": (),
        "structured_outputs": (),
        "guided_json": (),
        "guided_regex": (),
        "guided_choice": (),
        "guided_grammar": (),
        "logits_processors": (),
    }
)


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _short(most: int) -> BeforeValidator:
    """Refuses a list or mapping with too many entries before its entries are looked at."""

    def check(value: object) -> object:
        if isinstance(value, list | dict) and len(value) > most:
            raise PydanticCustomError("too_long", "may hold at most {most} entries", {"most": most})
        return value

    return BeforeValidator(check)


def _text_of(content: object) -> object:
    """A message's content as one text: its text parts, joined by newlines."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise PydanticCustomError("content", "must be a text or a list of text parts")
    if len(content) > MAX_PARTS:
        raise PydanticCustomError("content", "may hold at most {most} parts", {"most": MAX_PARTS})
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise PydanticCustomError("content", "must hold parts of the form {'type': 'text', 'text': …}")
        if part["type"] != "text":
            raise PydanticCustomError("content", "may hold text only; this server does not read images, audio or files")
        if not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
            raise PydanticCustomError("content", "must hold parts of the form {'type': 'text', 'text': …}")
    return "\n".join(part["text"] for part in content)


def _role(role: object) -> object:
    if role in ("tool", "function"):
        raise PydanticCustomError("role", "must be system, developer, user or assistant; tools are not supported")
    if role not in ("system", "developer", "user", "assistant"):
        raise PydanticCustomError("role", "must be system, developer, user or assistant")
    return role


def _nothing(value: object) -> object:
    if value not in (None, [], ""):
        raise PydanticCustomError("unsupported", "is not supported; leave it out")
    return None


def _template_options(value: object) -> object:
    if not isinstance(value, dict) or len(value) > 16:
        raise PydanticCustomError("options", "must be a small object")
    for option in value.values():
        if not isinstance(option, bool | int | str) or (isinstance(option, str) and len(option) > MAX_TEXT_OPTION):
            raise PydanticCustomError("options", "may hold true, false, whole numbers and short texts")
    return value


Finite = Annotated[float, Field(allow_inf_nan=False)]
Texts = Annotated[list[str], FailFast(), BeforeValidator(_one_or_many), _short(MAX_STOP_STRINGS)]
Tokens = Annotated[list[int], FailFast(), _short(MAX_STOP_TOKENS)]
Biases = Annotated[dict[str, Finite], _short(MAX_LOGIT_BIAS)]
Unused = Annotated[None, BeforeValidator(_nothing)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Message(_Body):
    role: Annotated[str, BeforeValidator(_role)]
    content: Annotated[str, BeforeValidator(_text_of)]
    name: Annotated[str, Field(max_length=MAX_TEXT_OPTION)] | None = None
    tool_calls: Unused = None
    function_call: Unused = None
    audio: Unused = None
    refusal: Unused = None
    annotations: Unused = None


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # padding against eavesdroppers; there is none to leave out


class AttentionChoice(_Body):
    """Which operating point of the attention policy answers."""

    policy: Annotated[str, Field(min_length=1, max_length=64)] | None = None


class Sampling(_Body):
    """What chat and completions share."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: Finite | None = None
    top_p: Finite | None = None
    top_k: int | None = None
    min_p: Finite | None = None
    presence_penalty: Finite = 0.0
    frequency_penalty: Finite = 0.0
    repetition_penalty: Finite | None = None
    seed: int | None = None
    stop: Texts = Field(default_factory=list)
    stop_token_ids: Tokens = Field(default_factory=list)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logit_bias: Biases = Field(default_factory=dict)
    priority: int = 0
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    attention: AttentionChoice | None = None
    return_token_ids: bool = False


class ChatTemplateFields(_Body):
    """How messages become a prompt."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1), _short(MAX_MESSAGES)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(_template_options)] = Field(default_factory=dict)


class ChatRequest(Sampling, ChatTemplateFields):
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None


class CompletionRequest(Sampling):
    prompt: Any = Field(description="A text, a list of texts, a list of token ids, or a list of lists of token ids.")
    echo: bool = False
    logprobs: int | None = None
    add_special_tokens: bool = True


class TokenizePrompt(_Body):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(ChatTemplateFields):
    model: str | None = None
    return_token_strs: bool = False


class DetokenizeRequest(_Body):
    model: str | None = None
    tokens: Any = Field(description="Token ids.")
    skip_special_tokens: bool = False


Body = TypeVar("Body", bound=_Body)


def read_fields(schema: type[Body], fields: Mapping[str, Any]) -> Body:
    """The checked body. Raises InvalidRequest that names the first field that is wrong."""
    given = {name: value for name, value in fields.items() if value is not None}
    for name in [name for name in given if name not in schema.model_fields]:
        value = given.pop(name)
        if name in NEUTRAL:
            continue
        if name not in ONLY:
            near = difflib.get_close_matches(name[:64], schema.model_fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise InvalidRequest(f"There is no field {name[:64]!r} here{hint}", param=name)
        if not any(type(value) is type(asked) and value == asked for asked in ONLY[name]):
            raise InvalidRequest(f"{name} is not supported by this server; leave it out.", param=name)
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = _path(first["loc"])
        message = first["msg"].removeprefix("Input ")
        if first["type"] == "extra_forbidden":
            message = "is not a field that is known here"
        elif first["type"] == "missing":
            message = "is required"
        raise InvalidRequest(f"{param} {message[0].lower()}{message[1:]}.", param=param) from None


def body_schema(schema: type[_Body]) -> dict[str, Any]:
    """What a route's OpenAPI entry says about its body, with every definition in place."""
    whole = schema.model_json_schema()
    definitions = whole.pop("$defs", {})

    def inlined(value: Any) -> Any:
        if isinstance(value, dict):
            name = value.get("$ref", "").removeprefix("#/$defs/")
            return inlined(definitions[name]) if name else {k: inlined(v) for k, v in value.items()}
        return [inlined(item) for item in value] if isinstance(value, list) else value

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inlined(whole)}}}}


def read_tokens(value: object, param: str, vocab_size: int) -> list[int]:
    """A list of token ids, checked. Raises InvalidRequest."""
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise InvalidRequest(f"{param} must hold token ids, that is, whole numbers only.", param=param)
    if value and not 0 <= min(value) <= max(value) < vocab_size:
        raise InvalidRequest(f"{param} holds a token id outside the vocabulary (0 to {vocab_size - 1}).", param=param)
    return value


def _path(location: Sequence[int | str]) -> str:
    """("messages", 0, "content") is messages[0].content."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part[:64]}" if text else part[:64]
    return text
