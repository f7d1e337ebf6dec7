"""The simulated groups, what breaks them, and what the gateways hear of it through the store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.core.types import Group, GroupState, Role
from tandem.sim.engine import Engine
from tandem.sim.ledger import Invariant
from tandem.sim.schedule import OF_FLEET, Fault, FaultKind, Schedule

if TYPE_CHECKING:
    from tandem.sim.world import World

NEWS_S = 0.01
"""Until a gateway hears of a change."""
NEWS_LATE_S = 1.0
NOTICE_S = {FaultKind.DIES: 0.3, FaultKind.VANISHES: 1.5, FaultKind.HANGS: 1.5}
"""Until the death of a group is noticed."""
DRAIN_CHECK_S = 0.1
DRAIN_LEFT_S = 2.5
"""From the moment when streams are moved until the group stops all the same."""
RENEW_LEFT_S = 60.0
"""The same for new weights: streams of the old ones may have nowhere else to go."""


class SimGroup:
    """One group over its life."""

    __slots__ = ("busy", "engine", "epoch", "incarnation", "name", "record", "role", "version")

    def __init__(self, name: str, role: Role, version: str) -> None:
        self.name = name
        self.role = role
        self.version = version
        self.epoch = 0
        self.incarnation = 0
        self.engine: Engine | None = None
        self.record: Group | None = None
        self.busy = False
        """Something happens to it already."""


class Fleet:
    """All groups, and their records in the store."""

    def __init__(self, world: World, schedule: Schedule) -> None:
        self.world = world
        self.groups: list[SimGroup] = []
        self._revision = 0
        self._revisions: dict[str, int] = {}
        self._dp_size = schedule.dp_size
        self._version = 0
        self._to_renew: list[SimGroup] = []
        for role, count in ((Role.PREFILL, schedule.prefill), (Role.DECODE, schedule.decode)):
            self.groups += [SimGroup(f"{role.value[0]}{number}", role, "v0") for number in range(count)]
        for group in self.groups:
            self._start(group)
            self._ready(group, group.incarnation)
        for fault in schedule.faults:
            if fault.kind in OF_FLEET:
                world.clock.at(fault.at, self._strike, fault)

    # Life

    def _start(self, group: SimGroup) -> None:
        group.incarnation += 1
        url = f"http://{group.name}.{group.incarnation}"
        group.engine = self.world.engines[url] = Engine(
            self.world, group.name, group.role, group.epoch, group.version, url
        )
        self._put(group, GroupState.STARTING)

    def _ready(self, group: SimGroup, incarnation: int) -> None:
        if group.incarnation == incarnation:
            group.busy = False
            self._put(group, GroupState.READY)
            self._renew_next()

    def _restart(self, group: SimGroup, seconds: float) -> None:
        """It was noticed that it is dead; it is back after so many seconds."""
        assert group.engine is not None, "it had one"
        if not group.engine.dead:
            group.engine.kill(group.engine.cause or FaultKind.HANGS, loud=True)
        if group.incarnation % 2:
            self._put(group, GroupState.FAILED)
        group.epoch += 1
        self._start(group)
        self.world.clock.after(0.5 + seconds, self._ready, group, group.incarnation)

    def _drain(self, group: SimGroup, seconds: float, kind: FaultKind) -> None:
        group.busy = True
        now = self.world.clock.now
        self._put(group, GroupState.CORDONED)
        self._put(group, GroupState.DRAINING, migrate_at=now + seconds)
        left = RENEW_LEFT_S if kind is FaultKind.RENEWED else DRAIN_LEFT_S
        self._drained(group, now + seconds + left, kind)

    def _drained(self, group: SimGroup, deadline: float, kind: FaultKind) -> None:
        """Is it empty, or its time over? Then it stops."""
        engine, now = group.engine, self.world.clock.now
        assert engine is not None, "it drains"
        # An engine is empty a moment before the gateway has read the last of it.
        if engine.legs and now < deadline:
            self.world.clock.after(DRAIN_CHECK_S, self._drained, group, deadline, kind)
            return
        self.world.clock.after(DRAIN_CHECK_S, self._stopped, group, kind)

    def _stopped(self, group: SimGroup, kind: FaultKind) -> None:
        engine = group.engine
        assert engine is not None, "it drains"
        engine.kill(kind, loud=True)
        if kind is FaultKind.RENEWED:
            group.version = f"v{self._version}"
            group.epoch += 1
            self._start(group)
            self.world.clock.after(1.0, self._ready, group, group.incarnation)
            return
        self._put(group, GroupState.GONE)
        if group.incarnation % 2:
            self._put(group, None)
            group.epoch = 0
        else:
            group.epoch += 1
        group.incarnation += 1
        self.world.clock.after(1.0, self._anew, group)

    def _anew(self, group: SimGroup) -> None:
        """One of the same name."""
        self._start(group)
        self.world.clock.after(0.5, self._ready, group, group.incarnation)

    def _renew_next(self) -> None:
        """One group after the other gets the newest weights, as soon as all others are well."""
        if self._to_renew and not any(group.busy for group in self.groups):
            group = self._to_renew.pop()
            if group.version != f"v{self._version}":
                self._drain(group, 0.5, FaultKind.RENEWED)
            else:
                self._renew_next()

    # Faults

    def _strike(self, fault: Fault) -> None:
        if fault.kind is FaultKind.GATEWAY_DIES:
            self._took_place(fault.kind, f"gateway {fault.gateway}")
            self.world.gateway_dies(fault)
            return
        if fault.kind is FaultKind.NEWS_LOST or fault.kind is FaultKind.NEWS_LATE:
            self._news(fault)
            return
        of_role = [group for group in self.groups if group.role is fault.role]
        if fault.kind is FaultKind.ROLE_GONE:
            for group in of_role:
                self._die(group, FaultKind.ROLE_GONE, fault.seconds)
            return
        if fault.kind is FaultKind.RENEWED:
            if not self._to_renew:
                self._version += 1
                self.world.versions.append(f"v{self._version}")
                roles = sorted(self.groups, key=lambda group: (group.name[1:], group.role))
                self._to_renew = roles[::-1]
                self._took_place(fault.kind, "all groups")
                self._renew_next()
            return
        group = of_role[fault.pick % len(of_role)]
        engine = group.engine
        if group.busy or engine is None or engine.cause is not None:
            return
        if fault.kind in (FaultKind.DRAINS, FaultKind.CORDONED) and fault.pick and self._last(group):
            return
        match fault.kind:
            case FaultKind.PAUSES:
                self._took_place(fault.kind, group.name)
                engine.pause(min(fault.seconds, 2.5))
            case FaultKind.SLOW:
                self._took_place(fault.kind, group.name)
                engine.slow_until = self.world.clock.now + fault.seconds
                # A record may be written again, with nothing new that matters.
                self._put(group, GroupState.READY)
            case FaultKind.CORDONED:
                self._took_place(fault.kind, group.name)
                group.busy = True
                self._put(group, GroupState.CORDONED)
                self.world.clock.after(fault.seconds, self._ready, group, group.incarnation)
            case FaultKind.DRAINS:
                self._took_place(fault.kind, group.name)
                self._drain(group, 0.2 * fault.seconds, fault.kind)
            case _:
                self._die(group, fault.kind, fault.seconds)

    def _die(self, group: SimGroup, kind: FaultKind, seconds: float) -> None:
        if group.busy or group.engine is None or group.engine.cause is not None:
            return
        self._took_place(kind, group.name)
        group.busy = True
        if kind is FaultKind.HANGS:
            group.engine.hang(kind)
        else:
            group.engine.kill(kind, loud=kind is not FaultKind.VANISHES)
        self.world.clock.after(NOTICE_S.get(kind, 0.3), self._restart, group, seconds)

    def _last(self, group: SimGroup) -> bool:
        """Whether no other of its role and weights is ready: mostly nobody drains that."""
        return not any(
            one is not group and one.role is group.role and one.version == group.version and not one.busy
            for one in self.groups
        )

    def _took_place(self, kind: FaultKind, where: str) -> None:
        self.world.ledger.took_place(kind)
        if self.world.story is not None:
            self.world.tell(f"{where} ! {kind.value}")

    # The store

    def _put(self, group: SimGroup, state: GroupState | None, *, migrate_at: float = 0.0) -> None:
        """Write a group's record, and let the gateways hear of it. None = delete it."""
        assert group.engine is not None, "it was started"
        self._revision += 1
        self._revisions[group.name] = self._revision
        url = group.engine.url if state is not GroupState.STARTING else ""
        group.record = (
            None
            if state is None
            else Group(
                group=group.name,
                role=group.role,
                epoch=group.epoch,
                state=state,
                url=url,
                bootstrap_host=group.name,
                bootstrap_port=8998,
                dp_size=self._dp_size,
                weight_version=group.version,
                migrate_at=migrate_at,
            )
        )
        now = self.world.clock.now
        for gateway in self.world.gateways:
            if now < gateway.news_lost_until:
                continue
            delay = NEWS_LATE_S if now < gateway.news_late_until else NEWS_S if now else 0.0
            self.world.clock.after(delay, gateway.hear, group.name, self._revision, group.record)

    def _news(self, fault: Fault) -> None:
        gateway = self.world.gateways[fault.gateway % len(self.world.gateways)]
        self._took_place(fault.kind, f"gateway {gateway.number}")
        until = self.world.clock.now + fault.seconds
        if fault.kind is FaultKind.NEWS_LATE:
            gateway.news_late_until = max(gateway.news_late_until, until)
            return
        gateway.news_lost_until = max(gateway.news_lost_until, until)
        self.world.clock.at(gateway.news_lost_until + 0.05, self.resync, fault.gateway)

    def resync(self, number: int) -> None:
        """The watch is back: what is so now is told, not what was in between."""
        gateway = self.world.gateways[number % len(self.world.gateways)]
        for group in self.groups:
            gateway.hear(group.name, self._revisions[group.name], group.record)

    def check_empty(self) -> None:
        """No engine may hold anything."""
        for group in self.groups:
            if group.engine is not None and group.engine.legs:
                leg = next(iter(group.engine.legs))
                self.world.ledger.fail(Invariant.LEAKED, f"{group.name} still holds {leg}", leg.attempt.request)
