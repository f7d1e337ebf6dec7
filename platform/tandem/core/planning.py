"""How many groups each pool should have: observations in, whole groups out, with the reason in one sentence. Pure.

Two loops, in one step for both pools, since they share one budget of GPUs:
- the reactive one adds groups when an aim is missed on two ticks in a row (`planning_signals`),
- the rate-based one adds groups before that, and removes them one at a time (`planning_need`, `planning_learn`).

Rules that it keeps (docs/planning.md says what follows from them):
- A number set by hand stands for a while; a pool that is paused or does not scale by itself is left alone.
- Nothing is done on a metric that is missing. Without memory nothing is removed before a whole cool-down.
- Groups that start are capacity that comes, until they are overdue; groups that drain still hold their GPUs.
- The last ready group stays, unless none is wanted at least and nobody has asked for long.
- Within the bounds: what the least asks for comes at once, what is above the most goes one group a cool-down.
"""

from __future__ import annotations

import math

import msgspec
from msgspec.structs import replace

from tandem.core import planning_words as words
from tandem.core.planning_budget import share
from tandem.core.planning_learn import broken, take_in
from tandem.core.planning_need import BAND, Wanted, reckon
from tandem.core.planning_schedule import least_groups
from tandem.core.planning_signals import Breach, Signals, look
from tandem.core.planning_types import (
    Decision,
    Need,
    Observation,
    PlanPolicy,
    PlanState,
    PoolDecision,
    PoolMemory,
    PoolPolicy,
    PoolView,
)
from tandem.core.planning_view import Seen, sort_out
from tandem.core.types import Role

APPLY_S = 30.0
"""A decision may take so long to be written; until then the old number is not somebody's wish."""
_BUCKETS = 20
"""Needs are remembered in so many steps of a cool-down."""
_LONGEST_CONFIRM_S = 5.0
_BETTER = 0.9
"""A breach of at most so much of its worst is getting better."""


class _Step(msgspec.Struct):
    """One pool's way through a tick."""

    role: Role
    policy: PoolPolicy
    memory: PoolMemory
    seen: Seen
    signals: Signals = Signals()
    load: Wanted = Wanted()
    target: int = 0
    why: str = ""
    held: str = ""
    free: bool = True
    """Whether the planner may change it at all."""

    @property
    def current(self) -> int:
        assert self.memory.wanted is not None
        return self.memory.wanted

    def propose(self, target: int, why: str) -> None:
        self.target, self.why, self.held = target, words.change(self.role, target, self.current, why), ""

    def hold(self, why: str) -> None:
        self.target, self.why, self.held = self.current, "", f"{self.role}: {why}"


def plan(state: PlanState, observation: Observation, policy: PlanPolicy, now: float) -> tuple[PlanState, Decision]:
    """One tick: what each pool should have. `now` is in Unix seconds.

    Keep the new state for the next tick, and write `wanted` where `changed` says so; a number that could not be
    written comes again at the next tick.
    """
    steps = {}
    for role in Role:
        pool, view = policy.of(role), observation.of(role)
        memory = _taken_over(role, state.of(role), view, pool, now)
        seen, away = sort_out(view, memory, pool, policy, now)
        memory = take_in(role, memory, seen, away, observation, pool, policy, now)
        steps[role] = _Step(role=role, policy=pool, memory=memory, seen=seen)
        steps[role].target = steps[role].current
    signals = look(
        observation,
        policy,
        {role: step.seen for role, step in steps.items()},
        {role: step.memory for role, step in steps.items()},
        now,
    )
    for role, step in steps.items():
        step.signals = signals[role]
        step.memory = _breach_seen(step, now)
        step.load = reckon(role, step.memory, step.seen, observation, step.policy, policy, now)
        step.memory = replace(step.memory, needs=_needs(step, now))
    for role, step in steps.items():
        _consider(step, steps[_other(role)], observation, policy, now)
    _fit_budget(steps, policy, now)
    for step in steps.values():
        step.memory = _settled(step, observation, policy, now)
    decisions = {role: _told(step, observation.of(role)) for role, step in steps.items()}
    return (
        PlanState(prefill=steps[Role.PREFILL].memory, decode=steps[Role.DECODE].memory),
        Decision(prefill=decisions[Role.PREFILL], decode=decisions[Role.DECODE], gpus=_gpus(steps)),
    )


# -- whose number is it


def _taken_over(role: Role, memory: PoolMemory, view: PoolView, policy: PoolPolicy, now: float) -> PoolMemory:
    """The memory with the number that is wanted now, whoever set it."""
    if memory.wanted is None:
        reason = f"{role}: {words.groups(view.wanted)}, as found"
        return replace(memory, wanted=view.wanted, began=now, reason=reason, since=now)
    if view.wanted == memory.wanted:
        # It is written: whoever goes back to the old number now means it.
        return memory if memory.before is None else replace(memory, before=None)
    unwritten = view.wanted == memory.before and memory.changed_at is not None and now - memory.changed_at < APPLY_S
    if unwritten and view.by_hand is not True:
        return memory
    until = now + policy.manual_hold_s if policy.automatic and view.by_hand is not False else 0.0
    return replace(
        memory,
        wanted=view.wanted,
        before=None,
        changed_at=now,
        manual_until=until,
        reason=f"{role}: {words.groups(view.wanted)} instead of {memory.wanted}: set by hand",
        since=now,
        needs=(),
    )


# -- one pool


def _consider(step: _Step, other: _Step, observation: Observation, policy: PlanPolicy, now: float) -> None:
    """What the pool itself would do, the budget aside. `other`: the other pool, as it is."""
    pool, memory = step.policy, step.memory
    least, most = _bounds(pool, now)
    if not pool.automatic:
        step.free = False
        step.hold("does not scale by itself")
    elif pool.paused:
        step.free = False
        step.hold("scaling is paused")
    elif now < memory.manual_until:
        step.free = False
        left = words.span(memory.manual_until - now)
        step.hold(f"{words.groups(step.current)} were set by hand, which stands for another {left}")
    elif step.current < least:
        step.propose(least, f"at least {least} are wanted" + (" by the schedule" if least > pool.min_groups else ""))
    elif step.current > most:
        _remove(step, f"at most {most} are wanted", now)
    elif step.current == 0:
        if _somebody_asks(observation):
            step.propose(1, "requests wait and there is no group")
        elif step.load.missing:
            step.hold(step.load.missing)
    elif step.signals.breach is not None and _confirmed(step, policy, now):
        _react(step, step.signals.breach, most, policy, now)
    else:
        _follow(step, other, most, least, now)


def _react(step: _Step, breach: Breach, most: int, policy: PlanPolicy, now: float) -> None:
    """The reactive loop: an aim is missed."""
    ready, seen = len(step.seen.ready), step.seen
    asked = breach.groups(ready)
    if step.load.up is not None:
        asked = max(asked, min(math.ceil(step.load.up - 1e-9), 2 * asked))
    if seen.coming and (asked <= seen.usable or (step.memory.breach_acted and not _exceeds(step.load, seen.usable))):
        step.hold(f"{breach.why}; {_coming(step, now)}")
    elif step.memory.breach_acted and _takes_effect(step, breach, policy, now):
        since = words.span(now - step.memory.ready_since)
        step.hold(f"{breach.why}; the last group has been ready for {since} and has to show what it changes")
    else:
        _add(step, asked, breach.why, most, now)


def _takes_effect(step: _Step, breach: Breach, policy: PlanPolicy, now: float) -> bool:
    """Whether the last new group still has to show: windows look back, and streams stay where they began."""
    passed = now - step.memory.ready_since
    better = breach.ratio <= _BETTER * step.memory.breach_worst
    return passed < 2 * policy.fast_window_s or (better and passed < policy.slow_window_s)


def _follow(step: _Step, other: _Step, most: int, least: int, now: float) -> None:
    """The rate-based loop."""
    load, seen = step.load, step.seen
    serving = seen.usable
    if seen.stuck and not serving and not _goes_to_sleep(step, least):
        _add(step, 1, "no group serves", most, now)
    elif load.up is not None and _exceeds(load, serving):
        _add(step, math.ceil(load.up - 1e-9), load.up_why, most, now)
    else:
        _shrink(step, other, least, now)
    if not step.held and step.target == step.current and step.signals.note:
        step.held = f"{step.role}: {step.signals.note}"


def _exceeds(load: Wanted, groups: int) -> bool:
    return load.up is not None and load.up > groups * BAND


def _add(step: _Step, serving: int, why: str, most: int, now: float) -> None:
    """Have so many groups that serve; those that are overdue are made up for, within the bounds."""
    # Where most are overdue, it is not for lack of groups: more of them would only take more GPUs.
    asked = serving + min(len(step.seen.stuck), max(1, len(step.seen.ready)))
    target = min(asked, most)
    if target <= step.current:
        allowed = "as many as are allowed" if asked > most else "as many as that asks for"
        step.hold(f"{why}; {words.groups(step.current)} are wanted, {allowed}{words.not_counted(step.seen, now)}")
        return
    changed = step.memory.changed_at
    if changed is not None and now - changed < step.policy.up_cooldown_s:
        left = words.span(step.policy.up_cooldown_s - (now - changed))
        step.hold(f"{why}; it changed {words.span(now - changed)} ago, groups may be added in {left}")
        return
    limit = f"; {asked} would be asked for, at most {most} are allowed" if asked > most else ""
    step.propose(target, why + limit + words.not_counted(step.seen, now))


def _shrink(step: _Step, other: _Step, least: int, now: float) -> None:
    """Remove one group, if the others would carry the load and would have all along."""
    load, current = step.load, step.current
    if current <= least:
        return
    if load.missing:
        step.hold(f"{load.missing}: no group is removed until it is known")
        return
    if current == 1:
        _rest(step, other, now)
        return
    if not step.seen.ready and not _goes_to_sleep(step, least):
        return
    assert load.least is not None
    if load.least > current - 1:
        return
    highest = max((need.groups for need in step.memory.needs), default=current)
    if highest > current - 1:
        step.hold(
            f"the load fits on {words.groups(max(load.least, 1))} now, but asked for {highest} within the last "
            f"{words.span(step.policy.down_cooldown_s)}"
        )
        return
    _remove(step, load.down_why, now)


def _rest(step: _Step, other: _Step, now: float) -> None:
    """The last group goes when nobody has asked for long, and could have: those who were told to come again later, as
    groups took too long to start, must find them."""
    idle = step.memory.idle_since
    if idle is None:
        return
    pair = [one for one in (step, other) if one.current]
    if late := next((one for one in pair if one.seen.coming and not one.seen.ready), None):
        after = words.span(step.policy.idle_s)
        step.hold(f"nobody asks; the last group goes {after} after both pools serve; {late.role}: {_coming(late, now)}")
        return
    idle = max(idle, *(one.memory.serving_since or 0.0 for one in pair))
    if now - idle >= step.policy.idle_s:
        _remove(step, f"nobody has asked anything for {words.span(now - idle)}", now, last=True)
    else:
        step.hold(f"nobody asks; the last group goes in {words.span(step.policy.idle_s - (now - idle))}")


def _remove(step: _Step, why: str, now: float, *, last: bool = False) -> None:
    """One group less, after a cool-down, while nothing is on its way, and never the last ready one."""
    memory, seen = step.memory, step.seen
    quiet = now - max(memory.changed_at or 0.0, memory.began or now)
    if quiet < step.policy.down_cooldown_s:
        left = words.span(step.policy.down_cooldown_s - quiet)
        step.hold(f"{why}: one group less in {left}, after the cool-down")
    elif seen.coming and not last:
        step.hold(f"{why}: one group less as soon as it is settled; {_coming(step, now)}")
    elif len(seen.ready) <= 1 and not seen.stuck and not last:
        step.hold(f"{why}, but the only group that is ready stays")
    else:
        step.propose(step.current - 1, why)


# -- both pools


def _fit_budget(steps: dict[Role, _Step], policy: PlanPolicy, now: float) -> None:
    """Cut what was asked for to the GPUs that there are, and have the pool with a surplus give."""
    budget = policy.gpu_budget
    if budget is None:
        return
    used = sum((step.current + step.seen.leaving) * step.policy.gpus_per_group for step in steps.values())
    size = {role: step.policy.gpus_per_group for role, step in steps.items()}
    have = {role: step.current for role, step in steps.items()}
    asked = {role: step.target for role, step in steps.items()}
    granted = share(budget, used, size, have, asked)
    for role, step in steps.items():
        short = step.target - granted[role]
        if short <= 0:
            continue
        other = next(one for name, one in steps.items() if name is not role)
        room = f"the budget of {budget} GPUs, of which {used} are taken, has room for {granted[role] - step.current}"
        if granted[role] > step.current:
            step.why += f"; {step.target} would be asked for, but {room}"
            step.target = granted[role]
        else:
            step.hold(f"{step.why}; but {room}")
            _give(other, step, least_groups(other.policy.schedule, now), now)
    if used > budget and all(step.target == step.current for step in steps.values()):
        _over_budget(steps, budget, used, now)


def _give(step: _Step, other: _Step, scheduled: int, now: float) -> None:
    """A pool with more than its load asks for gives a group to the other one, without waiting for a quiet cool-down."""
    least = max(step.policy.min_groups, scheduled, 1)
    needed = step.load.least
    if step.free and step.target == step.current and needed is not None and max(needed, least) < step.current:
        _remove(step, f"{other.role} needs the GPUs, and {step.load.down_why}", now)


def _over_budget(steps: dict[Role, _Step], budget: int, used: int, now: float) -> None:
    """More is taken than the budget allows, since it was lowered or somebody scaled by hand."""
    able = [step for step in steps.values() if step.free and step.current > max(_bounds(step.policy, now)[0], 1)]
    why = f"{used} GPUs are taken, the budget is {budget}"
    if able:
        _remove(min(able, key=lambda one: ((one.load.down or one.current) / one.current, one.role)), why, now)
    else:
        for step in steps.values():
            step.held = step.held or f"{step.role}: {why}, but neither pool can give a group"


def _gpus(steps: dict[Role, _Step]) -> int:
    return sum((step.target + step.seen.leaving) * step.policy.gpus_per_group for step in steps.values())


# -- small questions and changes


def _bounds(policy: PoolPolicy, now: float) -> tuple[int, int]:
    least = min(max(policy.min_groups, least_groups(policy.schedule, now)), policy.max_groups)
    return least, policy.max_groups


def _other(role: Role) -> Role:
    return Role.DECODE if role is Role.PREFILL else Role.PREFILL


def _somebody_asks(observation: Observation) -> bool:
    queue, fast = observation.queue, observation.fast
    return (queue is not None and queue.anyone) or bool(fast is not None and fast.requests_per_s)


def _goes_to_sleep(step: _Step, least: int) -> bool:
    """Whether nobody asks of a pool that need have no group: it is not made larger then, whatever fails."""
    return least == 0 and step.memory.idle_since is not None


def _coming(step: _Step, now: float) -> str:
    since = step.seen.coming_since
    usual = f" of about {words.span(step.memory.warmup_s)}" if step.memory.warmup_s is not None else ""
    awaited = f"for {words.span(now - since)}{usual}" if since is not None else ""
    verb = "is" if step.seen.coming == 1 else "are"
    return f"{words.groups(step.seen.coming)} {verb} awaited {awaited}"


def _breach_seen(step: _Step, now: float) -> PoolMemory:
    memory = step.memory
    if step.signals.breach is None:
        return replace(memory, breach_since=None, breach_learned=False, breach_acted=False, breach_worst=0.0)
    worst = max(memory.breach_worst, step.signals.breach.ratio)
    since = now if memory.breach_since is None else memory.breach_since
    return replace(memory, breach_since=since, breach_worst=worst)


def _confirmed(step: _Step, policy: PlanPolicy, now: float) -> bool:
    """Whether the breach was there at the tick before. With long ticks one has to do."""
    since = step.memory.breach_since
    return since is not None and (now - since >= policy.tick_s / 2 or policy.tick_s > _LONGEST_CONFIRM_S)


def _needs(step: _Step, now: float) -> tuple[Need, ...]:
    """The needs of the last cool-down with this tick's. What is not known counts as all that there is."""
    span = step.policy.down_cooldown_s
    groups = step.load.least
    if groups is None or step.signals.breach is not None:
        groups = max(groups or 0, step.current)
    kept = [need for need in step.memory.needs if now - need.at <= span]
    if kept and now - kept[-1].at < span / _BUCKETS:
        kept[-1] = replace(kept[-1], groups=max(kept[-1].groups, groups))
    else:
        kept.append(Need(at=now, groups=groups))
    return tuple(kept)


def _settled(step: _Step, observation: Observation, policy: PlanPolicy, now: float) -> PoolMemory:
    """The memory with the decision in it."""
    memory = step.memory
    breach = step.signals.breach is not None and _confirmed(step, policy, now)
    if breach and not memory.breach_learned:
        capacity = broken(step.role, memory, observation, step.seen, policy, now)
        memory = replace(memory, capacity=capacity, breach_learned=capacity != memory.capacity)
    if step.target == step.current:
        return memory
    if breach and step.target > step.current:
        memory = replace(memory, breach_acted=True)
    return replace(memory, wanted=step.target, before=step.current, changed_at=now, reason=step.why, since=now)


def _told(step: _Step, view: PoolView) -> PoolDecision:
    memory = step.memory
    assert memory.wanted is not None
    return PoolDecision(
        wanted=memory.wanted,
        changed=memory.wanted != view.wanted,
        reason=memory.reason,
        since=memory.since,
        held=step.held,
        needed=step.load.down,
    )
