"""Connections to the control services of fleets: one watch for each fleet, renewed for as long as the Fleet exists."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping

from tandem.core.types import DpLoad, FleetSnapshot
from tandem.fleet.control_client import ControlClient, ControlError, FleetLoad
from tandem_operator.metrics import CONTROL
from tandem_operator.names import CONTROL_PORT

_log = logging.getLogger(__name__)

ADDRESS_VARIABLE = "TANDEM_OPERATOR_CONTROL"
"""Where control services are instead of <fleet>-head.<namespace>.svc:9000; may have {fleet} and {namespace} in it."""
_CALL_S = 10.0
_RETRY_FIRST_S, _RETRY_LONGEST_S = 0.5, 5.0


def control_address(namespace: str, fleet: str) -> str:
    """host:port of a fleet's control service."""
    pattern = os.environ.get(ADDRESS_VARIABLE) or f"{{fleet}}-head.{{namespace}}.svc:{CONTROL_PORT}"
    return pattern.replace("{fleet}", fleet).replace("{namespace}", namespace)


class FleetLink:
    """What one fleet's control service tells. `changed` is called at each news, on the event loop."""

    def __init__(self, namespace: str, fleet: str, changed: Callable[[], None]) -> None:
        self.namespace, self.fleet = namespace, fleet
        self.snapshot: FleetSnapshot | None = None
        """The last that was told; it may be old (`reachable`)."""
        self.reachable = False
        self.known = False
        """Whether it was reached or was found to be away: until then nothing is told of it, lest an operator that has
        just begun says that all is lost."""
        self.why = "not yet connected"
        """Why it cannot be reached, in one sentence."""
        self.loads: Mapping[str, tuple[DpLoad, ...]] = {}
        """What engines last said of their work, by group (`planning.py` asks)."""
        loop = asyncio.get_running_loop()
        self._clock = loop.time
        self.last_reached = self._clock()
        """When it last was, on the loop's clock; at first, when this began."""
        self._changed = changed
        self._task = loop.create_task(self._follow(), name=f"tandem-control-{namespace}-{fleet}")

    @property
    def over(self) -> bool:
        """Whether its watch has ended for good, which it should not."""
        return self._task.done()

    @property
    def error(self) -> BaseException | None:
        """What ended it."""
        return None if not self.over or self._task.cancelled() else self._task.exception()

    @property
    def away_s(self) -> float:
        """For how long it has not been reached."""
        return 0.0 if self.reachable else self._clock() - self.last_reached

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[ControlClient]:
        """A connection for some calls. They raise ControlError."""
        async with ControlClient(control_address(self.namespace, self.fleet), deadline=_CALL_S) as client:
            yield client

    async def load(self) -> FleetLoad:
        """The load now. Raises ControlError."""
        async with self.client() as client:
            return await client.load()

    async def close(self) -> None:
        """End it."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(KeyError):
            CONTROL.remove(self.namespace, self.fleet)

    async def _follow(self) -> None:
        delay = _RETRY_FIRST_S
        while True:
            try:
                async with self.client() as client:
                    async for snapshot in client.watch():
                        delay = _RETRY_FIRST_S
                        self._note(snapshot)
                self._lost("its watch ended")
            except ControlError as error:
                self._lost(str(error))
            except Exception as error:  # noqa: BLE001 - the watch must go on, whatever a later version tells
                _log.exception("The watch of fleet %s/%s failed.", self.namespace, self.fleet)
                self._lost(f"its watch failed: {error}")
            await asyncio.sleep(delay)
            delay = min(2 * delay, _RETRY_LONGEST_S)

    def _note(self, snapshot: FleetSnapshot) -> None:
        self.snapshot, self.reachable, self.known, self.why = snapshot, True, True, ""
        CONTROL.labels(self.namespace, self.fleet).set(1)
        self._changed()

    def _lost(self, why: str) -> None:
        if self.reachable:
            self.last_reached = self._clock()
        if why != self.why:
            _log.warning("The control service of fleet %s/%s is away: %s", self.namespace, self.fleet, why)
        news = self.reachable or not self.known
        self.reachable, self.known, self.why = False, True, why
        CONTROL.labels(self.namespace, self.fleet).set(0)
        if news:
            self._changed()


class Links:
    """The connections, by fleet."""

    def __init__(self, changed: Callable[[str, str], None]) -> None:
        """`changed(namespace, fleet)` is called at each news of a fleet."""
        self._links: dict[tuple[str, str], FleetLink] = {}
        self._changed = changed

    def get(self, namespace: str, fleet: str) -> FleetLink | None:
        """A fleet's connection, if it has one."""
        return self._links.get((namespace, fleet))

    def open(self, namespace: str, fleet: str) -> FleetLink:
        """A fleet's connection, begun if there was none. Called at each look at a fleet, so one that has ended by a
        mistake begins again soon."""
        link = self._links.get((namespace, fleet))
        if link is not None and link.over:
            why = "The watch of fleet %s/%s has ended, and begins again: %s"
            _log.error(why, namespace, fleet, link.error, exc_info=link.error)
            link = None
        if link is None:
            link = FleetLink(namespace, fleet, lambda: self._changed(namespace, fleet))
            self._links[namespace, fleet] = link
        return link

    async def close(self, namespace: str, fleet: str) -> None:
        """End a fleet's connection."""
        if (link := self._links.pop((namespace, fleet), None)) is not None:
            await link.close()

    async def close_all(self) -> None:
        """End all."""
        for namespace, fleet in list(self._links):
            await self.close(namespace, fleet)
