"""Drives a refresh of the weights: looks at the fleet after every change, and tells the group whose turn it is."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable

import msgspec
from msgspec.structs import replace

from tandem.core import refresh as refreshing
from tandem.core.declared import declarations, with_replaced
from tandem.core.group_record import Weights
from tandem.core.refresh import OVER, Refresh, RefreshPhase, Told
from tandem.core.types import GroupSpec
from tandem.fleet import clock as process_clock
from tandem.fleet.fleet_record import change_record
from tandem.fleet.refresh_store import REFRESH_KEY
from tandem.fleet.snapshot import DESIRED, GROUPS, FleetRecord, read_snapshot
from tandem.state import Store

_LOOK_S = 5.0
"""The fleet is looked at so often although nothing changed: a drain may have come to its limit."""
_AGAIN_S = 0.05

_log = logging.getLogger(__name__)


class RefreshDriver:
    """One run of it, until the store fails. All it knows is in the store, so the next run goes on where it ended."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = process_clock.now) -> None:
        self._store = store
        self._clock = clock

    async def run(self) -> None:
        """Follow every change of the fleet. Raises StoreError."""
        changed = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._listen(changed), name="follow the fleet")
            while True:
                changed.clear()
                active = await self._look()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S if active else None):
                        await changed.wait()

    async def _listen(self, changed: asyncio.Event) -> None:
        async for change in self._store.watch(""):
            if change.key == REFRESH_KEY or change.key.startswith((GROUPS, DESIRED)):
                changed.set()
        raise RuntimeError("the store's watch ended")

    async def _look(self) -> bool:
        """Go on as far as possible; return whether a refresh goes on."""
        while True:
            entry = await self._store.get(REFRESH_KEY)
            if entry is None:
                return False
            old = msgspec.json.decode(entry.value, type=Refresh)
            if old.phase in OVER:
                return False
            fleet = await read_snapshot(self._store)
            new, told = refreshing.step(old, fleet.groups, fleet.desired, self._clock())
            for one in told:
                await self._tell(one)
            if new.phase is RefreshPhase.DONE:
                await self._serve(new, fleet.desired)
            if new == old and not told:
                return True
            value = msgspec.json.encode(new)
            if await self._store.compare_and_set(REFRESH_KEY, value, version=entry.version) is None:
                await asyncio.sleep(_AGAIN_S)
                continue
            if (new.phase, new.group) != (old.phase, old.group):
                why = f": {new.failure or new.note}" if new.failure or new.note else ""
                _log.info("the refresh to weight version %s is %s%s", new.version, new.phase.value, why)

    async def _tell(self, told: Told) -> None:
        """Note that a group should have other weights; one that leaves meanwhile is let go."""
        key = DESIRED + told.group
        while True:
            entry = await self._store.get(key)
            if entry is None:
                return
            spec = msgspec.json.decode(entry.value, type=GroupSpec)
            if spec.draining:
                return
            path, version = told.weights
            wanted = msgspec.json.encode(replace(spec, weights_path=path, weight_version=version))
            if await self._store.compare_and_set(key, wanted, version=entry.version) is not None:
                return

    async def _serve(self, refresh: Refresh, specs: Iterable[GroupSpec]) -> None:
        """These are the fleet's weights now: groups that come later start with them, and what the groups declare stands
        for them from now on."""
        declared, weights = declarations(specs), Weights(refresh.path, refresh.version)

        def change(record: FleetRecord) -> FleetRecord:
            last = Weights(record.declared_path, record.declared_version)  # all groups may have gone
            replaced = with_replaced(record.replaced, declared or ({last} if last.version else ()), weights)
            return replace(record, model_path=weights.path, model_version=weights.version, replaced=replaced)

        await change_record(self._store, change)
