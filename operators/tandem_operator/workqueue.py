"""Work by key: each key is worked on by one worker at a time, asked twice means done once more, failures wait longer.

Level-triggered: a key says which object to look at, never what happened to it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """Keys in the order in which they were first asked for. For one event loop."""

    def __init__(self, *, first_delay: float = 0.2, longest_delay: float = 60.0) -> None:
        """Seconds until a key that failed is tried again: `first_delay`, then twice as long each time."""
        self._first, self._longest = first_delay, longest_delay
        self._waiting: deque[K] = deque()
        self._dirty: set[K] = set()
        """Keys to work on; those among them that are being worked on are queued when that has ended."""
        self._working: set[K] = set()
        self._failures: dict[K, int] = {}
        self._later: dict[K, asyncio.TimerHandle] = {}
        self._ready = asyncio.Event()

    def add(self, key: K) -> None:
        """Ask for a key to be worked on, now."""
        if key in self._dirty:
            return
        self._dirty.add(key)
        if key not in self._working:
            self._waiting.append(key)
            self._ready.set()

    def add_after(self, key: K, seconds: float) -> None:
        """Ask for a key to be worked on then; the earliest of several such times counts."""
        loop = asyncio.get_running_loop()
        known = self._later.get(key)
        if known is not None:
            if known.when() <= loop.time() + seconds:
                return
            known.cancel()
        self._later[key] = loop.call_later(seconds, self._due, key)

    async def get(self) -> K:
        """The next key; `done` or `failed` must follow."""
        while not self._waiting:
            self._ready.clear()
            await self._ready.wait()
        key = self._waiting.popleft()
        self._dirty.discard(key)
        self._working.add(key)
        return key

    def done(self, key: K) -> None:
        """The work on a key has succeeded."""
        self._failures.pop(key, None)
        self._end(key)

    def failed(self, key: K) -> float:
        """The work on a key has failed: it is tried again, in so many seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        delay: float = min(self._longest, self._first * 2 ** min(failures, 30))
        self._end(key)
        self.add_after(key, delay)
        return delay

    def __len__(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        """Forget all that was to come."""
        for timer in self._later.values():
            timer.cancel()
        self._later.clear()
        self._waiting.clear()
        self._dirty.clear()

    def _end(self, key: K) -> None:
        self._working.discard(key)
        if key in self._dirty:
            self._waiting.append(key)
            self._ready.set()

    def _due(self, key: K) -> None:
        self._later.pop(key, None)
        self.add(key)
