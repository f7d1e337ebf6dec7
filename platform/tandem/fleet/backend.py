"""What the control service asks of a fleet: it notes wishes in the store, where the controller finds them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import msgspec

from tandem.core.declared import contradiction, declared_by, given, kept
from tandem.core.group_check import GroupCheck
from tandem.core.group_record import Weights
from tandem.core.refresh import OVER, Refresh, some_pair
from tandem.core.traffic import TrafficReport
from tandem.core.types import DpLoad, FleetSnapshot, Group, GroupSpec, GroupState
from tandem.engine.client import EngineClient, EngineError
from tandem.fleet import clock
from tandem.fleet.check import GroupChecker
from tandem.fleet.control_service import NoRefresh, Refused, UnknownGroup
from tandem.fleet.declare import Declarations
from tandem.fleet.engines import Engines, NoEngineError
from tandem.fleet.refresh_ask import RefreshAsk
from tandem.fleet.refresh_begin import begin_refresh
from tandem.fleet.refresh_store import change_refresh, read_refresh
from tandem.fleet.snapshot import DESIRED, GROUPS, read_snapshot, read_traffic, watch_snapshots
from tandem.state import Store

_TRIES = 10
"""Writers of one wish that may get in between."""


class StoreBackend:
    """A `FleetBackend` over a store. Works in any process that has the store; the controller's serves the network."""

    def __init__(self, store: Store, engines: Engines, *, drain_s: float, refresh_drain_s: float = 660.0) -> None:
        """Seconds that a drain may take when nothing else is said: `refresh_drain_s` for a group that gets other
        weights, `drain_s` for one that leaves."""
        self._store = store
        self._engines = engines
        self._drain_s = drain_s
        self._refresh_drain_s = refresh_drain_s
        self._client = EngineClient()
        self._checker = GroupChecker(store, engines)
        self._declarations = Declarations(store, engines)
        self._draining = asyncio.Lock()
        """From the look at who is left until the wish is noted: else two drains at once leave nobody. One controller
        serves, so a lock of this process does."""

    async def fleet(self) -> FleetSnapshot:
        """The fleet as it is now."""
        return await read_snapshot(self._store)

    def watch(self) -> AsyncIterator[FleetSnapshot]:
        """The fleet now and whenever it is different."""
        return watch_snapshots(self._store)

    async def put_group(self, spec: GroupSpec) -> GroupSpec:
        """Note that a group should exist, or have another shape. A new one is given the weights that it declares, or
        what was put in their place; one that is there keeps its own.

        Raises Refused for one that no engine can run.
        """
        try:
            self._engines.check(spec)
        except NoEngineError as error:
            raise Refused(f"{error}.") from error
        fresh = await self._weights_of_new(spec)

        def change(now: GroupSpec | None) -> GroupSpec:
            if now is not None and now.draining:
                raise Refused(f"{spec.group} is draining; wait until it is gone, or choose another name.")
            if now is not None and now.role is not spec.role:
                raise Refused(f"{spec.group} is a {now.role} group; drain it, then create it as {spec.role}.")
            if now is not None:
                if why := contradiction(spec, now):
                    raise Refused(why)
                return kept(spec, now)
            if fresh is None:
                raise Refused(f"{spec.group} has just gone; try again.")
            return given(spec, fresh)

        noted = await self._change(spec.group, change)
        await self._declarations.settle()
        return noted

    async def _weights_of_new(self, spec: GroupSpec) -> Weights | None:
        """What a group is given that does not exist yet; None for one that does."""
        fleet = await self.fleet()
        now = next((one for one in fleet.desired if one.group == spec.group), None)
        declared = declared_by(spec)
        if now is not None:
            if declared is not None and declared_by(now) is None and now.weight_version and not now.draining:
                await self._declarations.learn(declared, Weights(now.weights_path, now.weight_version))
            return None
        if declared is not None and not spec.weight_version:
            return await self._declarations.admit(declared)
        return Weights(fleet.model_path, fleet.model_version) if fleet.model_version else Weights("", "")

    async def cordon(self, group: str, cordoned: bool) -> GroupSpec:
        """Keep new pairs away from a group, or admit them."""

        def change(now: GroupSpec | None) -> GroupSpec:
            if now is None:
                raise UnknownGroup(group)
            if now.draining:
                raise Refused(f"{group} is draining, which is not taken back; create another group instead.")
            return msgspec.structs.replace(now, cordoned=cordoned)

        return await self._change(group, change)

    async def drain(
        self, group: str, deadline_s: float | None, *, migrate: bool = False, force: bool = False
    ) -> GroupSpec:
        """Begin to drain a group; a repeated call sets the deadline anew. `migrate`: its streams move at once.

        Raises Refused for the last ready group of its role, or of the last complete pair, unless `force`.
        """
        now_s = clock.now()
        deadline = now_s + (self._drain_s if deadline_s is None else deadline_s)

        def change(now: GroupSpec | None) -> GroupSpec:
            if now is None:
                raise UnknownGroup(group)
            at = now_s if migrate else 0.0
            return msgspec.structs.replace(now, draining=True, drain_deadline=deadline, migrate_at=at)

        async with self._draining:
            if not force and (why := why_needed(await self.fleet(), group)):
                raise Refused(why)
            noted = await self._change(group, change)
        await self._declarations.settle()
        return noted

    async def remove(self, group: str) -> None:
        """Let a group leave at once."""
        wished = await self._store.delete(DESIRED + group)
        if not wished and await self._store.get(GROUPS + group) is None:
            raise UnknownGroup(group)
        await self._declarations.settle()

    async def load(self, group: str | None, *, within: float = 5.0) -> Mapping[str, Sequence[DpLoad]]:
        """The load of one group, or of all that answer within so many seconds."""
        if group is not None:
            found = await self._group(group)
            if not found.url:
                raise Refused(f"{group} is {found.state} and has no load to tell; wait until it is ready.")
            try:
                return {group: await self._client.loads(found.url, within=within)}
            except EngineError as error:
                raise Refused(f"{group} does not tell its load: {error}.") from error
        serving = [found for found in (await self.fleet()).groups if found.url and found.state is not GroupState.FAILED]
        answers = await asyncio.gather(
            *(self._client.loads(found.url, within=within) for found in serving), return_exceptions=True
        )
        loads: dict[str, Sequence[DpLoad]] = {}
        for found, answer in zip(serving, answers, strict=True):
            if isinstance(answer, BaseException):
                if not isinstance(answer, EngineError):
                    raise answer
            else:
                loads[found.group] = answer
        return loads

    async def traffic(self) -> Sequence[TrafficReport]:
        """What the gateway replicas have counted; those of the last ten seconds."""
        return await read_traffic(self._store)

    async def check(self, group: str) -> GroupCheck:
        """What a group answers to a prompt, alone and in a pair."""
        return await self._checker.check(await self._group(group))

    async def check_weights(self, path: str, version: str) -> None:
        """Return if there can be groups that declare these weights. Raises Refused."""
        await self._declarations.admit(Weights(path, version))

    async def refresh(self, ask: RefreshAsk) -> Refresh:
        """Begin to give the fleet other weights. Raises Refused when they do not fit, or there would be a pause."""
        return await begin_refresh(self._store, self._engines, ask, drain_s=self._refresh_drain_s)

    async def refresh_state(self) -> Refresh:
        """The refresh that goes on, or the last one."""
        if (found := await read_refresh(self._store)) is None:
            raise NoRefresh()
        return found

    async def stop_refresh(self) -> Refresh:
        """Let the refresh that goes on end as if it had failed; one that goes back already ends where it is."""
        await self.refresh_state()

        def stop(now: Refresh) -> Refresh:
            if now.phase in OVER:
                raise Refused(f"The refresh to version {now.version} is not running: it is {now.phase}.")
            return msgspec.structs.replace(now, stop=True)

        return await change_refresh(self._store, stop)

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


def why_needed(fleet: FleetSnapshot, group: str) -> str:
    """Why the fleet could not answer without this group, as a sentence that says what to do; empty = it could."""
    staying = {spec.group: not spec.draining for spec in fleet.desired}
    own = next((found for found in fleet.groups if found.group == group and found.routable), None)
    if own is None or not staying.get(group, True):
        return ""
    role = own.role
    # Without those that leave: they drain, or nobody wishes for them any more.
    others = [found for found in fleet.groups if found.routable and staying.get(found.group) and found is not own]
    if all(found.role is not role for found in others):
        return (
            f"{group} is the last {role} group that is ready: without it nothing is answered; add another one first"
            f" (`tandem scale {role} N`), or force it."
        )
    if some_pair([own, *others]) and not some_pair(others):
        return (
            f"{group} is the last ready {role} group whose weight version ({own.weight_version})"
            f"{f' and KV format ({own.kv_format})' if own.kv_format else ''} has a ready group of"
            " the other role: without it nothing is answered; wait until the refresh has gone on, or force it."
        )
    return ""
