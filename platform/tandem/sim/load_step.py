"""A fleet of queues under a changing load, so that the planner's behaviour can be seen. Pure but for its dice.

Prefill is one queue of prompt tokens that its groups compute at a fixed rate. Decode shares its groups evenly: a step
takes `pace_s`, and longer with each stream (`route_cost` has the same law). Groups take a while to start and to drain.
Nothing of this is fitted to an engine: it shows what the planner does, not how fast a fleet is.
"""

from __future__ import annotations

import heapq
import math
import random
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate

import msgspec

from tandem.core.planning import plan
from tandem.core.planning_types import (
    GroupLoad,
    GroupView,
    Observation,
    PlanPolicy,
    PlanState,
    PoolView,
    Queue,
    Window,
)
from tandem.core.types import DpLoad, GroupState, Role


class FleetShape(msgspec.Struct, frozen=True, kw_only=True):
    """What the groups can do, and what requests ask of them."""

    prompt_tokens: int = 2000
    """Of a request, uncached."""
    answer_tokens: int = 200
    prefill_rate: float = 20000.0
    """Tokens per second of a prefill group."""
    pace_s: float = 0.02
    """Step of a decode group with one stream or none."""
    double: float = 40.0
    """So many streams on a group make a step twice as long."""
    kv_tokens: int = 400_000
    """KV pool of a decode group."""
    start_s: float = 30.0
    drain_s: float = 10.0

    def streams(self, itl_s: float) -> float:
        """Streams that a decode group bears with this time between tokens, and with a KV pool that is not full."""
        by_time = self.double * (itl_s / self.pace_s - 1)
        return max(1.0, min(by_time, self.kv_tokens / (self.prompt_tokens + self.answer_tokens)))


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One tick, for a table."""

    at: float
    rate: float
    """Requests per second that were meant to come."""
    wanted: dict[Role, int]
    ready: dict[Role, int]
    ttft_s: float | None
    itl_s: float | None
    changes: tuple[str, ...] = ()
    """Why a number changed at this tick."""
    held: tuple[str, ...] = ()


class _Group(msgspec.Struct):
    name: str
    ready_at: float
    since: float
    gone_at: float | None = None
    failed: bool = False

    def state(self, now: float) -> GroupState:
        if self.failed:
            return GroupState.FAILED
        if self.gone_at is not None:
            return GroupState.DRAINING
        return GroupState.READY if now >= self.ready_at else GroupState.STARTING


class _Second(msgspec.Struct, frozen=True):
    """What one step of the model, or all of a tick, showed."""

    arrived: int
    prompts: int
    tokens: float
    itl_s: float
    ttfts: tuple[float, ...]


def _joined(steps: Sequence[_Second]) -> _Second:
    tokens = sum(step.tokens for step in steps)
    itl = sum(step.itl_s * step.tokens for step in steps) / tokens if tokens else steps[-1].itl_s
    ttfts = tuple(ttft for step in steps for ttft in step.ttfts)
    return _Second(sum(step.arrived for step in steps), sum(step.prompts for step in steps), tokens, itl, ttfts)


class LoadModel:
    """The fleet, its clock and its planner."""

    STEP_S = 0.5

    def __init__(self, policy: PlanPolicy, shape: FleetShape, *, groups: dict[Role, int], seed: int = 0) -> None:
        self.policy, self.shape = policy, shape
        self.now = 1_700_000_000.0
        self.began = self.now
        self.state = PlanState()
        self.wanted = dict(groups)
        self.dice = random.Random(seed)
        self.groups: dict[Role, list[_Group]] = {
            role: [_Group(f"{role}-{at}", self.now, self.now) for at in range(count)] for role, count in groups.items()
        }
        self.names = dict(groups)
        self.backlog: deque[list[float]] = deque()
        """Prompts that wait for prefill: arrival, tokens left."""
        self.progress = 0.0
        """Tokens that a stream which was always there would have had."""
        self.ends: list[float] = []
        """Progress at which each stream ends."""
        self.past: deque[_Second] = deque(maxlen=math.ceil(policy.slow_window_s / policy.tick_s))
        """By ticks."""
        self.recent: list[_Second] = []
        """The steps since the last tick."""
        self.gpu_s = 0.0
        self.kept = self.late = 0

    def ready(self, role: Role) -> int:
        """Groups that serve."""
        return sum(group.state(self.now) is GroupState.READY for group in self.groups[role])

    def run(self, seconds: float, rate: Callable[[float], float]) -> list[Row]:
        """Go on for a while; `rate` is requests per second at seconds since the beginning. A row for each tick."""
        rows, each = [], round(self.policy.tick_s / self.STEP_S)
        for step in range(round(seconds / self.STEP_S)):
            self._advance(rate(self.now - self.began))
            if step % each == each - 1:
                rows.append(self._tick(rate(self.now - self.began)))
        return rows

    def _advance(self, rate: float) -> None:
        self.now += self.STEP_S
        for role, groups in self.groups.items():
            groups[:] = [group for group in groups if group.gone_at is None or group.gone_at > self.now]
            self.gpu_s += len(groups) * self.policy.of(role).gpus_per_group * self.STEP_S
        arrived = _poisson(self.dice, rate * self.STEP_S)
        self.backlog.extend([self.now, float(self.shape.prompt_tokens)] for _ in range(arrived))
        ttfts = self._prefill()
        streams, serving = len(self.ends), self.ready(Role.DECODE)
        itl = self.shape.pace_s * (1 + streams / max(1, serving) / self.shape.double)
        tokens = streams * self.STEP_S / itl if serving else 0.0
        if serving:
            self.progress += self.STEP_S / itl
        while self.ends and self.ends[0] <= self.progress:
            heapq.heappop(self.ends)
        for ttft in ttfts:
            heapq.heappush(self.ends, self.progress + self.shape.answer_tokens)
            good = ttft <= self.policy.prefill.aim_s and itl <= self.policy.decode.aim_s
            self.kept, self.late = self.kept + good, self.late + (not good)
        self.recent.append(_Second(arrived, arrived * self.shape.prompt_tokens, tokens, itl, tuple(ttfts)))

    def _prefill(self) -> list[float]:
        able, done = self.shape.prefill_rate * self.STEP_S * self.ready(Role.PREFILL), []
        while self.backlog and able > 0:
            took = min(able, self.backlog[0][1])
            able -= took
            self.backlog[0][1] -= took
            if self.backlog[0][1] <= 0:
                waited = self.now - self.backlog.popleft()[0]
                done.append(waited + self.shape.prompt_tokens / self.shape.prefill_rate)
        return done

    def _tick(self, rate: float) -> Row:
        self.past.append(_joined(self.recent))
        self.recent.clear()
        observation = self.observe()
        self.state, decision = plan(self.state, observation, self.policy, self.now)
        changes = []
        for role in Role:
            told = decision.of(role)
            if told.changed:
                changes.append(told.reason)
                self.wanted[role] = told.wanted
            self._apply(role)
        return Row(
            at=self.now - self.began,
            rate=rate,
            wanted=dict(self.wanted),
            ready={role: self.ready(role) for role in Role},
            ttft_s=observation.fast.ttft_s if observation.fast else None,
            itl_s=observation.fast.itl_s if observation.fast else None,
            changes=tuple(changes),
            held=tuple(decision.of(role).held for role in Role if decision.of(role).held),
        )

    def _apply(self, role: Role) -> None:
        stay = [group for group in self.groups[role] if group.gone_at is None]
        for _ in range(self.wanted[role] - len(stay)):
            name = f"{role}-{self.names[role]}"
            self.names[role] += 1
            self.groups[role].append(_Group(name, self.now + self.shape.start_s, self.now))
        order = sorted(stay, key=lambda group: (group.state(self.now) is GroupState.READY, -group.since))
        for group in order[: max(0, len(stay) - self.wanted[role])]:
            group.gone_at, group.since = self.now + self.shape.drain_s, self.now

    def observe(self) -> Observation:
        """What a driver would see now."""
        waiting = sum(tokens for _, tokens in self.backlog)
        prefill = DpLoad(dp_rank=0, waiting_uncached_tokens=math.ceil(waiting / max(1, self.ready(Role.PREFILL))))
        serving = max(1, self.ready(Role.DECODE))
        streams = len(self.ends) / serving
        used = streams * (self.shape.prompt_tokens + self.shape.answer_tokens / 2) / self.shape.kv_tokens
        loads = {Role.PREFILL: [prefill] * self.ready(Role.PREFILL), Role.DECODE: []}
        for at in range(self.ready(Role.DECODE)):
            running = len(self.ends) // serving + (at < len(self.ends) % serving)
            loads[Role.DECODE].append(DpLoad(dp_rank=0, running=running, token_usage=min(1.0, used)))
        views = {role: self._view(role, loads[role]) for role in Role}
        orphan = len(self.backlog) if not self.ready(Role.PREFILL) else 0
        return Observation(
            prefill=views[Role.PREFILL],
            decode=views[Role.DECODE],
            fast=self._window(self.policy.fast_window_s),
            slow=self._window(self.policy.slow_window_s),
            queue=Queue(waiting_prefill=orphan),
        )

    def _view(self, role: Role, loads: Sequence[DpLoad]) -> PoolView:
        views, left = [], iter(loads)
        for group in self.groups[role]:
            state = group.state(self.now)
            load = GroupLoad(at=self.now, ranks=(next(left),)) if state is GroupState.READY else None
            since = group.ready_at if state is GroupState.READY else group.since
            leaving = group.gone_at is not None
            views.append(GroupView(group=group.name, state=state, since=since, leaving=leaving, load=load))
        return PoolView(wanted=self.wanted[role], groups=tuple(views))

    def _window(self, span: float) -> Window:
        past = list(self.past)[-math.ceil(span / self.policy.tick_s) :]
        seconds = len(past) * self.policy.tick_s
        ttfts = sorted(ttft for second in past for ttft in second.ttfts)
        steps = sorted((second.itl_s, second.tokens) for second in past if second.tokens > 0)
        totals = list(accumulate(tokens for _, tokens in steps))
        prefill, decode = self.policy.prefill, self.policy.decode
        itl = steps[bisect_right(totals, decode.percentile * totals[-1] * 0.999999)][0] if steps else None
        on_time = sum(tokens for step, tokens in steps if step <= decode.aim_s)
        return Window(
            seconds=seconds,
            requests_per_s=sum(second.arrived for second in past) / seconds,
            input_tokens_per_s=sum(second.prompts for second in past) / seconds,
            cached_tokens_per_s=0.0,
            output_tokens_per_s=sum(second.tokens for second in past) / seconds,
            refused_per_s=0.0,
            ttft_s=ttfts[min(len(ttfts) - 1, int(prefill.percentile * len(ttfts)))] if ttfts else None,
            ttft_kept=bisect_right(ttfts, prefill.aim_s) / len(ttfts) if ttfts else None,
            ttft_count=len(ttfts),
            itl_s=itl,
            itl_kept=on_time / totals[-1] if steps else None,
            itl_count=round(totals[-1]) if steps else 0,
        )


def table(rows: Sequence[Row]) -> str:
    """The ticks at which something changed, for people."""
    lines = ["time s | requests/s | prefill | decode | first token | between tokens | why"]
    for row in rows:
        if row.changes:
            pools = " | ".join(f"{row.ready[role]} of {row.wanted[role]}" for role in Role)
            times = " | ".join("-" if value is None else f"{value:.3f} s" for value in (row.ttft_s, row.itl_s))
            lines.append(f"{row.at:6.0f} | {row.rate:.1f} | {pools} | {times} | {'; '.join(row.changes)}")
    return "\n".join(lines)


def oracle_gpu_s(
    policy: PlanPolicy, shape: FleetShape, seconds: float, rate: Callable[[float], float], *, spare: float = 1.645
) -> float:
    """GPU-seconds of one who knows the load beforehand, and starts each group just in time.

    It keeps room for chance: `spare` standard deviations of the streams, and of the tokens that come within the aim.
    """
    step, aim = 2.0, policy.prefill.aim_s
    times = [at * step for at in range(math.ceil(seconds / step))]
    needs: dict[Role, list[int]] = {role: [] for role in Role}
    bears = shape.streams(policy.decode.aim_s)
    for at in times:
        arrive = rate(at)
        streams = arrive * shape.answer_tokens * policy.decode.aim_s
        least = max(1, policy.decode.min_groups)
        needs[Role.DECODE].append(max(least, math.ceil((streams + spare * math.sqrt(streams)) / bears)))
        prompts = arrive * aim
        work = (prompts + spare * math.sqrt(prompts)) * shape.prompt_tokens / aim
        needs[Role.PREFILL].append(max(1, policy.prefill.min_groups, math.ceil(work / shape.prefill_rate)))
    ahead = math.ceil(shape.start_s / step)
    total = 0.0
    for role, need in needs.items():
        for at in range(len(need)):
            total += max(need[at : at + ahead + 1]) * policy.of(role).gpus_per_group * step
    return total


def _poisson(dice: random.Random, mean: float) -> int:
    if mean <= 0:
        return 0
    if mean > 50:
        return max(0, round(dice.gauss(mean, math.sqrt(mean))))
    limit, count, product = math.exp(-mean), 0, dice.random()
    while product > limit:
        count += 1
        product *= dice.random()
    return count
