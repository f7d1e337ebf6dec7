"""The rate-based loop: how many groups the load asks for, from what a group has been seen to bear.

Two numbers. `up` is what the load will need when a new group would be ready; only a limit that was seen (`broke`, or a
KV cache that fills) lets it ask for more than there is. `down` is what the load needs now, and is careful where no
limit was ever seen: then it goes by how the times grew with the load, or by nothing having waited.
"""

from __future__ import annotations

import math

import msgspec

from tandem.core import planning_words as words
from tandem.core.planning_learn import growth, is_idle, load_of, pressure, time_of
from tandem.core.planning_types import Observation, PlanPolicy, PoolMemory, PoolPolicy
from tandem.core.planning_view import Seen
from tandem.core.types import Role

BAND = 1.1
"""The load must ask for so much more than there is before groups are added: what is within it is noise."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What the load asks for."""

    up: float | None = None
    """Groups, as a fraction; None = nothing is known of a limit."""
    up_why: str = ""
    down: float | None = None
    """Groups that would do, as a fraction; None = not known."""
    down_why: str = ""
    missing: str = ""
    """Which metric is missing for `down`."""

    @property
    def least(self) -> int | None:
        """Whole groups that would do; 0 = nobody asks anything."""
        return None if self.down is None else math.ceil(self.down - 1e-9)


def reckon(
    role: Role,
    memory: PoolMemory,
    seen: Seen,
    observation: Observation,
    policy: PoolPolicy,
    plan: PlanPolicy,
    now: float,
) -> Wanted:
    """What the pool's load asks for now."""
    load, ready = load_of(role, observation.slow), len(seen.ready)
    kv = seen.kv if role is Role.DECODE else None
    up, up_why = _up(role, memory, load, kv, ready, policy, plan)
    if missing := _missing(role, seen, observation, load, plan):
        return Wanted(up=up, up_why=up_why, missing=missing)
    assert load is not None
    if is_idle(observation, seen):
        return Wanted(up=up, up_why=up_why, down=0.0, down_why="nobody asks anything")
    down, down_why = _down(role, memory, load, ready, observation, policy, now)
    if kv is not None and ready * kv / policy.target_use > down:
        down, down_why = ready * kv / policy.target_use, f"the KV cache is {kv:.0%} full on {words.groups(ready)}"
    return Wanted(up=up, up_why=up_why, down=down, down_why=down_why)


def _up(
    role: Role,
    memory: PoolMemory,
    load: float | None,
    kv: float | None,
    ready: int,
    policy: PoolPolicy,
    plan: PlanPolicy,
) -> tuple[float | None, str]:
    more = growth(memory, policy, plan)
    trend = f", {more - 1:.0%} more soon" if more > 1.005 else ""
    choices: list[tuple[float, str]] = []
    broke = memory.capacity.broke
    if load is not None and broke:
        why = (
            f"{words.load(role, load)} over {words.span(plan.slow_window_s)}{trend}; "
            f"a group bears {words.number(broke)}, to be used to {policy.target_use:.0%}"
        )
        choices.append((load * more / (broke * policy.target_use), why))
    if kv is not None and ready:
        why = f"the KV cache is {kv:.0%} full on {words.groups(ready)}{trend}, aim {policy.target_use:.0%}"
        choices.append((ready * kv * more / policy.target_use, why))
    return max(choices, default=(None, ""))


def _down(
    role: Role,
    memory: PoolMemory,
    load: float,
    ready: int,
    observation: Observation,
    policy: PoolPolicy,
    now: float,
) -> tuple[float, str]:
    capacity, use = memory.capacity, policy.target_use
    said = words.load(role, load)
    if capacity.broke:
        why = f"{said}; a group bears {words.number(capacity.broke)}, to be used to {use:.0%}"
        return load / (capacity.broke * use), why
    late = time_of(role, observation.slow)
    choices: list[tuple[float, str]] = []
    if late is not None and ready:
        share = late / policy.aim_s
        choices.append((ready * share / use, f"{said}; times are {share:.0%} of the aim on {words.groups(ready)}"))
        if bears := _fitted(role, memory, load, late, policy.aim_s):
            choices.append((load / (bears * use), f"{said}; by its times a group bears {words.number(bears)}"))
    if capacity.kept:
        why = f"{said}; a group was seen to bear {words.number(capacity.kept)}"
        choices.append((load / (capacity.kept * use), why))
    if ready > 1 and _nothing_waited(memory, policy, now) and role is Role.PREFILL:
        why = f"{said}; nothing has waited on {words.groups(ready)} for {words.span(policy.down_cooldown_s)}"
        choices.append((ready - 1.0, why))
    if role is Role.DECODE:
        # More groups than requests are of no use to anybody.
        choices.append((float(math.ceil((memory.running or 0.0) - 1e-9)), said))
    return min(choices, default=(float(max(ready, 1)), said))


def _fitted(role: Role, memory: PoolMemory, load: float, late: float, aim: float) -> float | None:
    """The load of a group that just keeps the aim, by a line through the best point seen and this one.

    None = they are too close to each other.
    """
    base, base_s, each = memory.capacity.base_load, memory.capacity.base_s, pressure(role, memory, load)
    if base is None or base_s is None or each is None or base > each / 2 or late <= base_s or base_s >= aim:
        return None
    most = base + (aim - base_s) * (each - base) / (late - base_s)
    # Each of so many streams has a token in every `aim` seconds.
    return most if role is Role.PREFILL else most / aim


def _nothing_waited(memory: PoolMemory, policy: PoolPolicy, now: float) -> bool:
    last = max(memory.waited_at or 0.0, memory.queued_at or 0.0, memory.ready_since, memory.began or now)
    return now - last >= policy.down_cooldown_s


def _missing(role: Role, seen: Seen, observation: Observation, load: float | None, plan: PlanPolicy) -> str:
    """Which metric is not there that removing a group would need; empty = none."""
    if seen.silent:
        return words.silent(seen, plan)
    if observation.fast is None or observation.slow is None or observation.queue is None:
        return "the gateways tell nothing of their traffic yet"
    if observation.fast.requests_per_s is None or observation.slow.requests_per_s is None:
        return "the rate of requests is not known"
    if load is None:
        return f"the rate of {words.TOKENS[role]} is not known"
    if observation.slow.requests_per_s and seen.ready and time_of(role, observation.slow) is None:
        return "no time to first token is known" if role is Role.PREFILL else "no time between tokens is known"
    return ""
