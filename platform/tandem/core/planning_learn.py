"""What the planner learns at each tick: how much a group bears, how long it takes to start, where the load goes.

Capacity has two bounds, both shown by the fleet itself. A load under which the aim was kept is a lower one, a load
under which it was missed an upper one. Only the upper one lets the planner add groups before the aim is missed: a fleet
that was never full has shown nothing of where its limit is.
"""

from __future__ import annotations

import math

from msgspec.structs import replace

from tandem.core.planning_types import Capacity, Observation, PlanPolicy, PoolMemory, PoolPolicy, Window
from tandem.core.planning_view import Seen
from tandem.core.types import GroupState, Role

MEMORY_S = 86400.0
"""What was learned so long ago counts half: prompts, weights and nodes change."""
_MOST_GROWTH = 1.5
"""The trend never makes the load more than this factor larger."""


def take_in(
    role: Role,
    memory: PoolMemory,
    seen: Seen,
    away: dict[str, float],
    observation: Observation,
    policy: PoolPolicy,
    plan: PlanPolicy,
    now: float,
) -> PoolMemory:
    """The memory with this tick in it, but for breaches and needs."""
    passed = max(0.0, now - memory.seen_at) if memory.seen_at is not None else None
    slow, queue = observation.slow, observation.queue
    began = now if memory.began is None else memory.began
    memory = _starts(memory, observation, role, now)
    if len(seen.ready) != memory.ready or memory.seen_at is None:
        memory = replace(memory, ready=len(seen.ready), ready_since=now, ready_grew=len(seen.ready) > memory.ready)
    if bool(seen.ready) != (memory.serving_since is not None):
        memory = replace(memory, serving_since=now if seen.ready else None)
    if seen.waiting:
        memory = replace(memory, waited_at=now)
    if queue is not None and queue.anyone:
        memory = replace(memory, queued_at=now)
    idle_since = memory.idle_since
    if is_idle(observation, seen) is not True:
        idle_since = None
    elif idle_since is None:
        idle_since = now
    running = memory.running
    if seen.running is not None:
        fresh = 1.0 if running is None or passed is None else 1 - math.exp(-2 * passed / plan.slow_window_s)
        running = (running or 0.0) + fresh * (seen.running - (running or 0.0))
    rate, slope = memory.rate, memory.slope
    if slow is not None and slow.requests_per_s is not None:
        if rate is not None and passed:
            fresh = 1 - math.exp(-passed / plan.slow_window_s)
            slope += fresh * ((slow.requests_per_s - rate) / passed - slope)
        rate = slow.requests_per_s
    memory = replace(
        memory, began=began, away=away, idle_since=idle_since, running=running, rate=rate, slope=slope, seen_at=now
    )
    return replace(memory, capacity=_capacity(role, memory, observation, policy, plan, now))


def is_idle(observation: Observation, seen: Seen) -> bool | None:
    """Whether nobody asks anything of the fleet; None = not known."""
    fast, slow, queue = observation.fast, observation.slow, observation.queue
    rates = [window.requests_per_s for window in (fast, slow) if window is not None]
    if any(rates) or seen.busy or (queue is not None and queue.anyone):
        return False
    if fast is None or slow is None or queue is None or None in rates or seen.busy is None:
        return None
    return True


def load_of(role: Role, window: Window | None) -> float | None:
    """A pool's load over a window: uncached prompt tokens or tokens of answers, per second. None = missing."""
    if window is None:
        return None
    if role is Role.DECODE:
        return window.output_tokens_per_s
    total, cached = window.input_tokens_per_s, window.cached_tokens_per_s
    return None if total is None or cached is None else max(0.0, total - cached)


def time_of(role: Role, window: Window | None) -> float | None:
    """The time that a pool is judged by; None = missing, or nothing came."""
    if window is None:
        return None
    return window.ttft_s if role is Role.PREFILL else window.itl_s


def pressure(role: Role, memory: PoolMemory, load: float) -> float | None:
    """What a pool's times grow with, per group: its load, or the streams that share a step. None = not known."""
    if not memory.ready:
        return None
    total = load if role is Role.PREFILL else memory.running
    return None if total is None else total / memory.ready


def growth(memory: PoolMemory, policy: PoolPolicy, plan: PlanPolicy) -> float:
    """By what factor the load will be larger when a group that is asked for now is ready.

    Tokens grow with the rate of arrivals. What could as well be chance is no trend.
    """
    rate, window = memory.rate, plan.slow_window_s
    if not rate or memory.slope <= 0:
        return 1.0
    chance = 2 * math.sqrt(2 * rate / window)
    if memory.slope * window <= chance:
        return 1.0
    ahead = memory.warmup_s if memory.warmup_s is not None else min(policy.start_s, window)
    return min(_MOST_GROWTH, 1 + memory.slope * (ahead + window / 2) / rate)


def broken(
    role: Role, memory: PoolMemory, observation: Observation, seen: Seen, plan: PlanPolicy, now: float
) -> Capacity:
    """What a missed aim tells of the capacity. Nothing while the window looks back on fewer groups."""
    capacity = memory.capacity
    load = load_of(role, observation.fast)
    late = time_of(role, observation.fast)
    removed = not memory.ready_grew and now - memory.ready_since < 2 * plan.slow_window_s
    if role is Role.DECODE and load and late and seen.running and not removed:
        # By Little's law; the window still holds quieter moments. After a removal it is the very load that counts:
        # what did not fit then must not seem to fit again.
        load = max(load, seen.running / late)
    young = memory.ready_grew and now - memory.ready_since < plan.fast_window_s
    if not load or not seen.ready or young:
        return capacity
    each = load / len(seen.ready)
    kept = capacity.kept
    if kept is not None and each < kept:
        # One of the two is wrong: the requests have changed, or something else was slow. Believe it step by step.
        kept = max(each, 0.8 * kept)
        each = kept
    broke = each if capacity.broke is None else min(capacity.broke, each)
    return replace(capacity, kept=kept, broke=max(broke, kept or 0.0))


def _capacity(
    role: Role,
    memory: PoolMemory,
    observation: Observation,
    policy: PoolPolicy,
    plan: PlanPolicy,
    now: float,
) -> Capacity:
    old = memory.capacity
    fade = 2 ** (-max(0.0, now - old.at) / MEMORY_S) if old.at else 1.0
    capacity = replace(
        old,
        at=now,
        kept=None if old.kept is None else old.kept * fade,
        broke=None if old.broke is None else old.broke / fade,
        base_s=None if old.base_s is None else old.base_s / fade,
    )
    load, late = load_of(role, observation.slow), time_of(role, observation.slow)
    steady = memory.ready > 0 and now - memory.ready_since >= plan.slow_window_s
    if not late or not load or late > policy.aim_s or not steady or memory.breach_since is not None:
        return capacity
    each = load / memory.ready
    pressed = pressure(role, memory, load)
    if pressed is not None and (capacity.base_s is None or late < capacity.base_s):
        capacity = replace(capacity, base_s=late, base_load=pressed)
    kept = max(capacity.kept or 0.0, each)
    return replace(capacity, kept=kept, broke=None if capacity.broke is None else max(capacity.broke, kept))


def _starts(memory: PoolMemory, observation: Observation, role: Role, now: float) -> PoolMemory:
    """How long groups take to be ready, from those that were seen to start."""
    starts, warmup = {}, memory.warmup_s
    for group in observation.of(role).groups:
        if group.state is GroupState.STARTING and not group.leaving:
            starts[group.group] = memory.starts.get(group.group, min(group.since or now, now))
        elif group.state is GroupState.READY and group.group in memory.starts:
            took = max(0.0, min(group.since or now, now) - memory.starts[group.group])
            warmup = took if warmup is None else (warmup + took) / 2
    return replace(memory, starts=starts, warmup_s=warmup)
