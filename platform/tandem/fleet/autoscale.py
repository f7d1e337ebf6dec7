"""Autoscaling where no operator does it: every tick the controller looks at the load, and puts or drains whole groups.

What to do is decided by `core/planning.py`, and which groups go by `core/rollout.py`, as in Kubernetes. What is
decided stands in the store: under `planning/<role>` for people, and what the planner remembers under `planner`, so that
a controller that was restarted goes on. A number that somebody else has set is seen as such by the planner.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import msgspec
from msgspec.structs import replace

from tandem.config import FleetConfig
from tandem.core.planning import plan
from tandem.core.planning_types import Decision, GroupLoad, Observation, PlanPolicy, PlanState, PoolView
from tandem.core.planning_view import pool_view, queue_of, window_of
from tandem.core.rollout import roll
from tandem.core.rollout_types import Create, Member, Plan, Pool
from tandem.core.traffic import TrafficHistory, TrafficReport
from tandem.core.types import DpLoad, FleetSnapshot, GroupSpec, GroupState, PoolPlan, Role
from tandem.fleet import clock as process_clock
from tandem.fleet.control_service import Refused, UnknownGroup
from tandem.fleet.plan import pool_of
from tandem.fleet.snapshot import PLANS
from tandem.planning_policy import policy_of
from tandem.state import Store, StoreError

STATE_KEY = "planner"
"""In the store: the planner's memory, a `PlanState`."""

_log = logging.getLogger(__name__)


class AutoscaleSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller is told of it."""

    policy: PlanPolicy
    templates: tuple[GroupSpec, ...]
    """A new group of each role, but for its name."""


def autoscale_settings(config: FleetConfig) -> AutoscaleSettings | None:
    """As the configuration says; None = no pool scales by itself, or the operator, who puts the groups, sees to it.
    Raises ValueError where the budget is too small."""
    pools = {role: pool_of(config, role) for role in Role}
    if config.ray.group_resources or all(pool.autoscaling is None for pool in pools.values()):
        return None
    templates = (
        GroupSpec(group="", role=role, nodes=pool.nodes, gpus_per_node=pool.gpus_per_node)
        for role, pool in pools.items()
    )
    return AutoscaleSettings(policy=policy_of(config), templates=tuple(templates))


class ScalableFleet(Protocol):
    """What it needs of a fleet: a `StoreBackend` has it."""

    async def fleet(self) -> FleetSnapshot: ...
    async def load(self, group: str | None, *, within: float) -> Mapping[str, Sequence[DpLoad]]: ...
    async def traffic(self) -> Sequence[TrafficReport]: ...
    async def put_group(self, spec: GroupSpec) -> GroupSpec: ...
    async def drain(self, group: str, deadline_s: float | None, *, migrate: bool, force: bool) -> GroupSpec: ...


class Autoscaler:
    """One run of it. Belongs to the event loop of its store."""

    def __init__(
        self,
        store: Store,
        fleet: ScalableFleet,
        settings: AutoscaleSettings,
        *,
        clock: Callable[[], float] = process_clock.now,
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._policy = settings.policy
        self._templates = {template.role: template for template in settings.templates}
        self._clock = clock
        self._state: PlanState | None = None
        self._history = TrafficHistory(max(self._policy.fast_window_s, self._policy.slow_window_s))
        self._loads: dict[str, GroupLoad] = {}
        self._asked_at: dict[str, float] = {}
        self._left: dict[Role, int] = {}
        """How many groups were wished for when the last tick ended: another number is somebody else's."""

    async def run(self) -> None:
        """Tick for ever. Raises StateFormatError; an outage of the store is waited for."""
        loop = asyncio.get_running_loop()
        away = False
        while True:
            due = loop.time() + self._policy.tick_s
            try:
                await self.tick()
                away = False
            except StoreError as error:
                if not away:
                    _log.warning("autoscaling waits for the store: %s", error)
                away = True
            await asyncio.sleep(max(0.0, due - loop.time()))

    async def tick(self) -> Decision:
        """Look once, decide, act; returns what was decided. Raises StoreError."""
        if self._state is None:
            self._state = await self._recall()
        reports = await self._fleet.traffic()
        loads = await self._fleet.load(None, within=self._policy.tick_s)
        fleet = await self._fleet.fleet()
        now = self._clock()
        self._history.add(reports, now)
        self._note(fleet, loads, now)
        self._state, decision = plan(self._state, self._observe(fleet, now), self._policy, now)
        # Before anything is done: whoever goes on from here must not take it for somebody else's wish.
        await self._store.put(STATE_KEY, msgspec.json.encode(self._state))
        held = await self._act(fleet, decision, now)
        await self._tell(fleet, decision, held)
        return decision

    # What there is

    def _note(self, fleet: FleetSnapshot, loads: Mapping[str, Sequence[DpLoad]], now: float) -> None:
        """Keep what engines said last, with its age, and when groups were wished for."""
        names = {group.group for group in fleet.groups}
        self._loads |= {name: GroupLoad(at=now, ranks=tuple(load)) for name, load in loads.items()}
        self._loads = {name: load for name, load in self._loads.items() if name in names}
        self._asked_at = {spec.group: self._asked_at.get(spec.group, now) for spec in fleet.desired}

    def _observe(self, fleet: FleetSnapshot, now: float) -> Observation:
        policy = self._policy
        fast = self._history.window(policy.fast_window_s, now)
        return Observation(
            prefill=self._view(fleet, Role.PREFILL),
            decode=self._view(fleet, Role.DECODE),
            fast=window_of(fast, policy),
            slow=window_of(self._history.window(policy.slow_window_s, now), policy),
            queue=queue_of(fast),
        )

    def _view(self, fleet: FleetSnapshot, role: Role) -> PoolView:
        view = pool_view(role, fleet.groups, fleet.desired, self._loads, asked_at=self._asked_at)
        left = self._left.get(role)
        self._left[role] = view.wanted
        return view if left is None else replace(view, by_hand=view.wanted != left)

    # What is done

    async def _act(self, fleet: FleetSnapshot, decision: Decision, now: float) -> dict[Role, str]:
        """Carry it out; returns what could not be done now, which comes again at the next tick."""
        held: dict[Role, str] = {}
        changed = [role for role in Role if decision.of(role).changed]
        if not changed:
            return held
        plans = roll([self._pool(role, fleet, decision) for role in Role], now)
        for role in changed:
            wanted = decision.of(role)
            _log.info("autoscaling: %s", wanted.reason)
            try:
                done = await self._carry_out(role, plans[role], last=wanted.wanted == 0)
            except (Refused, UnknownGroup) as error:
                held[role] = str(error)
            else:
                held[role] = "" if done else plans[role].status.message
            if held[role]:
                _log.warning("autoscaling of %s has to wait: %s", role.value, held[role])
        return held

    async def _carry_out(self, role: Role, wanted: Plan, *, last: bool) -> bool:
        """Put and drain groups; returns whether there was something to do."""
        for action in wanted.actions:
            if isinstance(action, Create):
                await self._fleet.put_group(replace(self._templates[role], group=action.group))
                self._left[role] += 1
            else:
                # None = the fleet's own limit. Its streams go to the others at once, if there are others.
                await self._fleet.drain(action.group, None, migrate=not last, force=last)
                self._left[role] -= 1
        return bool(wanted.actions)

    def _pool(self, role: Role, fleet: FleetSnapshot, decision: Decision) -> Pool:
        """The pool as a rollout sees it: all of its groups are alike here, only their number changes."""
        wishes = {spec.group: spec for spec in fleet.desired if spec.role is role}
        known = {
            group.group: group for group in fleet.groups if group.role is role and group.state is not GroupState.GONE
        }
        members = []
        for name in sorted(wishes.keys() | known.keys()):
            group, wish, load = known.get(name), wishes.get(name), self._loads.get(name)
            members.append(
                Member(
                    group=name,
                    role=role,
                    revision="",
                    state=group.state if group else GroupState.STARTING,
                    kv_format=group.kv_format if group else "",
                    weight_version=group.weight_version if group else "",
                    ready_since=group.since if group and group.routable else None,
                    leaving=wish is None or wish.draining,
                    running=load.running if load else 0,
                    waiting=load.waiting if load else 0,
                )
            )
        return Pool(role=role, groups=decision.of(role).wanted, revision="", members=tuple(members))

    # What is remembered

    async def _recall(self) -> PlanState:
        """What an earlier run of the controller knew."""
        for role in Role:
            if not self._policy.of(role).automatic:
                await self._store.delete(PLANS + role.value)
        entry = await self._store.get(STATE_KEY)
        if entry is None:
            return PlanState()
        try:
            return msgspec.json.decode(entry.value, type=PlanState)
        except msgspec.MsgspecError as error:
            _log.warning("what the planner knew is of another version of Tandem, so it begins anew: %s", error)
            return PlanState()

    async def _tell(self, fleet: FleetSnapshot, decision: Decision, held: Mapping[Role, str]) -> None:
        """Show it to people, where it is different from what they see."""
        shown = {shown.role: shown for shown in fleet.plans}
        for role in Role:
            if not self._policy.of(role).automatic:
                continue
            made = decision.of(role)
            told = PoolPlan(
                role=role,
                wanted=made.wanted,
                reason=made.reason,
                since=made.since,
                held=held.get(role) or made.held,
            )
            if told != shown.get(role):
                await self._store.put(PLANS + role.value, msgspec.json.encode(told))
