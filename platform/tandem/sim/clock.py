"""A clock that jumps from event to event: nothing waits, and the same events come in the same order every time."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Clock:
    """Calls what was asked for in the order of its times; of the same time, in the order in which it was asked."""

    def __init__(self) -> None:
        self.now = 0.0
        """Virtual seconds since the start."""
        self.events = 0
        """How many were called."""
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._serial = 0

    def at(self, when: float, call: Callable[..., None], *args: Any) -> None:
        """Call it at `when`; what lies in the past comes next."""
        self._serial += 1
        heapq.heappush(self._heap, (when, self._serial, call, args))

    def after(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        self._serial += 1
        heapq.heappush(self._heap, (self.now + seconds, self._serial, call, args))

    def run(self, until: float) -> bool:
        """Go on until nothing is to come, or `until`. Whether nothing is to come."""
        heap, pop = self._heap, heapq.heappop
        while heap:
            when, _, call, args = pop(heap)
            if when > until:
                heapq.heappush(heap, (when, 0, call, args))
                return False
            if when > self.now:
                self.now = when
            self.events += 1
            call(*args)
        return True
