"""Tokens in, text out, as they come."""

import codecs
import re
from collections.abc import Iterable, Sequence

from gossamer.server.engine.vocabulary import Vocabulary

_BAD_BYTE = re.compile("[\udc80-\udcff]")  # how "surrogateescape" marks a byte that is not UTF-8
_LONGEST_CHARACTER = 4  # bytes


class Detokenizer:
    """The text of one choice. Linear in the number of tokens; what has been returned is never taken back.

    All pushes and the flush together are `decode(vocabulary, tokens)`. With `prompt` (token ids, of which only the ends
    are read), they are what the tokens add to the prompt's own text: in SentencePiece-like tokenizers a word at the
    beginning of a text loses its leading space, a word after a prompt keeps it, and a character that the prompt left
    unfinished is completed.
    """

    def __init__(self, vocabulary: Vocabulary, *, prompt: Sequence[int] = (), skip_special_tokens: bool = True) -> None:
        rules = vocabulary.rules
        self._vocabulary = vocabulary
        self._skipped: frozenset[int] = vocabulary.special_ids if skip_special_tokens else frozenset()
        # In a byte-fallback vocabulary every bad byte is one U+FFFD; in a byte-level one, every maximal bad part.
        self._per_byte = rules.byte_fallback
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape" if self._per_byte else "replace")
        self._begun = not rules.first_differs
        self._strip = rules.strip
        if prompt:
            self._continue(prompt)

    def push(self, token: int) -> str:
        """The characters that `token` completes; "" while a character is incomplete and for a skipped special token."""
        if token in self._skipped:
            return ""
        if self._begun:
            piece = self._vocabulary.piece(token)
        else:
            if not self._vocabulary.known(token):
                return ""
            self._begun = True
            piece = self._vocabulary.first_piece(token)
        return self._text(piece)

    def push_all(self, tokens: Iterable[int]) -> str:
        """Several tokens at once: the same text as one by one."""
        if not self._begun:
            return "".join([self.push(token) for token in tokens])
        piece, skipped = self._vocabulary.piece, self._skipped
        return self._text(b"".join([piece(token) for token in tokens if token not in skipped]))

    def flush(self) -> str:
        """What an unfinished character leaves: U+FFFD."""
        return self._text(b"", final=True)

    def _text(self, piece: bytes, final: bool = False) -> str:
        text = self._utf8.decode(piece, final)
        if self._per_byte and not text.isascii():
            text = _BAD_BYTE.sub("\ufffd", text)
        if self._strip and text:
            text = self._stripped(text)
        return text

    def _stripped(self, text: str) -> str:
        char = self._vocabulary.rules.strip_char
        while self._strip and text.startswith(char):
            text = text[1:]
            self._strip -= 1
        if text:
            self._strip = 0
        return text

    def _continue(self, prompt: Sequence[int]) -> None:
        for token in prompt:  # the first few tokens decide about the beginning of the text
            if self._begun and not self._strip:
                break
            self.push(token)
        self._utf8.reset()
        tail = b""
        for token in reversed(prompt):
            if len(tail) >= _LONGEST_CHARACTER:
                break
            if token not in self._skipped:
                tail = self._vocabulary.piece(token) + tail
        self._utf8.decode(tail)  # keeps the unfinished character, if any


def decode(vocabulary: Vocabulary, tokens: Iterable[int], *, skip_special_tokens: bool = True) -> str:
    """The text of `tokens`.

    It is the text that the tokenizer's own decoder gives, with one difference: in a byte-fallback vocabulary, a run of
    byte tokens that holds a bad byte keeps its good characters, where the library turns the whole run into U+FFFD
    (which could not be streamed).
    """
    whole = Detokenizer(vocabulary, skip_special_tokens=skip_special_tokens)
    return whole.push_all(tokens) + whole.flush()
