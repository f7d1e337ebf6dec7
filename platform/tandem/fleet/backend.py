"""What the control service asks of a fleet: it notes wishes in the store, where the controller finds them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import msgspec

from tandem.core.types import DpLoad, FleetSnapshot, Group, GroupSpec, GroupState
from tandem.engine.client import EngineClient, EngineError
from tandem.fleet.control_service import Refused, UnknownGroup
from tandem.fleet.engines import Engines, NoEngineError
from tandem.fleet.snapshot import DESIRED, GROUPS, read_snapshot, watch_snapshots
from tandem.state import Store

_TRIES = 10
"""Writers of one wish that may get in between."""


class StoreBackend:
    """A `FleetBackend` over a store. Works in any process that has the store; the controller's serves the network."""

    def __init__(self, store: Store, engines: Engines, *, drain_s: float) -> None:
        """`drain_s`: seconds that a drain may take when nothing else is said."""
        self._store = store
        self._engines = engines
        self._drain_s = drain_s
        self._client = EngineClient()

    async def fleet(self) -> FleetSnapshot:
        """The fleet as it is now."""
        return await read_snapshot(self._store)

    def watch(self) -> AsyncIterator[FleetSnapshot]:
        """The fleet now and whenever it is different."""
        return watch_snapshots(self._store)

    async def put_group(self, spec: GroupSpec) -> GroupSpec:
        """Note that a group should exist, or have another shape. Raises Refused for one that no engine can run."""
        try:
            self._engines.check(spec)
        except NoEngineError as error:
            raise Refused(f"{error}.") from error

        def change(now: GroupSpec | None) -> GroupSpec:
            if now is not None and now.draining:
                raise Refused(f"{spec.group} is draining; wait until it is gone, or choose another name.")
            if now is not None and now.role is not spec.role:
                raise Refused(f"{spec.group} is a {now.role} group; drain it, then create it as {spec.role}.")
            return spec

        return await self._change(spec.group, change)

    async def cordon(self, group: str, cordoned: bool) -> GroupSpec:
        """Keep new pairs away from a group, or admit them."""

        def change(now: GroupSpec | None) -> GroupSpec:
            if now is None:
                raise UnknownGroup(group)
            if now.draining:
                raise Refused(f"{group} is draining, which is not taken back; create another group instead.")
            return msgspec.structs.replace(now, cordoned=cordoned)

        return await self._change(group, change)

    async def drain(self, group: str, deadline_s: float | None) -> GroupSpec:
        """Begin to drain a group; a repeated call sets the deadline anew."""
        deadline = time.time() + (self._drain_s if deadline_s is None else deadline_s)

        def change(now: GroupSpec | None) -> GroupSpec:
            if now is None:
                raise UnknownGroup(group)
            return msgspec.structs.replace(now, draining=True, drain_deadline=deadline)

        return await self._change(group, change)

    async def remove(self, group: str) -> None:
        """Let a group leave at once."""
        wished = await self._store.delete(DESIRED + group)
        if not wished and await self._store.get(GROUPS + group) is None:
            raise UnknownGroup(group)

    async def load(self, group: str | None) -> Mapping[str, Sequence[DpLoad]]:
        """The load of one group, or of all that answer."""
        if group is not None:
            found = await self._group(group)
            if not found.url:
                raise Refused(f"{group} is {found.state} and has no load to tell; wait until it is ready.")
            try:
                return {group: await self._client.loads(found.url)}
            except EngineError as error:
                raise Refused(f"{group} does not tell its load: {error}.") from error
        serving = [found for found in (await self.fleet()).groups if found.url and found.state is not GroupState.FAILED]
        answers = await asyncio.gather(*(self._client.loads(found.url) for found in serving), return_exceptions=True)
        loads: dict[str, Sequence[DpLoad]] = {}
        for found, answer in zip(serving, answers, strict=True):
            if isinstance(answer, BaseException):
                if not isinstance(answer, EngineError):
                    raise answer
            else:
                loads[found.group] = answer
        return loads

    async def close(self) -> None:
        """Close the connections to engines; the store is the caller's."""
        await self._client.close()

    async def _group(self, group: str) -> Group:
        entry = await self._store.get(GROUPS + group)
        if entry is None:
            raise UnknownGroup(group)
        return msgspec.json.decode(entry.value, type=Group)

    async def _change(self, group: str, change: Callable[[GroupSpec | None], GroupSpec]) -> GroupSpec:
        """Replace a wish by what `change` makes of it, however many others write it too."""
        key = DESIRED + group
        for _ in range(_TRIES):
            entry = await self._store.get(key)
            now = msgspec.json.decode(entry.value, type=GroupSpec) if entry else None
            wanted = change(now)
            if wanted == now:
                return wanted
            version = entry.version if entry else 0
            if await self._store.compare_and_set(key, msgspec.json.encode(wanted), version=version) is not None:
                return wanted
        raise Refused(f"{group} is being changed by others all the time; try again.")
