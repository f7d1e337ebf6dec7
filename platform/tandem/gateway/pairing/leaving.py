"""Groups that leave: when their time has come, what still decodes on them is moved to others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from tandem.core.types import Group, GroupState

AGAIN_S = 1.0
"""What could not be moved for want of another pair is tried again after this, until the group is gone."""


class Leaving:
    """One timer for each draining group, from its `migrate_at` on. Belongs to one event loop."""

    def __init__(self, move_off: Callable[[Group], bool], *, clock: Callable[[], float] = time.time) -> None:
        """`move_off` moves what it can, and tells whether nothing is left there. `clock`: Unix seconds."""
        self._move_off = move_off
        self._clock = clock
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def put(self, group: Group) -> None:
        """A group, as it is now."""
        self.remove(group.group)
        if group.state is GroupState.DRAINING and group.migrate_at:
            self._wait(group, group.migrate_at - self._clock())

    def remove(self, name: str) -> None:
        if (timer := self._timers.pop(name, None)) is not None:
            timer.cancel()

    def close(self) -> None:
        for name in list(self._timers):
            self.remove(name)

    def _wait(self, group: Group, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._timers[group.group] = loop.call_later(max(0.0, seconds), self._due, group)

    def _due(self, group: Group) -> None:
        del self._timers[group.group]
        if not self._move_off(group):
            self._wait(group, AGAIN_S)
