"""One answer: token ids in, text out. Detokenizes, splits off the reasoning, honours stop strings, counts tokens."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tandem.engine.client import Ended
from tandem.gateway.detokenize import Detokenizer, Vocabulary
from tandem.gateway.reasoning import ReasoningParser
from tandem.gateway.stops import StopMatcher


class Piece(msgspec.Struct):
    """New text of an answer, and the tokens that were read for it."""

    reasoning: str = ""
    content: str = ""
    ids: list[int] = msgspec.field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.ids)


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What an answer cost, in tokens."""

    prompt: int
    completion: int
    reasoning: int
    cached: int


class Answer:
    """The state of one answer while it streams. Feed it every token once."""

    def __init__(self, vocabulary: Vocabulary, *, stops: Sequence[str], chat: bool, thinking: bool) -> None:
        """`chat`: reasoning is split off, and stop strings end the content only; else all text is content."""
        self._detokenizer = Detokenizer(vocabulary)
        self._parser = ReasoningParser(thinking=thinking) if chat else None
        self._stops = StopMatcher(stops)
        self.completion_tokens = 0
        self.reasoning_tokens = 0

    @property
    def stopped(self) -> bool:
        """A stop string was found: nothing more is wanted."""
        return self._stops.stopped

    def feed(self, ids: Sequence[int], ended: Ended | None = None) -> Piece:
        """The next tokens, up to a stop string; `ended` with the last of them."""
        piece = Piece()
        silent = ended.matched if ended is not None and isinstance(ended.matched, int) else None
        for place, token in enumerate(ids):
            if self.stopped:
                break
            self.completion_tokens += 1
            piece.ids.append(token)
            if self._parser is not None and self._parser.reasoning:
                self.reasoning_tokens += 1
            if token == silent and place == len(ids) - 1:
                # The token that ended the answer is not part of its text.
                break
            self._add(piece, self._detokenizer.feed(token))
        return piece

    def end(self) -> Piece:
        """The answer is over: whatever was held back."""
        piece = Piece()
        if not self.stopped:
            self._add(piece, self._detokenizer.end())
            if self._parser is not None and not self.stopped:
                split = self._parser.end()
                piece.reasoning += split.reasoning
                piece.content += self._stops.feed(split.content)
        piece.content += self._stops.end()
        return piece

    def usage(self, prompt: int, cached: int) -> Usage:
        return Usage(
            prompt=prompt,
            completion=self.completion_tokens,
            reasoning=self.reasoning_tokens,
            cached=min(cached, prompt),
        )

    def _add(self, piece: Piece, text: str) -> None:
        if not text:
            return
        if self._parser is None:
            piece.content += self._stops.feed(text)
            return
        split = self._parser.feed(text)
        piece.reasoning += split.reasoning
        if split.content:
            piece.content += self._stops.feed(split.content)
