"""Token ids to text as they come, never splitting a UTF-8 character, whatever the chunks.

A byte-level BPE token *is* a string of bytes, so a stream needs no window and no re-decoding: look the bytes up, and
feed them to an incremental UTF-8 decoder. The result equals `tokenizers`' decoding of the whole, also for bytes that
are no UTF-8 (both follow the "maximal subpart" rule for U+FFFD).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Collection, Iterable

import tokenizers

from tandem.gateway.api.tools import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEP
from tandem.gateway.text.model_card import ModelError

KEPT = frozenset({"<think>", "</think>", CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEP})
"""Markers that the gateway reads itself, so they stay even where the tokenizer calls them special."""


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    for n, byte in enumerate(byte for byte in range(256) if byte not in set(printable)):
        table[chr(256 + n)] = byte
    return table


_BYTES = _byte_alphabet()


def _token_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        # As `tokenizers` does: a token with any other character stands for itself.
        return token.encode("utf-8")


class Vocabulary:
    """The bytes of every token of a byte-level tokenizer; special tokens have none."""

    def __init__(self, inner: tokenizers.Tokenizer, kept: Collection[str] = KEPT) -> None:
        """Raises ModelError for a tokenizer of another kind."""
        decoder = json.loads(inner.to_str()).get("decoder") or {}
        if decoder.get("type") != "ByteLevel":
            raise ModelError(f"the tokenizer's decoder is {decoder.get('type')!r}; only ByteLevel is supported")
        vocabulary: dict[str, int] = inner.get_vocab(with_added_tokens=True)
        self.size = 1 + max(vocabulary.values(), default=-1)
        self._bytes = [b""] * self.size
        for token, number in vocabulary.items():
            self._bytes[number] = _token_bytes(token)
        self._names = list(self._bytes)
        for number, added in inner.get_added_tokens_decoder().items():
            if added.special and added.content not in kept:
                self._bytes[number] = b""

    def of(self, token: int) -> bytes:
        """The token's bytes; none for an id that the tokenizer does not know (padding of the vocabulary)."""
        return self._bytes[token] if 0 <= token < self.size else b""

    def name(self, token: int) -> bytes:
        """The same, but a special token has its name."""
        return self._names[token] if 0 <= token < self.size else b""

    def text(self, tokens: Iterable[int]) -> str:
        """What the tokens read as, without special ones."""
        return b"".join(map(self.of, tokens)).decode("utf-8", "replace")


class Detokenizer:
    """One stream's decoder: `feed` tokens, get the characters that are complete; `end` for what is left."""

    __slots__ = ("_bytes_of", "_decode", "_decoder")

    def __init__(self, vocabulary: Vocabulary, *, special_tokens: bool = False) -> None:
        """`special_tokens`: they are shown by their names."""
        self._bytes_of = vocabulary.name if special_tokens else vocabulary.of
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decode = self._decoder.decode

    def feed(self, token: int) -> str:
        return self._decode(self._bytes_of(token))

    @property
    def partial(self) -> bool:
        """The last character is not complete yet."""
        return bool(self._decoder.getstate()[0])

    def end(self) -> str:
        """The rest: U+FFFD if the stream broke off inside a character."""
        return self._decode(b"", True)
