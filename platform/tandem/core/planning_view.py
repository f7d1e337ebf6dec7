"""From what the fleet tells to what the planner reads: traffic to windows, groups to views; and what follows at once.

Both drivers use the first half, so that the operator and the laptop's controller see the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from tandem.core.planning_types import GroupLoad, GroupView, PlanPolicy, PoolMemory, PoolPolicy, PoolView, Queue, Window
from tandem.core.traffic import Traffic
from tandem.core.types import Group, GroupSpec, GroupState, Role


def window_of(traffic: Traffic | None, policy: PlanPolicy) -> Window | None:
    """A window of traffic (`TrafficHistory.window`) with the percentiles that the pools aim at."""
    if traffic is None:
        return None
    prefill, decode = policy.prefill, policy.decode
    return Window(
        seconds=traffic.seconds,
        requests_per_s=traffic.arrival_rate,
        input_tokens_per_s=traffic.input_rate,
        cached_tokens_per_s=traffic.input_rate - traffic.uncached_rate,
        output_tokens_per_s=traffic.output_rate,
        refused_per_s=traffic.per_second(traffic.refused_busy + traffic.no_capacity),
        ttft_s=traffic.ttft_s(prefill.percentile),
        ttft_kept=traffic.ttft_within(prefill.aim_s),
        ttft_count=sum(traffic.ttft),
        itl_s=traffic.itl_s(decode.percentile),
        itl_kept=traffic.itl_within(decode.aim_s),
        itl_count=sum(traffic.itl),
    )


def queue_of(traffic: Traffic | None) -> Queue | None:
    """What waits in the gateways now; any window tells it."""
    if traffic is None:
        return None
    return Queue(
        queued=traffic.queue_length,
        oldest_wait_s=traffic.queue_oldest_s,
        waiting_prefill=traffic.waiting_prefill,
        waiting_decode=traffic.waiting_decode,
    )


def pool_view(
    role: Role,
    groups: Iterable[Group],
    specs: Iterable[GroupSpec],
    loads: Mapping[str, GroupLoad],
    *,
    asked_at: Mapping[str, float],
) -> PoolView:
    """A pool by the fleet's snapshot: its groups and wishes, and what their engines last said.

    `asked_at` is when a wish was first seen (Unix seconds), for groups that do not exist yet; a name that is not in it
    counts as overdue.
    """
    wishes = {spec.group: spec for spec in specs if spec.role is role}
    views = []
    known = {group.group: group for group in groups if group.role is role and group.state is not GroupState.GONE}
    for name in sorted(known.keys() | {name for name, spec in wishes.items() if not spec.draining}):
        group, spec = known.get(name), wishes.get(name)
        views.append(
            GroupView(
                group=name,
                state=group.state if group else GroupState.STARTING,
                since=group.since if group else asked_at.get(name, 0.0),
                leaving=spec is None or spec.draining,
                load=loads.get(name),
            )
        )
    return PoolView(wanted=sum(not spec.draining for spec in wishes.values()), groups=tuple(views))


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One pool at one tick, sorted out."""

    ready: tuple[GroupView, ...]
    coming: int
    """Groups that are not ready yet, or no longer, and not overdue."""
    coming_since: float | None
    """Since when the first of them is awaited."""
    stuck: tuple[tuple[str, GroupState, float], ...]
    """Groups that are overdue: name, state, since when they do not serve."""
    leaving: int
    silent: tuple[str, ...]
    """Ready groups whose load is missing or stale."""
    running: int | None
    """Requests that run at the pool's groups; None = some group is silent."""
    waiting: int | None
    """Requests that wait there, prompts that still have to be computed included; None = some group is silent."""
    kv: float | None
    """Mean over the groups of the KV use of their fullest rank; only of those that tell. None = none does."""

    @property
    def busy(self) -> int | None:
        """Requests at the pool's groups; None = some group is silent."""
        return None if self.running is None or self.waiting is None else self.running + self.waiting

    @property
    def usable(self) -> int:
        """Groups that serve, or will soon."""
        return len(self.ready) + self.coming


def sort_out(
    view: PoolView, memory: PoolMemory, policy: PoolPolicy, plan: PlanPolicy, now: float
) -> tuple[Seen, dict[str, float]]:
    """A pool's groups by what they are good for, and since when those that should serve do not."""
    present = [group for group in view.groups if group.state is not GroupState.GONE]
    stay = [group for group in present if not group.leaving]
    ready = tuple(group for group in stay if group.state is GroupState.READY)
    away = {
        group.group: memory.away.get(group.group, min(group.since or now, now))
        for group in stay
        if group.state is not GroupState.READY
    }
    states = {group.group: group.state for group in stay}
    stuck = [(name, states[name], since) for name, since in away.items() if now - since > policy.start_s]
    awaited = [since for since in away.values() if now - since <= policy.start_s]
    # Groups that were asked for and are not there yet. Nobody says since when: since the number changed.
    asked = memory.changed_at if memory.changed_at is not None else memory.began
    if (unborn := (memory.wanted or 0) - len(stay)) > 0 and (asked is None or now - asked <= policy.start_s):
        awaited += [now if asked is None else asked] * unborn
    told = [group.load for group in ready if group.load is not None and now - group.load.at <= plan.stale_s]
    silent = tuple(g.group for g in ready if g.load is None or now - g.load.at > plan.stale_s)
    seen = Seen(
        ready=ready,
        coming=len(awaited),
        coming_since=min(awaited, default=None),
        stuck=tuple(sorted(stuck)),
        leaving=len(present) - len(stay),
        silent=silent,
        running=None if silent else sum(load.running for load in told),
        waiting=None if silent else sum(load.waiting + (load.waiting_uncached_tokens > 0) for load in told),
        kv=sum(load.kv_use for load in told) / len(told) if told else None,
    )
    return seen, away
