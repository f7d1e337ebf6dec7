"""Deadlines of many things that move often: a heap in which an entry may be stale, but never late."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable


class Deadlines:
    """At least one entry per name is at or before its due time; those that come too early are for the caller to put
    back. Times are seconds of any clock."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, str]] = []
        self.set = 0
        """Rises with each deadline that is put in: as long as it stays, `next` comes no earlier than before."""

    def put(self, name: str, due: float) -> None:
        self.set += 1
        heapq.heappush(self._heap, (due, self.set, name))

    def crowded(self, names: Collection[object]) -> bool:
        """Nearly all entries are of names that are over; left there, they would pile up for as long as they last."""
        return len(self._heap) > 64 + 4 * len(names)

    def renew(self, dues: Iterable[tuple[str, float]]) -> None:
        """These are all that there are."""
        self._heap = [(due, serial, name) for serial, (name, due) in enumerate(dues)]
        heapq.heapify(self._heap)

    def next(self) -> float | None:
        """When the first is due; None = there is none."""
        return self._heap[0][0] if self._heap else None

    def pop(self, now: float) -> str | None:
        """A name whose entry is due, and the entry is gone; None = no more."""
        return heapq.heappop(self._heap)[2] if self._heap and self._heap[0][0] <= now else None
