"""Ends on the engines what a dead gateway has left there. Every replica does it; several at once do no harm.

An engine ends a request whose connection has closed by itself, but only when it next looks; and it does not hear of a
machine that is gone. All engine requests of one gateway run begin with its incarnation, so one abort per engine ends
them all (`pairing.engine_body`, `tandem.engine.plugin`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from tandem.core.types import FleetSnapshot, GatewayReplica, Group, GroupState
from tandem.engine.client import EngineClient, EngineError
from tandem.state import Store, StoreError

log = logging.getLogger(__name__)

LOOK_S = 10.0
"""Beside the looks that changes cause."""
AGAIN_S = 2.0
"""A request of the dead gateway may have been on its way to the engine: it is aborted once more after this."""
ABORT_S = 2.0
"""An engine that lives answers within this."""
RETRY_S = 0.5
GIVE_UP_S = 30.0
"""An engine that does not answer for so long is not the reaper's any more: its rank's supervisor ends it."""
REMEMBER_S = 3600.0
"""How long a replica that was not dead can learn that it was taken for dead."""
_OVER = frozenset({GroupState.FAILED, GroupState.GONE})


class Reaper:
    """Run `work`; call `look` when gateways have changed."""

    def __init__(
        self,
        store: Store,
        client: EngineClient,
        snapshot: Callable[[], FleetSnapshot],
        *,
        incarnation: str,
        steady_at: Callable[[], float],
        again_s: float = AGAIN_S,
        give_up_s: float = GIVE_UP_S,
    ) -> None:
        """`incarnation`: this replica's own. `steady_at`: see `Registration`."""
        self._store = store
        self._client = client
        self._snapshot = snapshot
        self._incarnation = incarnation
        self._steady_at = steady_at
        self._again_s = again_s
        self._give_up_s = give_up_s
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._reaping: dict[str, asyncio.Task[None]] = {}

    def look(self) -> None:
        """Gateways may have come or gone."""
        self._news.set()

    async def work(self) -> None:
        """Watch over the others, for ever."""
        try:
            while True:
                unsteady = self._steady_at() - self._loop.time()
                if unsteady <= 0:
                    await self._find_all()
                try:
                    async with asyncio.timeout(min(unsteady, LOOK_S) if unsteady > 0 else LOOK_S):
                        await self._news.wait()
                except TimeoutError:
                    continue
                self._news.clear()
        finally:
            for task in self._reaping.values():
                task.cancel()

    async def _find_all(self) -> None:
        try:
            await self._find()
        except StoreError as error:
            log.debug("could not look for dead gateways: %s", error)

    async def _find(self) -> None:
        incarnations = await self._store.list("incarnations/")
        # Leases are read after the incarnations: see `registration.py`.
        living = await self._living()
        if living is None:
            return
        for entry in incarnations:
            incarnation = entry.key.partition("/")[2]
            if incarnation in living or incarnation == self._incarnation or incarnation in self._reaping:
                continue
            replica = entry.value.decode("utf-8", "replace")
            task = asyncio.create_task(self._reap(incarnation, entry.version, replica), name=f"reap-{incarnation}")
            self._reaping[incarnation] = task
            task.add_done_callback(lambda done, one=incarnation: self._reaping.pop(one, None))  # type: ignore[misc]

    async def _living(self) -> set[str] | None:
        """None: that cannot be told, as an entry that may be any of them cannot be read."""
        found = {entry.key.partition("/")[2] for entry in await self._store.list("leaving/")}
        for entry in await self._store.list("gateways/"):
            try:
                found.add(msgspec.json.decode(entry.value, type=GatewayReplica).incarnation)
            except (msgspec.MsgspecError, UnicodeDecodeError):
                # msgspec raises the latter for a string that is not UTF-8.
                log.error("the key %r of the store is no gateway: while it is there none is taken for dead", entry.key)
                return None
        return found

    async def _reap(self, incarnation: str, version: int, replica: str) -> None:
        log.warning("gateway %s is dead: what it has left on the engines is aborted", replica)
        try:
            await self._store.put(f"reaped/{incarnation}", replica.encode(), ttl=REMEMBER_S)
            await self._abort_everywhere(incarnation)
            await asyncio.sleep(self._again_s)
            living = await self._living()
            if living is None:
                # It is looked at again.
                return
            if incarnation in living:
                log.warning("gateway %s lives after all", replica)
                return
            await self._abort_everywhere(incarnation)
            # One that has come back meanwhile has written it anew.
            await self._store.compare_and_set(f"incarnations/{incarnation}", None, version=version)
        except StoreError as error:
            # The incarnation is still in the store: whoever looks next begins again.
            log.warning("could not see to the end of the dead gateway %s: %s", replica, error)
        else:
            log.info("nothing of the dead gateway %s is left on the engines", replica)

    async def _abort_everywhere(self, incarnation: str) -> None:
        groups = [group for group in self._snapshot().groups if group.url and group.state not in _OVER]
        await asyncio.gather(*(self._abort(group, incarnation) for group in groups))

    async def _abort(self, group: Group, incarnation: str) -> None:
        until = self._loop.time() + self._give_up_s
        while True:
            try:
                await self._client.abort(group.url, f"{incarnation}-*", within=ABORT_S)
                return
            except EngineError as error:
                if not self._runs(group):
                    return
                if self._loop.time() >= until:
                    log.error("group %s did not take the abort of a dead gateway's requests: %s", group.group, error)
                    return
            await asyncio.sleep(RETRY_S)

    def _runs(self, group: Group) -> bool:
        """Whether what ran there still can."""
        return any(
            one.group == group.group and one.epoch == group.epoch and one.state not in _OVER
            for one in self._snapshot().groups
        )
