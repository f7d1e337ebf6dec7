"""Autoscaling: looks at a fleet's load every tick, asks `core/planning.py`, and writes what it says.

Both pools are planned together, since they share GPUs. A number is written through the scale subresource of the very
pool that was looked at, so that a `kubectl scale` in between is not undone: that is seen at the next tick, and stands.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence

import msgspec

from tandem.core.planning import plan
from tandem.core.planning_types import GroupLoad, Observation, PlanPolicy, PlanState, PoolDecision, PoolView
from tandem.core.planning_view import pool_view, queue_of, window_of
from tandem.core.traffic import Traffic, TrafficHistory
from tandem.core.types import DpLoad, FleetSnapshot, Role
from tandem.fleet.control_client import ControlError
from tandem_operator.api.fleet import FleetSpec
from tandem_operator.api.pool import PoolSpec
from tandem_operator.apply import Trouble, difference, without_empty
from tandem_operator.control import FleetLink
from tandem_operator.kube import KubeError
from tandem_operator.metrics import ATTAINMENT, DECISIONS, WANTED
from tandem_operator.names import (
    EP_GROUP,
    FLEET,
    FLEET_LABEL,
    POOL,
    Key,
    Object,
    key_of,
    leaving,
    pool_name,
)
from tandem_operator.reconcile.context import Context, rfc3339
from tandem_operator.reconcile.planning_memory import PlanningMemory
from tandem_operator.render.config import SpecError, fleet_spec
from tandem_operator.render.policy import plan_policy
from tandem_operator.stored import stored_spec

_log = logging.getLogger(__name__)
_TELL_S = 15.0
"""Load, service and what holds a pool back are as old as this in the status: each change is a write to the API
server, and a look at all that is the fleet's."""


class Planner:
    """The planning of all fleets, each in a task of its own."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._tasks: dict[tuple[str, str, str], asyncio.Task[None]] = {}
        """By namespace, name and UID: another fleet of the same name begins anew."""

    def look(self) -> None:
        """Begin to plan for new fleets, and end it for those that are gone. Called at each look at a Fleet, so what
        ended by a mistake begins again soon."""
        metas = [obj["metadata"] for obj in self._ctx.cache.all(FLEET)]
        fleets = {(meta["namespace"], meta["name"], meta["uid"]) for meta in metas}
        for which in self._tasks.keys() - fleets:
            self._tasks.pop(which).cancel()
        for which in [which for which, task in self._tasks.items() if task.done()]:
            _tell_of_end(self._tasks.pop(which))
        for which in fleets - self._tasks.keys():
            namespace, fleet, _ = which
            planner = FleetPlanner(self._ctx, namespace, fleet)
            self._tasks[which] = asyncio.create_task(planner.run(), name=f"tandem-planning-{namespace}-{fleet}")

    async def close(self) -> None:
        """End all."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        self._tasks.clear()


class FleetPlanner:
    """The planning of one fleet. An operator that takes over goes on from what the one before has kept."""

    def __init__(self, ctx: Context, namespace: str, fleet: str) -> None:
        self._ctx = ctx
        self._key = Key(FLEET, namespace, fleet)
        self._memory = PlanningMemory(ctx)
        self._state: PlanState | None = None
        self._history: TrafficHistory | None = None
        self._loads: dict[str, GroupLoad] = {}
        self._asked_at: dict[str, float] = {}
        self._told_at = 0.0
        self._held_at: dict[Role, float] = {}
        self._began: float | None = None

    async def run(self) -> None:
        """Tick, for as long as the fleet exists."""
        try:
            while True:  # noqa: ASYNC110 - time is what it waits for
                await asyncio.sleep(await self.tick())
        finally:
            self._attained(None)

    async def tick(self) -> float:
        """Look once, whatever comes of it; return the seconds until the next look."""
        fleet = self._ctx.cache.get(self._key)
        link = self._ctx.links.get(self._key.namespace, self._key.name)
        if fleet is None or leaving(fleet) or link is None or not link.reachable:
            self._attained(None)
            return _IDLE_S
        again = _IDLE_S
        try:
            spec = fleet_spec(fleet["spec"])
            again = spec.planning.tick_s
            return await self._look(fleet, spec, link)
        except SpecError:
            return _IDLE_S  # told of the Fleet
        except ControlError as error:
            self._attained(None)
            _log.warning("The load of fleet %s is not known: %s", self._key, error)
        except KubeError as error:
            _log.warning("A decision on fleet %s was not written, it comes again: %s", self._key, error)
        except Exception:  # noqa: BLE001 - a mistake in one tick must not end the planning
            _log.exception("The planning of %s failed; it goes on at the next tick.", self._key)
        return again

    async def _look(self, fleet: Object, spec: FleetSpec, link: FleetLink) -> float:
        pools = {role: self._pool(role) for role in Role}
        load = await link.load()
        now = self._ctx.now()
        link.loads = load.groups
        self._note(link, load.groups, now)
        longest = max(spec.planning.fast_window_s, spec.planning.slow_window_s)
        if self._history is None:
            self._history = TrafficHistory(longest)
            self._began = now
        self._history.keep(longest)
        self._history.add(load.traffic, now)
        if any(pool is None for pool in pools.values()):
            return spec.planning.tick_s
        found = {role: pool for role, pool in pools.items() if pool is not None}
        specs = {role: stored_spec(PoolSpec, pool["spec"]) for role, pool in found.items()}
        policy = plan_policy(spec, specs[Role.PREFILL], specs[Role.DECODE])
        observation = self._observe(policy, specs, link, now)
        if self._state is None:
            self._state = self._memory.read(fleet, now)
        self._state, decision = plan(self._state, observation, policy, now)
        await self._remember(fleet, policy, now)
        for role, pool in found.items():
            await self._carry_out(role, pool, specs[role], decision.of(role))
        if now - self._told_at >= _TELL_S:
            self._told_at = now
            await self._tell(fleet, load.groups, self._history.window(policy.slow_window_s, now), policy)
        automatic = any(pool.autoscaling is not None for pool in specs.values())
        return spec.planning.tick_s if automatic else max(spec.planning.tick_s, _TELL_S)

    def _note(self, link: FleetLink, loads: Mapping[str, tuple[DpLoad, ...]], now: float) -> None:
        """Keep what engines said last, with its age, and when groups were wished for, as the laptop's controller does:
        an engine that does not answer once is not silent yet."""
        snapshot = link.snapshot
        assert snapshot is not None, "a reachable fleet has told what it is"
        names = {group.group for group in snapshot.groups}
        self._loads |= {name: GroupLoad(at=now, ranks=ranks) for name, ranks in loads.items()}
        self._loads = {name: load for name, load in self._loads.items() if name in names}
        self._asked_at = {wish.group: self._asked_at.get(wish.group, now) for wish in snapshot.desired}

    async def _remember(self, fleet: Object, policy: PlanPolicy, now: float) -> None:
        assert self._state is not None, "there was a tick"
        try:
            await self._memory.write(fleet, self._state, policy, now)
        except (KubeError, Trouble) as error:  # no reason not to scale; the next tick tries again
            _log.warning("What the planning of fleet %s remembers was not written: %s", self._key, error)

    def _pool(self, role: Role) -> Object | None:
        pool = self._ctx.cache.get(Key(POOL, self._key.namespace, pool_name(self._key.name, role)))
        return pool if pool is not None and not leaving(pool) else None

    def _observe(self, policy: PlanPolicy, specs: dict[Role, PoolSpec], link: FleetLink, now: float) -> Observation:
        snapshot, history = link.snapshot, self._history
        assert snapshot is not None, "a reachable fleet has told what it is"
        assert history is not None, "there was a tick"
        slow = history.window(policy.slow_window_s, now)
        fast = history.window(policy.fast_window_s, now)
        return Observation(
            prefill=self._view(Role.PREFILL, snapshot, specs),
            decode=self._view(Role.DECODE, snapshot, specs),
            fast=window_of(fast, policy),
            slow=window_of(slow, policy),
            queue=queue_of(fast or slow),
        )

    def _view(self, role: Role, snapshot: FleetSnapshot, specs: dict[Role, PoolSpec]) -> PoolView:
        view = pool_view(role, snapshot.groups, snapshot.desired, self._loads, asked_at=self._asked_at)
        return msgspec.structs.replace(view, wanted=specs[role].replicas)

    async def _carry_out(self, role: Role, pool: Object, spec: PoolSpec, decision: PoolDecision) -> None:
        key = key_of(POOL, pool)
        WANTED.labels(key.namespace, spec.fleet, role).set(decision.wanted)
        if spec.autoscaling is None:
            if (pool.get("status") or {}).get("scaling"):
                await self._ctx.applier.patch(key, {"status": {"scaling": None}}, part="status")
            return
        if decision.changed and decision.wanted != spec.replicas:
            # With the resourceVersion of what was looked at: 409 if somebody has scaled it meanwhile.
            version = pool["metadata"]["resourceVersion"]
            change = {"metadata": {"resourceVersion": version}, "spec": {"replicas": decision.wanted}}
            await self._ctx.applier.patch(key, change, part="scale")
            direction = "up" if decision.wanted > spec.replicas else "down"
            DECISIONS.labels(key.namespace, spec.fleet, role, direction).inc()
            reason = "ScaledUp" if direction == "up" else "ScaledDown"
            await self._ctx.recorder.tell(POOL, pool, reason, decision.reason)
        told = {
            "wanted": decision.wanted,
            "reason": decision.reason,
            "since": rfc3339(decision.since) if decision.since else "",
            "held": decision.held,
        }
        live, now = self._ctx.cache.get(key) or pool, self._ctx.now()
        before = (live.get("status") or {}).get("scaling") or {}
        change = difference(before, without_empty(told))
        # What holds it back has times and loads in it, so it is another sentence at every tick.
        reworded = change.keys() == {"held"} and decision.held and before.get("held")
        if change and not (reworded and now - self._held_at.get(role, 0.0) < _TELL_S):
            self._held_at[role] = now
            await self._ctx.applier.patch(key, {"status": {"scaling": change}}, part="status")

    async def _tell(
        self, fleet: Object, loads: dict[str, tuple[DpLoad, ...]], slow: Traffic | None, policy: PlanPolicy
    ) -> None:
        """Write what the service and the groups' loads are, where that is news. `slow`: of the slow window."""
        values = _service(slow, policy) if slow is not None else {}
        self._attained(values.get("attainment"))
        # An operator that has just begun knows nothing yet, and what the one before has told stands.
        if slow is not None or self._told_at - (self._began or 0.0) > policy.slow_window_s:
            service = {name: _rounded(value) for name, value in values.items() if value is not None}
            if change := difference((fleet.get("status") or {}).get("slo") or {}, service):
                await self._ctx.applier.patch(self._key, {"status": {"slo": change}}, part="status")
        for group in self._ctx.cache.all(EP_GROUP, self._key.namespace, {FLEET_LABEL: self._key.name}):
            load = _told_load(loads.get(group["spec"]["group"], ()))
            status = group.get("status") or {}
            if status and (change := difference(status.get("load") or {}, load)):
                await self._ctx.applier.patch(key_of(EP_GROUP, group), {"status": {"load": change}}, part="status")

    def _attained(self, share: float | None) -> None:
        """Have the metric tell how many requests kept both aims; None = nobody knows."""
        if share is not None:
            ATTAINMENT.labels(self._key.namespace, self._key.name).set(share)
            return
        with contextlib.suppress(KeyError):
            ATTAINMENT.remove(self._key.namespace, self._key.name)


def _service(slow: Traffic, policy: PlanPolicy) -> dict[str, float | None]:
    """How the service was in the slow window, as a SloStatus; None = nobody knows."""
    prefill, decode = policy.prefill, policy.decode
    return {
        "ttftSeconds": slow.ttft_s(prefill.percentile),
        "itlSeconds": slow.itl_s(decode.percentile),
        "attainment": slow.attainment(prefill.aim_s, decode.aim_s),
        "requestsPerSecond": slow.arrival_rate,
    }


def _told_load(ranks: Sequence[DpLoad]) -> Object:
    """A group's load as a LoadStatus; empty if its engines tell nothing, which is not the same as nothing to do."""
    if not ranks:
        return {}
    return {
        "running": sum(rank.running for rank in ranks),
        "waiting": sum(rank.waiting for rank in ranks),
        "kvUse": _rounded(max(rank.token_usage for rank in ranks)),
    }


def _tell_of_end(task: asyncio.Task[None]) -> None:
    """Say why a planning ended that should not have."""
    error = None if task.cancelled() else task.exception()
    _log.error("%s has ended, and begins again.", task.get_name(), exc_info=error)


_IDLE_S = 2.0


def _rounded(value: float) -> float:
    """To three digits: what is told should not change with every breath."""
    return float(f"{value:.3g}")
