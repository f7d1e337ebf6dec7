"""Splits an answer into reasoning and content at `<think>` … `</think>`, across any chunk borders.

Reasoning begins where the prompt's template has opened it, or with `<think>` at the very start of the answer. Line ends
next to the markers belong to the markers: R1 writes `<think>\\n…\\n</think>\\n\\n…`. What follows the first `</think>`
is content, whatever it looks like.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

START = "<think>"
END = "</think>"


class Split(NamedTuple):
    """New text of either kind."""

    reasoning: str
    content: str


class _At(Enum):
    OPENING = 0
    """At the start: it may become either."""
    REASONING = 1
    CONTENT = 2


class ReasoningParser:
    """`feed` text, get what is decided; `end` for what was held back."""

    def __init__(self, *, thinking: bool) -> None:
        """`thinking`: the prompt ends with an open `<think>`."""
        self._at = _At.OPENING
        self._thinking = thinking
        self._held = ""
        self._strip = False
        """Line ends are dropped until something else comes."""

    @property
    def held(self) -> int:
        """Characters at the end that are not decided yet."""
        return len(self._held)

    @property
    def reasoning(self) -> bool:
        """Whether the next token counts as reasoning."""
        return self._at is _At.REASONING or (self._at is _At.OPENING and self._thinking)

    @property
    def settled(self) -> bool:
        """All that follows is content, as it stands."""
        return self._at is _At.CONTENT and not self._strip

    def feed(self, text: str) -> Split:
        if self._at is _At.CONTENT:
            return Split("", self._stripped(text))
        if self._at is _At.REASONING and not (self._held or self._strip or "<" in text or text[-1:] == "\n"):
            return Split(text, "")
        text, self._held = self._held + text, ""
        return self._open(text) if self._at is _At.OPENING else self._reason(text)

    def end(self) -> Split:
        """The answer is over: what was held back is what it looks like."""
        held, self._held = self._held, ""
        if self._at is _At.REASONING:
            return Split(self._stripped(held), "")
        if self._at is _At.OPENING and self._thinking:
            return Split(held.lstrip("\n"), "")
        return Split("", held)

    def _open(self, text: str) -> Split:
        start = text.lstrip()
        if start.startswith(START):
            self._enter(_At.REASONING)
            return self._reason(start[len(START) :])
        if START.startswith(start):
            # Blank so far, or the beginning of the marker.
            self._held = text
            return Split("", "")
        if self._thinking:
            self._enter(_At.REASONING)
            return self._reason(text)
        self._enter(_At.CONTENT)
        return Split("", text)

    def _reason(self, text: str) -> Split:
        before, marker, after = text.partition(END)
        if marker:
            reasoning = self._stripped(before.rstrip("\n"))
            self._enter(_At.CONTENT)
            return Split(reasoning, self._stripped(after))
        keep = _open_tail(before)
        self._held = before[keep:]
        return Split(self._stripped(before[:keep]), "")

    def _enter(self, at: _At) -> None:
        # Content that no marker came before keeps its line ends.
        self._strip = at is _At.REASONING or self._at is _At.REASONING
        self._at = at

    def _stripped(self, text: str) -> str:
        if self._strip:
            text = text.lstrip("\n")
            self._strip = not text
        return text


def _open_tail(text: str) -> int:
    """Where the part begins that may still turn out to be line ends and `</think>`."""
    # The marker has no second "<", so only the last one can begin it.
    start = text.rfind("<")
    if start < 0 or not END.startswith(text[start:]):
        start = len(text)
    while start and text[start - 1] == "\n":
        start -= 1
    return start
