"""What every token stands for: its bytes, and how a tokenizer's decoder puts pieces together.

A decoder of the `tokenizers` library works on all tokens of an answer at once. Here it is read once, at start, into a
table from token to bytes and a few rules about the beginning of the text, so that text can be streamed at a constant
cost per token and without ever taking back what was sent.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer as Backend

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True)
class DecoderRules:
    """A decoder of the `tokenizers` library, as far as models that write text use them.

    `replacements` are applied inside each token. `byte_level`: tokens spell bytes in GPT-2's alphabet. `byte_fallback`:
    tokens such as `<0xE4>` are single bytes. `strip`: how many `strip_char` are taken from the beginning of the whole
    text. `first_drops`: a character that the first token loses. `word_prefix` and `word_marker`: what goes before every
    token but the first, and the prefix that marks a token that continues a word instead.
    """

    byte_level: bool = False
    byte_fallback: bool = False
    replacements: tuple[tuple[str, str], ...] = ()
    strip: int = 0
    strip_char: str = " "
    first_drops: str = ""
    word_prefix: str = ""
    word_marker: str = ""

    @property
    def first_differs(self) -> bool:
        """The same token reads differently at the beginning of the text."""
        return bool(self.first_drops or self.word_prefix)


def read_decoder(spec: dict[str, Any] | None) -> DecoderRules:
    """`spec` is the "decoder" entry of a tokenizer.json. Raises ValueError for a decoder that cannot be streamed."""
    if spec is None:
        return DecoderRules(word_prefix=" ")
    rules: dict[str, Any] = {}
    replacements: list[tuple[str, str]] = []
    fused = False
    for part in spec["decoders"] if spec["type"] == "Sequence" else [spec]:
        match part:
            case {"type": "ByteLevel"} if not fused and not replacements:
                rules["byte_level"] = fused = True
            case {"type": "ByteFallback"} if not fused:
                rules["byte_fallback"] = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if not fused:
                replacements.append((old, new))
            case {"type": "Metaspace", "replacement": str(old)} if not fused:
                replacements.append((old, " "))
                if part.get("prepend_scheme", "always") != "never":
                    rules["first_drops"] = old
            case {"type": "Fuse"}:
                fused = True
            case {"type": "Strip", "content": str(char), "start": int(start), "stop": 0} if fused:
                rules["strip"], rules["strip_char"] = start, char
            case {"type": "WordPiece", "prefix": str(marker)} if not fused and not part.get("cleanup"):
                rules["word_prefix"], rules["word_marker"] = " ", marker
            case _:
                raise ValueError(
                    f"The tokenizer's decoder has a step of type {part.get('type')!r} that Gossamer cannot stream; "
                    "use a checkpoint with a byte-level or SentencePiece-like tokenizer."
                )
    return DecoderRules(replacements=tuple(replacements), **rules)


class Vocabulary:
    """All tokens of a tokenizer as bytes. Immutable once made, so threads may share it."""

    def __init__(self, backend: Backend) -> None:
        decoder = backend.decoder
        self.rules = read_decoder(None if decoder is None else json.loads(decoder.__getstate__()))
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        names = backend.get_vocab(with_added_tokens=True)
        self.size = max(names.values(), default=-1) + 1  # ids may have gaps
        alphabet = _byte_alphabet() if self.rules.byte_level else {}
        self._names: list[str | None] = [None] * self.size
        self._pieces: list[bytes | None] = [None] * self.size
        for name, token in names.items():
            self._names[token] = name
            self._pieces[token] = self._piece(name, alphabet)

    def piece(self, token: int) -> bytes:
        """The bytes that `token` adds to a text that has begun; empty for ids that stand for nothing."""
        return (self._pieces[token] or b"") if 0 <= token < self.size else b""

    def first_piece(self, token: int) -> bytes:
        """The bytes that `token` makes at the very beginning of a text (`rules.strip` is not applied yet)."""
        name = self._names[token] if 0 <= token < self.size else None
        if name is None or not self.rules.first_differs or (self.rules.byte_fallback and _BYTE_TOKEN.fullmatch(name)):
            return self.piece(token)
        if self.rules.first_drops:
            name = name.replace(self.rules.first_drops, "")
        return self._replaced(name).encode()

    def known(self, token: int) -> bool:
        """Whether the tokenizer has this id at all (models may have more rows than their tokenizer has tokens)."""
        return 0 <= token < self.size and self._names[token] is not None

    def longest(self, without: Iterable[int]) -> int:
        """Bytes of the longest token that is not in `without`."""
        skip = set(without)
        return max((len(p) for i, p in enumerate(self._pieces) if p is not None and i not in skip), default=0)

    def spells_every_byte(self) -> bool:
        """Whether any text at all can be spelled, so that nothing is dropped or becomes an unknown token."""
        if self.rules.byte_level:
            return set(_byte_alphabet()) <= {name for name in self._names if name is not None and len(name) == 1}
        if self.rules.byte_fallback:
            return {f"<0x{byte:02X}>" for byte in range(256)} <= set(self._names)
        return False

    def _piece(self, name: str, alphabet: dict[str, int]) -> bytes:
        if self.rules.byte_level:
            if all(char in alphabet for char in name):
                return bytes(alphabet[char] for char in name)
            return name.encode()  # an added token with characters outside the alphabet spells itself
        if self.rules.byte_fallback and (match := _BYTE_TOKEN.fullmatch(name)):
            return bytes([int(match[1], 16)])
        if self.rules.word_prefix:
            marker = self.rules.word_marker
            continues = marker and name.startswith(marker)
            name = name[len(marker) :] if continues else self.rules.word_prefix + name
        return self._replaced(name).encode()

    def _replaced(self, name: str) -> str:
        for old, new in self.rules.replacements:
            name = name.replace(old, new)
        return name


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 stands for itself, the other 68 bytes get U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(rest)}
