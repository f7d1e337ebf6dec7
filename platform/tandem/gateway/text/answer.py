"""One answer: token ids in, text out. Detokenizes, splits off the reasoning and tool calls, honours stop strings,
counts tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.engine.client import Ended, Logprob
from tandem.gateway.api.tools import ToolFormat
from tandem.gateway.text.detokenize import Detokenizer, Vocabulary
from tandem.gateway.text.logprobs import LogprobAligner
from tandem.gateway.text.pieces import Piece, TokenLogprob, ToolDelta, Usage
from tandem.gateway.text.reasoning import ReasoningParser
from tandem.gateway.text.stops import StopMatcher
from tandem.gateway.text.tool_parser import ToolParser

__all__ = ["Answer", "Piece", "TokenLogprob", "ToolDelta", "Usage"]


class Answer:
    """The state of one answer while it streams. Feed it every token once."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        stops: Sequence[str],
        chat: bool,
        thinking: bool,
        tools: ToolFormat | None = None,
        parallel: bool = True,
        special_tokens: bool = False,
        include_stop: bool = False,
    ) -> None:
        """
        Args:
            chat: reasoning is split off, and stop strings end the content only; else all text is content.
            thinking: the answer begins as reasoning.
            tools: how calls of tools are written; None = there are none.
            parallel: several calls may come; else the answer is over after the first.
            special_tokens: they are shown as text.
            include_stop: the stop string that ends the answer is part of it.
        """
        self._detokenizer = Detokenizer(vocabulary, special_tokens=special_tokens)
        self._parser = ReasoningParser(thinking=thinking) if chat else None
        self._tools = None if tools is None else ToolParser(tools, parallel=parallel)
        self._stops = StopMatcher(stops, include=include_stop)
        self._vocabulary = vocabulary
        self._aligner: LogprobAligner | None = None
        self._plain = not chat and tools is None and not stops
        """All that follows is content, as it stands: nothing looks at it any more."""
        self.completion_tokens = 0
        self.reasoning_tokens = 0

    @property
    def stopped(self) -> bool:
        """A stop string was found, or the one call that was wanted: nothing more is to be read."""
        return self._stops.stopped or (self._tools is not None and self._tools.complete)

    @property
    def calls(self) -> int:
        """Tool calls so far."""
        return 0 if self._tools is None else self._tools.calls

    def reason(self, reason: str) -> str:
        """The finish reason, where the engine's is this."""
        if self.stopped:
            reason = "stop"
        return "tool_calls" if reason == "stop" and self.calls else reason

    def feed(self, ids: Sequence[int], ended: Ended | None = None, logprobs: Sequence[Logprob] | None = None) -> Piece:
        """The next tokens, up to where it stops; `ended` with the last of them. `logprobs`: one for each."""
        piece = Piece()
        silent = ended.matched if ended is not None and isinstance(ended.matched, int) else None
        if self._plain and logprobs is None:
            self._feed_plain(piece, ids, silent)
            return piece
        for place, token in enumerate(ids):
            if self.stopped:
                break
            self.completion_tokens += 1
            piece.ids.append(token)
            reasoning = self._parser is not None and self._parser.reasoning
            if reasoning:
                self.reasoning_tokens += 1
            if token == silent and place == len(ids) - 1:
                # The token that ended the answer is not part of its text.
                break
            text = self._detokenizer.feed(token)
            if logprobs is None:
                if text:
                    self._add(piece, text)
            else:
                self._add_with(piece, text, logprobs[place], reasoning=reasoning)
        return piece

    def _feed_plain(self, piece: Piece, ids: Sequence[int], silent: int | None) -> None:
        self.completion_tokens += len(ids)
        piece.ids += ids
        if silent is not None and ids and ids[-1] == silent:
            ids = ids[:-1]
        for token in ids:
            piece.content += self._detokenizer.feed(token)

    def end(self) -> Piece:
        """The answer is over: whatever was held back."""
        piece = Piece()
        if not self.stopped:
            if text := self._detokenizer.end():
                self._add(piece, text)
            if self._parser is not None and not self.stopped:
                split = self._parser.end()
                piece.reasoning += split.reasoning
                self._add_content(piece, split.content)
            if self._tools is not None and not self.stopped:
                parsed = self._tools.end()
                piece.tools += parsed.tools
                piece.content += self._stops.feed(parsed.content)
        piece.content += self._stops.end()
        if self._aligner is not None:
            if piece.content or piece.reasoning:
                piece.logprobs += self._aligner.release(self._stops.cut, whole=True)
            self._aligner.drop()
        return piece

    def usage(self, prompt: int, cached: int) -> Usage:
        return Usage(
            prompt=prompt,
            completion=self.completion_tokens,
            reasoning=self.reasoning_tokens,
            cached=min(cached, prompt),
        )

    def _add(self, piece: Piece, text: str) -> None:
        if self._parser is None:
            piece.content += self._stops.feed(text)
            return
        split = self._parser.feed(text)
        piece.reasoning += split.reasoning
        if split.content:
            self._add_content(piece, split.content)
            self._plain = self._tools is None and not self._stops.watching and self._parser.settled

    def _add_content(self, piece: Piece, text: str) -> None:
        if self._tools is not None:
            parsed = self._tools.feed(text)
            piece.tools += parsed.tools
            text = parsed.content
        if text:
            piece.content += self._stops.feed(text)

    def _add_with(self, piece: Piece, text: str, logprob: Logprob, *, reasoning: bool) -> None:
        """The same as `_add`, with the token's logprob."""
        aligner = self._aligner
        if aligner is None:
            aligner = self._aligner = LogprobAligner(self._vocabulary)
        before = (len(piece.reasoning), len(piece.content), self.calls)
        aligner.add(logprob, len(text), reasoning=reasoning)
        if text:
            self._add(piece, text)
        visible = (len(piece.reasoning), len(piece.content)) != before[:2]
        if self._tools is not None and (self._tools.calling or self.calls != before[2]):
            aligner.drop()
            return
        held = self._held()
        released = aligner.release(held, whole=not self._detokenizer.partial)
        # A token that left nothing to see and nothing held was a marker, and what had waited for it belonged to it.
        if visible or not text or held:
            piece.logprobs += released
        if self._stops.stopped:
            aligner.drop()

    def _held(self) -> int:
        held = self._stops.cut or self._stops.held
        if self._parser is not None:
            held += self._parser.held
        if self._tools is not None:
            held += self._tools.held
        return held
