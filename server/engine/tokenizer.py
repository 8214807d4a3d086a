"""Text to tokens and back, through the checkpoint's own tokenizer.

Text that spells a special token stays text: what a client sends can never become a control token, only the chat
template's own words can. "Special" is what the tokenizer marks so, and whatever looks like `<|…|>`, which some
checkpoints forget to mark. Other added tokens (`<think>`, `<tool_call>`) are ordinary vocabulary: clients send them
back in earlier answers.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gossamer.server.engine.chat import ChatTemplate, Masks
from gossamer.server.engine.detokenizer import Detokenizer, decode
from gossamer.server.engine.request import InvalidRequest
from gossamer.server.engine.vocabulary import Vocabulary

_CONTROL_SHAPE = re.compile(r"<[|｜].+[|｜]>", re.DOTALL)
_REST = "\U0010ffff"  # a noncharacter, for all that is no added token
_KEEPING = ("ByteLevel", "Metaspace", "Digits", "Split", "Punctuation")  # pre-tokenisers that drop nothing
_PROBE = 8  # characters per token that exceeds() reads before it gives up on a text


class Tokenizer:
    """A checkpoint's tokenizer. Immutable once made; every method may be called from any thread and none holds the
    interpreter for long.
    """

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        """Use `load`; `fast` is ours from here on. Raises ValueError, one sentence, when it cannot be served."""
        self._backend: Backend = fast.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        self.vocabulary = Vocabulary(self._backend)
        added = self._backend.get_added_tokens_decoder()
        self._splitter = _only_added(self._backend)
        self._cuts = {self._splitter.token_to_id(token.content): i for i, token in added.items()}
        self._controls = {
            token.content: i
            for i, token in added.items()
            if token.content.strip() and (token.special or _CONTROL_SHAPE.fullmatch(token.content))
        }
        self._anchor = f"\U0010fffe{secrets.token_hex(16)}"  # an added token for us alone: no client can spell it
        self._text = _text_only(self._backend, self._controls, self._anchor)
        self._anchor_id = self._text.token_to_id(self._anchor)
        self._unsafe = self._spelled_by_the_model()
        # Tokens matched in normalised text, where another spelling may have become theirs. (Anything can be unknown.)
        self._loose = {
            i
            for i in self._controls.values()
            if added[i].normalized and i != fast.unk_token_id and self._backend.normalizer
        }
        self._widest = self._bytes_per_token()
        self._template = ChatTemplate(fast)
        self._info = _describe(fast)
        self.vocab_size = self.vocabulary.size
        self.special_ids = self.vocabulary.special_ids
        self.bos_id: int | None = fast.bos_token_id
        self.eos_id: int | None = fast.eos_token_id

    @classmethod
    def load(
        cls, directory_or_id: str, *, revision: str | None = None, chat_template: str | None = None
    ) -> "Tokenizer":
        """From a directory or a Hugging Face id. `chat_template`: a Jinja file, or the template itself, in place of the
        checkpoint's.

        Raises ValueError with one sentence.
        """
        fast = _load(directory_or_id, revision)
        if chat_template is not None:
            fast.chat_template = _read_template(chat_template)
        return cls(fast)

    @property
    def has_chat_template(self) -> bool:
        return self._template.present

    def encode(self, text: str, *, add_special_tokens: bool = True, max_tokens: int | None = None) -> list[int]:
        """Token ids of plain text. `add_special_tokens`: with what the tokenizer puts around a text (often the begin
        token).

        A text of more than `max_tokens` tokens is refused; one far longer, without tokenising all of it. Raises
        InvalidRequest.
        """
        if max_tokens is None:
            return self._encode_text(text, add_special_tokens)
        if self.exceeds(text, max_tokens):
            raise _too_long(None, max_tokens, "prompt")
        ids = self._encode_text(text, add_special_tokens)
        if len(ids) > max_tokens:
            raise _too_long(len(ids), max_tokens, "prompt")
        return ids

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation in the model's chat format: what transformers' apply_chat_template gives for the
        same messages.

        Contents may be strings, None, or lists of text parts. `template_kwargs` are further variables for the template.
        Raises InvalidRequest when the template refuses the messages, and for more than `max_tokens` tokens, as `encode`
        does.
        """
        masks = Masks(self._controls)
        given = masks.hide(
            {
                "messages": self._template.plain_messages(messages),
                "tools": None if tools is None else list(tools),
                "variables": dict(template_kwargs or {}),
            }
        )
        rendered = self._template.render(
            given["messages"],
            tools=given["tools"],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=given["variables"],
        )
        if max_tokens is not None and self.exceeds(rendered, max_tokens):
            raise _too_long(None, max_tokens, "messages")
        ids = self._encode_masked(rendered, masks) if masks else _ids(self._backend, rendered, False)
        if self._loose and sum(i in self._loose for i in ids) > masks.count(rendered):
            raise InvalidRequest(
                "The messages hold text that would become a control token; remove it.", param="messages"
            )
        if max_tokens is not None and len(ids) > max_tokens:
            raise _too_long(len(ids), max_tokens, "messages")
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; unknown ids stand for nothing."""
        return decode(self.vocabulary, ids, skip_special_tokens=skip_special_tokens)

    def detokenizer(self, *, prompt: Sequence[int] = (), skip_special_tokens: bool = True) -> Detokenizer:
        """For one choice: `decode`, token by token. `prompt`: see Detokenizer."""
        return Detokenizer(self.vocabulary, prompt=prompt, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token: int) -> bytes:
        """What `token` adds in the middle of a text, exactly; special tokens are spelled out."""
        return self.vocabulary.piece(token)

    def token_text(self, token: int) -> str:
        """`token_bytes` as text, with U+FFFD for bytes that are no whole character."""
        return self.vocabulary.piece(token).decode(errors="replace")

    def special_id(self, text: str) -> int | None:
        """The special token that is spelled exactly so, if there is one (for clients that ask for the id of "</s>")."""
        return self._controls.get(text)

    def longest_text(self, max_tokens: int) -> int:
        """UTF-8 bytes (so characters, too) above which a text surely has more than `max_tokens` tokens.

        Generous: a vocabulary may hold 128 spaces in one token. 2**63 - 1 when the tokenizer drops or merges text
        without bound.
        """
        return 2**63 - 1 if self._widest is None else self._widest * max(max_tokens, 0)

    def exceeds(self, text: str, max_tokens: int) -> bool:
        """Whether `text` is clearly too long for `max_tokens`, at a cost bounded by `max_tokens`, not by the text.

        True is certain. False is not: a text only somewhat too long needs tokenising.
        """
        if len(text) > self.longest_text(max_tokens):
            return True
        size = _PROBE * max_tokens + 1024
        while size < len(text):
            # What follows the cut can only change tokens near it, far fewer than a quarter.
            if len(self._encode_text(text[:size], False)) > max_tokens + max_tokens // 4 + 256:
                return True
            size *= 4
        return False

    def info(self) -> dict[str, Any]:
        """What GET /tokenizer_info answers: the special tokens, the chat template and the class, in
        tokenizer_config.json's words.
        """
        return dict(self._info)

    def _encode_text(self, text: str, add_special_tokens: bool, *, inside: bool = False) -> list[int]:
        """Plain text. `inside`: it follows other text, so nothing is put before it (SentencePiece's leading space)."""
        if self._unsafe is not None:
            text = self._unsafe.sub(lambda match: match[0][0] + self._anchor + match[0][1:], text)
        ids = _ids(self._text, self._anchor + text if inside else text, add_special_tokens)
        if inside or self._unsafe is not None:
            ids = [token for token in ids if token != self._anchor_id]
        return ids

    def _encode_masked(self, rendered: str, masks: Masks) -> list[int]:
        """A rendered chat whose masks hide text: first cut at the template's own added tokens, then uncovered.

        A tokenizer works on what lies between added tokens part by part, so the rest is tokenised as it always is.
        """
        cuts = self._splitter.encode_batch([_valid(rendered)], add_special_tokens=False)[0]
        ids: list[int] = []
        start = 0
        for cut, (begin, end) in zip(cuts.ids, cuts.offsets, strict=True):
            if cut in self._cuts:
                ids += self._encode_text(masks.show(rendered[start:begin]), False, inside=start > 0)
                ids.append(self._cuts[cut])
                start = end
        return ids + self._encode_text(masks.show(rendered[start:]), False, inside=start > 0)

    def _spelled_by_the_model(self) -> re.Pattern[str] | None:
        """Special tokens that the model behind the tokenizer (Unigram, for one) would make of their plain spelling."""
        unsafe = [
            spelling
            for spelling, token in self._controls.items()
            if len(spelling) > 1
            and any(token in _ids(self._text, before + spelling, False) for before in ("", "a", " "))
        ]
        return re.compile("|".join(map(re.escape, sorted(unsafe, key=len, reverse=True)))) if unsafe else None

    def _bytes_per_token(self) -> int | None:
        """The most bytes of text that one token can stand for; None when there is no bound."""
        shrink = _most_shrinking(self._backend)
        if shrink is None or not self.vocabulary.spells_every_byte():
            return None
        return shrink * self.vocabulary.longest(without=self._controls.values())


def _ids(backend: Backend, text: str, add_special_tokens: bool) -> list[int]:
    # The batch call, because the one for a single text holds the interpreter lock while it works.
    ids: list[int] = backend.encode_batch_fast([_valid(text)], add_special_tokens=add_special_tokens)[0].ids
    return ids


def _too_long(count: int | None, most: int, param: str) -> InvalidRequest:
    has = f"{count} tokens, more than the {most}" if count is not None else f"far more than the {most} tokens"
    return InvalidRequest(f"The prompt has {has} that fit; shorten it.", param=param, code="context_length_exceeded")


def _valid(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest("The text holds half of a surrogate pair; send valid Unicode.") from error
    return text


def _only_added(backend: Backend) -> Backend:
    """A tokenizer that knows nothing but the added tokens of `backend`, to cut a text where they are."""
    splitter = Backend(WordLevel({_REST: 0}, unk_token=_REST))
    if backend.normalizer is not None:
        splitter.normalizer = backend.normalizer
    splitter.add_tokens(list(backend.get_added_tokens_decoder().values()))
    return splitter


def _text_only(backend: Backend, controls: Iterable[str], anchor: str) -> Backend:
    """A copy to which `controls` are text, and which knows `anchor` as a token more."""
    copy: Backend = deepcopy(backend)
    copy.add_special_tokens(list(controls))  # marks those that the checkpoint did not
    copy.add_tokens([AddedToken(anchor, special=False, normalized=False)])
    copy.encode_special_tokens = True
    return copy


def _most_shrinking(backend: Backend) -> int | None:
    """How many times fewer bytes than the text the pieces may have; None when text may vanish without bound."""
    factor = 1
    for part in _steps(backend.normalizer, "normalizers"):
        match part:
            case {"type": "Prepend"}:
                pass
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if len(old) <= len(new):
                pass
            case {"type": "NFC" | "NFD" | "NFKC" | "NFKD" | "Lowercase"}:
                factor *= 4  # a four-byte letter of a mathematical alphabet becomes one byte; a composition saves less
            case _:
                return None
    for part in _steps(backend.pre_tokenizer, "pretokenizers"):
        if part["type"] not in _KEEPING or part.get("behavior") == "Removed":
            return None
    if any((t.lstrip or t.rstrip) and not t.special for t in backend.get_added_tokens_decoder().values()):
        return None
    return factor


def _steps(component: Any, name: str) -> list[dict[str, Any]]:
    """The JSON of a normaliser or pre-tokeniser, with sequences flattened."""

    def flat(spec: dict[str, Any]) -> list[dict[str, Any]]:
        return [step for part in spec[name] for step in flat(part)] if spec["type"] == "Sequence" else [spec]

    return [] if component is None else flat(json.loads(component.__getstate__()))


def _load(source: str, revision: str | None) -> PreTrainedTokenizerFast:
    path = Path(source).expanduser()
    if not path.is_dir() and (source.count("/") > 1 or source.startswith(("/", ".", "~"))):
        raise ValueError(f"There is no directory {source}; give a checkpoint's directory or its Hugging Face id.")
    if path.is_dir() and not any(
        (path / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")
    ):
        raise ValueError(f"{source} holds no tokenizer.json; point to a directory with all of the checkpoint's files.")
    try:
        fast = AutoTokenizer.from_pretrained(
            str(path) if path.is_dir() else source, revision=revision, trust_remote_code=False
        )
    except Exception as error:  # whatever the many loaders of transformers raise, the user needs one sentence
        reason = str(error).strip().partition("\n")[0].rstrip(".")[:200]
        raise ValueError(f"The tokenizer of {source} cannot be loaded: {reason}.") from error
    if not isinstance(fast, PreTrainedTokenizerFast) or not fast.backend_tokenizer.get_vocab_size():
        raise ValueError(
            f"{source} has no fast tokenizer; add its tokenizer.json, which transformers can make of the other files."
        )
    return fast


def _read_template(template: str) -> str:
    if "{{" in template or "{%" in template:
        return template
    try:
        return Path(template).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The chat template {template} cannot be read; give a Jinja file or the template itself."
        ) from error


def _describe(fast: PreTrainedTokenizerFast) -> dict[str, Any]:
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return {
        "tokenizer_class": type(fast).__name__,
        **{name: getattr(fast, name) for name in names},
        "additional_special_tokens": [str(token) for token in fast.extra_special_tokens],
        "model_max_length": fast.model_max_length,
        "chat_template": fast.chat_template,
    }
