"""Stop strings, found across any chunk borders. The result depends on the text alone, not on how it was cut."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """`feed` text, get what is certainly before any stop string; `stopped` once one is complete."""

    __slots__ = ("_held", "_include", "_stops", "cut", "stopped")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        """`include`: the stop string itself goes out, too."""
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        self.stopped = False
        self.cut = 0
        """Characters of what was fed that the stop string took away: itself and what came after it."""

    @property
    def watching(self) -> bool:
        """There are stop strings."""
        return bool(self._stops)

    @property
    def held(self) -> int:
        """Characters that may still turn out to begin a stop string."""
        return len(self._held)

    def feed(self, text: str) -> str:
        """Text that may go out. The stop string that completes first ends it; of several that end together, the
        longest."""
        if not self._stops:
            return text
        if self.stopped or not text:
            return ""
        text = self._held + text
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            end, start = min(found)
            end = end if self._include else start
            self.cut = len(text) - end
            return text[:end]
        keep = len(text) - max(_overlap(text, stop) for stop in self._stops)
        self._held = text[keep:]
        return text[:keep]

    def end(self) -> str:
        """What was held back in case it became a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    size = min(len(text), len(stop) - 1)
    # Only a place where the stop string's first character stands can begin it.
    start = text.find(stop[0], len(text) - size)
    while start >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start = text.find(stop[0], start + 1)
    return 0
