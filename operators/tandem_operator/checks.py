"""Checks of groups that are under way, and what is known of those that are over (core/rollout_check.py).

A check takes up to minutes, so it goes on beside the looks at its group. What it said is written in the group's status,
from where the next operator has it; here it is known at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from tandem.core.group_check import CheckVerdict, GroupCheck
from tandem.core.rollout_check import Trial, note
from tandem_operator.names import Object

_log = logging.getLogger(__name__)


def told_trial(group: Object) -> Trial:
    """What a group's status says of its checks."""
    found = (group.get("status") or {}).get("check") or {}
    try:
        return Trial(
            epoch=int(found.get("epoch") or 0),
            verdict=CheckVerdict(found.get("verdict") or CheckVerdict.UNKNOWN),
            message=str(found.get("message") or ""),
            silences=int(found.get("silences") or 0),
        )
    except ValueError:  # another version wrote it: it is asked again
        return Trial()


class Checks:
    """Of all groups, by the UID of their objects: another group of the same name is another one."""

    def __init__(self) -> None:
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._trials: dict[str, Trial] = {}
        self._asked: dict[str, tuple[int, float]] = {}

    def trial(self, group: Object) -> Trial:
        """What is known of a group."""
        return self._trials.get(group["metadata"]["uid"]) or told_trial(group)

    def asked_at(self, group: Object, epoch: int) -> float:
        """When this epoch of it was asked last (Unix seconds); 0 = it was not."""
        asked, at = self._asked.get(group["metadata"]["uid"], (0, 0.0))
        return at if asked == epoch else 0.0

    def begin(
        self,
        group: Object,
        epoch: int,
        now: Callable[[], float],
        ask: Callable[[], Awaitable[GroupCheck]],
        done: Callable[[Trial, Trial], Awaitable[None]],
    ) -> None:
        """Have it asked, unless that goes on already. `done` is given what was known before, and what is known then.
        `now`: the clock (Unix seconds)."""
        uid, name = group["metadata"]["uid"], group["metadata"]["name"]
        if uid in self._tasks:
            return
        self._asked[uid] = (epoch, now())

        async def run() -> None:
            try:
                answer = await ask()
                self._asked[uid] = (epoch, now())  # it may have taken longer than one waits until the next
                before = self.trial(group)
                self._trials[uid] = note(before, answer)
                await done(before, self._trials[uid])
            except Exception:  # noqa: BLE001 - the edge of a task that nobody awaits; the group is asked again
                _log.exception("The check of %s failed.", name)
            finally:
                del self._tasks[uid]

        self._tasks[uid] = asyncio.create_task(run(), name=f"tandem-check-{name}")

    def forget(self, uids: set[str]) -> None:
        """Only groups with these UIDs are there any more."""
        for known in (self._trials, self._asked):
            for uid in known.keys() - uids:
                del known[uid]
        for uid in self._tasks.keys() - uids:
            self._tasks[uid].cancel()

    async def settled(self) -> None:
        """Wait for what is under way."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def close(self) -> None:
        """End what is under way."""
        for task in self._tasks.values():
            task.cancel()
        await self.settled()
