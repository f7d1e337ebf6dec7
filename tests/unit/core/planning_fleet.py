"""A fleet on paper for the planner's tests: what it looks like, and ticks that go by."""

from __future__ import annotations

from dataclasses import dataclass, field

from msgspec.structs import replace

from tandem.core.planning import plan
from tandem.core.planning_types import (
    Capacity,
    Decision,
    GroupLoad,
    GroupView,
    Observation,
    PlanPolicy,
    PlanState,
    PoolPolicy,
    PoolView,
    Queue,
    Window,
)
from tandem.core.types import DpLoad, GroupState, Role

NOW = 1_767_600_000.0
"""Monday, 5 January 2026, 08:00 UTC."""
POOL = PoolPolicy(gpus_per_group=8, aim_s=2.0, max_groups=8, down_cooldown_s=60, up_cooldown_s=10, start_s=100)
POLICY = PlanPolicy(prefill=POOL, decode=replace(POOL, aim_s=0.05))
QUIET = Window(
    seconds=10,
    requests_per_s=2.0,
    input_tokens_per_s=2000.0,
    cached_tokens_per_s=500.0,
    output_tokens_per_s=400.0,
    refused_per_s=0.0,
    ttft_s=0.8,
    ttft_kept=1.0,
    ttft_count=20,
    itl_s=0.03,
    itl_kept=1.0,
    itl_count=4000,
)
IDLE = Window(
    seconds=10,
    requests_per_s=0.0,
    input_tokens_per_s=0.0,
    cached_tokens_per_s=0.0,
    output_tokens_per_s=0.0,
    refused_per_s=0.0,
    ttft_count=0,
    itl_count=0,
)
SLOW_TOKENS = replace(QUIET, itl_s=0.083, itl_kept=0.5)
LATE_TOKENS = replace(QUIET, ttft_s=5.0, ttft_kept=0.5)


@dataclass
class Paper:
    """Both pools; `tick` lets the planner look, and does what it says when `obeys`."""

    policy: PlanPolicy = POLICY
    state: PlanState = field(default_factory=PlanState)
    now: float = NOW
    fast: Window | None = QUIET
    slow: Window | None = QUIET
    queue: Queue | None = field(default_factory=Queue)
    running: int = 6
    """On each ready decode group."""
    kv: float = 0.3
    backlog: int = 0
    """Uncached tokens that wait at each prefill group."""
    silent: frozenset[str] = frozenset()
    stale_s: float = 0.0
    obeys: bool = True
    groups: dict[Role, dict[str, GroupView]] = field(default_factory=lambda: {role: {} for role in Role})
    wanted: dict[Role, int] = field(default_factory=dict)
    by_hand: bool | None = None
    serial: int = 0
    decisions: list[Decision] = field(default_factory=list)

    @classmethod
    def of(cls, prefill: int = 1, decode: int = 1, **changes: object) -> Paper:
        paper = cls(**changes)  # type: ignore[arg-type]
        for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
            for _ in range(count):
                paper.add(role, GroupState.READY)
            paper.wanted[role] = count
        return paper

    def add(self, role: Role, state: GroupState = GroupState.STARTING, **changes: object) -> str:
        name = f"{role}-{self.serial}"
        self.serial += 1
        self.groups[role][name] = replace(GroupView(group=name, state=state, since=self.now), **changes)
        return name

    def put(self, name: str, state: GroupState, **changes: object) -> None:
        role = Role(name.split("-")[0])
        self.groups[role][name] = replace(self.groups[role][name], state=state, since=self.now, **changes)

    def observe(self) -> Observation:
        views = {
            role: PoolView(wanted=self.wanted[role], groups=self._loaded(role), by_hand=self.by_hand) for role in Role
        }
        return Observation(
            prefill=views[Role.PREFILL], decode=views[Role.DECODE], fast=self.fast, slow=self.slow, queue=self.queue
        )

    def _loaded(self, role: Role) -> tuple[GroupView, ...]:
        decode = DpLoad(dp_rank=0, running=self.running, token_usage=self.kv)
        rank = decode if role is Role.DECODE else DpLoad(dp_rank=0, waiting_uncached_tokens=self.backlog)
        load = GroupLoad(at=self.now - self.stale_s, ranks=(rank,))
        return tuple(
            replace(group, load=None if group.group in self.silent else load) for group in self.groups[role].values()
        )

    def tick(self, seconds: float = 2.0) -> Decision:
        self.now += seconds
        self.state, decision = plan(self.state, self.observe(), self.policy, self.now)
        self.decisions.append(decision)
        if self.obeys:
            for role in Role:
                self.scale(role, decision.of(role).wanted)
        return decision

    def scale(self, role: Role, wanted: int) -> None:
        """What an operator does with a number."""
        self.wanted[role] = wanted
        groups = self.groups[role]
        stay = [group for group in groups.values() if not group.leaving]
        for _ in range(wanted - len(stay)):
            self.add(role)
        order = sorted(stay, key=lambda group: (group.state is GroupState.READY, -group.since, group.group))
        for group in order[: max(0, len(stay) - wanted)]:
            self.put(group.group, GroupState.DRAINING, leaving=True)

    def settle(self) -> None:
        """All that start are ready, and all that drain are gone."""
        for role in Role:
            for group in list(self.groups[role].values()):
                if group.leaving:
                    del self.groups[role][group.group]
                elif group.state is GroupState.STARTING:
                    self.put(group.group, GroupState.READY)

    def ticks(self, seconds: float, every: float = 2.0, settle: bool = True) -> Decision:
        """Let so much time pass; returns the last decision."""
        decision = None
        for _ in range(max(1, round(seconds / every))):
            decision = self.tick(every)
            if settle:
                self.settle()
        assert decision is not None
        return decision

    def pool(self, role: Role, **changes: object) -> None:
        """Another policy of one pool."""
        self.policy = replace(self.policy, **{role.value: replace(self.policy.of(role), **changes)})


def learned(paper: Paper, role: Role, broke: float) -> None:
    """The planner has seen that a group bears no more than this."""
    memory = replace(paper.state.of(role), capacity=Capacity(broke=broke, at=paper.now))
    paper.state = replace(paper.state, **{role.value: memory})
