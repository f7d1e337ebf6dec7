"""A fleet's control service without a fleet: groups are ready at once, and gone when the test says."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import grpc
from msgspec.structs import replace

from tandem.core.group_check import CheckVerdict, GroupCheck
from tandem.core.refresh import Refresh
from tandem.core.traffic import TrafficReport
from tandem.core.types import DpLoad, FleetSnapshot, Group, GroupSpec, GroupState, Rank, RankState
from tandem.fleet.control_service import NoRefresh, Refused, UnknownGroup, serve_control
from tandem.fleet.refresh_ask import RefreshAsk


class FleetControl:
    """Serves on a thread of its own, on 127.0.0.1; what it was asked is in `calls`."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.holds = False
        """Whether groups that drain stay until `let_go`."""
        self.answers: dict[str, list[GroupCheck]] = {}
        """What groups answer when they are checked, one after the other, the last one for ever; others answer well."""
        self.routed: set[str] = set()
        """Groups that were ready at any time."""
        self.refuses = ""
        """Why no group may drain; empty = it may."""
        self.desired: dict[str, GroupSpec] = {}
        self.groups: dict[str, Group] = {}
        self._revision = 0
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Condition()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fleet-control", daemon=True)
        self._thread.start()
        self._server: grpc.aio.Server | None = None
        self.port = 0
        self.start()

    def start(self) -> None:
        """Listen: at first on a free port, then on the same again."""
        self._server, self.port = self._run(serve_control(self, "127.0.0.1", self.port))

    def stop(self) -> None:
        """Do not answer any more."""
        if self._server is not None:
            self._run(self._server.stop(0))
            self._server = None

    def close(self) -> None:
        """End it."""
        self.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def asked(self, call: str) -> list[str]:
        """The groups for which it was called so."""
        return [group for name, group in self.calls if name == call]

    def let_go(self, group: str) -> None:
        """The last stream of a group that drains has ended."""
        self._run(self._forget(group))

    def change(self, group: str, **fields: Any) -> None:
        """Let a group be otherwise."""

        async def note() -> None:
            self.groups[group] = replace(self.groups[group], **fields)
            await self._note()

        self._run(note())

    def put(self, spec: GroupSpec) -> None:
        """Somebody else puts a group."""
        self._run(self.put_group(spec))

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _note(self) -> None:
        async with self._changed:
            self._revision += 1
            self._changed.notify_all()

    async def _forget(self, group: str) -> None:
        self.desired.pop(group, None)
        self.groups.pop(group, None)
        await self._note()

    # -- FleetBackend

    async def fleet(self) -> FleetSnapshot:
        return FleetSnapshot(
            name="f",
            groups=tuple(self.groups[name] for name in sorted(self.groups)),
            desired=tuple(self.desired[name] for name in sorted(self.desired)),
            revision=self._revision,
        )

    async def watch(self) -> AsyncIterator[FleetSnapshot]:
        while True:
            seen = self._revision
            yield await self.fleet()
            async with self._changed:
                while self._revision == seen:
                    await self._changed.wait()

    async def put_group(self, spec: GroupSpec) -> GroupSpec:
        self.calls.append(("put", spec.group))
        self.desired[spec.group] = spec
        self.groups.setdefault(
            spec.group,
            Group(
                group=spec.group,
                role=spec.role,
                epoch=1,
                state=GroupState.READY,
                weight_version=spec.declared_version or "1",
                kv_format=spec.kv_format,
                revision=spec.revision,
                since=time.time(),
                ranks=tuple(Rank(rank=rank, state=RankState.READY) for rank in range(spec.nodes)),
            ),
        )
        group = self.groups[spec.group]
        state = GroupState.CORDONED if spec.cordoned else GroupState.READY
        if group.state in (GroupState.READY, GroupState.CORDONED) and group.state is not state:
            self.groups[spec.group] = replace(group, state=state, since=time.time())
        if self.groups[spec.group].routable:
            self.routed.add(spec.group)
        await self._note()
        return spec

    async def cordon(self, group: str, cordoned: bool) -> GroupSpec:
        self.calls.append(("cordon", group))
        self.desired[group] = replace(self.desired[group], cordoned=cordoned)
        await self._note()
        return self.desired[group]

    async def drain(self, group: str, deadline_s: float | None, *, migrate: bool, force: bool) -> GroupSpec:
        if group not in self.desired:
            raise UnknownGroup(group)
        if self.refuses and not force:
            raise Refused(self.refuses)
        self.calls.append(("drain", group))
        deadline = time.time() + (60 if deadline_s is None else deadline_s)
        spec = replace(self.desired[group], draining=True, drain_deadline=deadline)
        self.desired[group] = spec
        self.groups[group] = replace(self.groups[group], state=GroupState.DRAINING, reason="waits for a stream")
        await self._note()
        if not self.holds:
            await self._forget(group)
        return spec

    async def remove(self, group: str) -> None:
        self.calls.append(("remove", group))
        await self._forget(group)

    async def load(self, group: str | None) -> Mapping[str, Sequence[DpLoad]]:
        return {name: (DpLoad(dp_rank=0, running=1, token_usage=0.25),) for name in self.groups}

    async def traffic(self) -> Sequence[TrafficReport]:
        return ()

    async def check(self, group: str) -> GroupCheck:
        if group not in self.groups:
            raise UnknownGroup(group)
        self.calls.append(("check", group))
        left = self.answers.get(group) or [GroupCheck(verdict=CheckVerdict.OK)]
        answer = left.pop(0) if len(left) > 1 else left[0]
        return replace(answer, epoch=self.groups[group].epoch)

    async def check_weights(self, path: str, version: str) -> None:
        self.calls.append(("weights", version))

    async def refresh(self, ask: RefreshAsk) -> Refresh:
        raise NoRefresh()

    async def refresh_state(self) -> Refresh:
        raise NoRefresh()

    async def stop_refresh(self) -> Refresh:
        raise NoRefresh()
