"""Asks the engines of all groups that are routable for their loads, and tells the router."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Protocol

from tandem.core.routing import Router
from tandem.core.types import DpLoad, Group
from tandem.engine.client import EngineError

log = logging.getLogger(__name__)

PERIOD_S = 0.75
"""From one answer to the next question, give or take a third, so that replicas do not ask all at once."""
WITHIN_S = 2.0
"""An engine that has not answered by then is asked anew; the router goes by what it last said, for a while."""


class LoadSource(Protocol):
    """Who can be asked for loads (the `EngineClient`)."""

    async def loads(self, url: str, *, within: float) -> list[DpLoad]: ...


class LoadPoller:
    """One question at a time for each group. Belongs to the running loop."""

    def __init__(
        self,
        engines: LoadSource,
        router: Router,
        *,
        period_s: float = PERIOD_S,
        within_s: float = WITHIN_S,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """`jitter` draws from 0 to 1."""
        self._engines = engines
        self._router = router
        self._period_s = period_s
        self._within_s = within_s
        self._jitter = jitter
        self._loop = asyncio.get_running_loop()
        self._polls: dict[str, tuple[Group, asyncio.Task[None]]] = {}
        self.failures = 0
        """Questions that were not answered."""

    def put_group(self, group: Group) -> None:
        """A group is there, or has changed."""
        if not (group.routable and group.url):
            self.remove_group(group.group)
            return
        known = self._polls.get(group.group)
        if known is not None and (known[0].url, known[0].epoch) == (group.url, group.epoch):
            return
        self.remove_group(group.group)
        task = self._loop.create_task(self._poll(group), name=f"loads of {group.group}")
        task.add_done_callback(_broke)
        self._polls[group.group] = (group, task)

    def remove_group(self, name: str) -> None:
        """A group is gone."""
        known = self._polls.pop(name, None)
        if known is not None:
            known[1].cancel()

    async def close(self) -> None:
        """Ask no more."""
        tasks = [task for _, task in self._polls.values()]
        self._polls.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _poll(self, group: Group) -> None:
        while True:
            try:
                loads = await self._engines.loads(group.url, within=self._within_s)
            except EngineError as error:
                # If the engine has died, its group's state will tell.
                self.failures += 1
                log.debug("%s does not tell its load: %s", group.group, error)
            else:
                self._router.put_load(group.group, loads, self._loop.time(), epoch=group.epoch)
            await asyncio.sleep(self._period_s * (2 + 2 * self._jitter()) / 3)


def _broke(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s are not asked for any more", task.get_name(), exc_info=error)
