"""Stop strings, found across any chunk borders. The result depends on the text alone, not on how it was cut."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """`feed` text, get what is certainly before any stop string; `stopped` once one is complete."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

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
            return text[: min(found)[1]]
        keep = len(text) - max(_overlap(text, stop) for stop in self._stops)
        self._held = text[keep:]
        return text[:keep]

    def end(self) -> str:
        """What was held back in case it became a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
