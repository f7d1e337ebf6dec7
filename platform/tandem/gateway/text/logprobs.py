"""Logprobs beside the text: which token's goes out with which characters."""

from __future__ import annotations

from collections import deque

from tandem.engine.client import Logprob
from tandem.gateway.text.detokenize import Vocabulary
from tandem.gateway.text.pieces import TokenLogprob

FLOOR = -9999.0
"""Stands for the logarithm of nought, as in OpenAI's API: JSON has no infinity."""


class LogprobAligner:
    """Holds each token's logprob back until a character of the token goes out; drops those of tokens that are not text
    (markers, tool calls, stop strings).

    The text before it is cut only at its end: what the parsers hold back is always the last characters of it.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._waiting: deque[tuple[TokenLogprob, int]] = deque()
        """With the place of its first character."""
        self._total = 0

    def add(self, logprob: Logprob, size: int, *, reasoning: bool) -> None:
        """A token has come, and with it `size` characters."""
        self._waiting.append((self._entry(logprob, reasoning=reasoning), self._total))
        self._total += size

    def release(self, held: int, *, whole: bool) -> list[TokenLogprob]:
        """Those of tokens that begin before the last `held` characters; `whole`: no part of a character waits."""
        border = self._total - held
        out: list[TokenLogprob] = []
        while self._waiting and (self._waiting[0][1] < border or (whole and not held)):
            out.append(self._waiting.popleft()[0])
        return out

    def drop(self) -> None:
        """What waits is of text that nobody sees."""
        self._waiting.clear()

    def _entry(self, found: Logprob, *, reasoning: bool) -> TokenLogprob:
        text, raw = self._name(found.token)
        top = [TokenLogprob(token, *self._name(token), max(value, FLOOR)) for value, token in found.top]
        return TokenLogprob(found.token, text, raw, max(found.logprob, FLOOR), top, reasoning)

    def _name(self, token: int) -> tuple[str, bytes]:
        raw = self._vocabulary.name(token)
        return raw.decode("utf-8", "replace"), raw
