"""Whatever load and luck a fleet has, the planner keeps its promises."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from msgspec.structs import replace

from tandem.core.planning import plan
from tandem.core.planning_types import Window
from tandem.core.types import GroupState, Role
from unit.core.planning_fleet import IDLE, Paper

ROLES = st.sampled_from(list(Role))
BEARS = {Role.PREFILL: 1000.0, Role.DECODE: 200.0}
"""What a group of the simulated fleet bears: uncached tokens/s, tokens of answers/s."""


class Fleet(Paper):
    """A fleet whose times follow from its load: 40 % of the aim when empty, the aim when full, worse above."""

    demand: dict[Role, float]
    odd: float = 1.0
    """By how much more requests its engines report than run."""

    def load(self, noise: float = 1.0) -> None:
        """Show what the demand makes of the groups that there are."""
        use = {}
        for role in Role:
            ready = sum(g.state is GroupState.READY and not g.leaving for g in self.groups[role].values())
            use[role] = self.demand[role] * noise / (BEARS[role] * ready) if ready else 9.0
        itl = 0.05 * (0.4 + 0.6 * use[Role.DECODE])
        ttft = 2.0 * (0.4 + 0.6 * use[Role.PREFILL])
        tokens = self.demand[Role.DECODE] * noise
        if not any(self.demand.values()):
            self.fast = self.slow = IDLE
            self.running, self.backlog, self.kv = 0, 0, 0.0
            return
        self.fast = self.slow = Window(
            seconds=10,
            requests_per_s=tokens / 200,
            input_tokens_per_s=self.demand[Role.PREFILL] * noise,
            cached_tokens_per_s=0.0,
            output_tokens_per_s=tokens,
            refused_per_s=0.0,
            ttft_s=ttft,
            itl_s=itl,
        )
        ready = sum(g.state is GroupState.READY and not g.leaving for g in self.groups[Role.DECODE].values())
        self.running = round(tokens * itl * self.odd / max(1, ready)) + 2
        self.backlog = 5000 if use[Role.PREFILL] > 0.9 else 0
        self.kv = min(1.0, 0.6 * use[Role.DECODE])


def fleet(prefill: int = 1, decode: int = 1) -> Fleet:
    paper = Fleet.of(prefill, decode)
    assert isinstance(paper, Fleet)
    paper.demand = {Role.PREFILL: 300.0, Role.DECODE: 60.0}
    return paper


class Planned(RuleBasedStateMachine):
    """Load changes, groups start, fail and drain, people interfere; the planner ticks."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = fleet()
        self.ready = dict.fromkeys(Role, 1)
        self.downs: dict[Role, list[float]] = {role: [] for role in Role}
        self.by_hand: dict[Role, float] = {}
        self.bad: dict[Role, float] = {}

    @initialize(budget=st.sampled_from([None, 32, 48, 96]), least=st.sampled_from([0, 1, 2]))
    def begin(self, budget: int | None, least: int) -> None:
        self.fleet.policy = replace(self.fleet.policy, gpu_budget=budget)
        self.fleet.pool(Role.DECODE, min_groups=least, idle_s=60, max_groups=5)
        self.fleet.pool(Role.PREFILL, min_groups=1, max_groups=5, manual_hold_s=100)
        self.tick(2)

    @rule(role=ROLES, groups=st.floats(0, 6))
    def load_changes(self, role: Role, groups: float) -> None:
        self.fleet.demand[role] = groups * BEARS[role]

    @rule()
    def load_ends(self) -> None:
        self.fleet.demand = dict.fromkeys(Role, 0.0)

    @rule(role=ROLES, pick=st.integers(0, 9))
    def group_fails(self, role: Role, pick: int) -> None:
        names = [group.group for group in self.fleet.groups[role].values() if not group.leaving]
        if names:
            self.fleet.put(names[pick % len(names)], GroupState.FAILED)

    @rule(role=ROLES)
    def groups_recover(self, role: Role) -> None:
        for group in list(self.fleet.groups[role].values()):
            if group.state is GroupState.FAILED:
                self.fleet.put(group.group, GroupState.STARTING)

    @rule()
    def groups_settle(self) -> None:
        self.fleet.settle()

    @rule(missing=st.booleans())
    def metrics_come_and_go(self, missing: bool) -> None:
        self.fleet.silent = frozenset({"decode-1", "prefill-0"}) if missing else frozenset()

    @precondition(lambda self: not self.by_hand)
    @rule(wanted=st.integers(0, 7))
    def somebody_scales_prefill(self, wanted: int) -> None:
        if wanted != self.fleet.wanted[Role.PREFILL]:
            self.fleet.scale(Role.PREFILL, wanted)
            self.by_hand[Role.PREFILL] = self.fleet.now

    @rule(seconds=st.sampled_from([2, 2, 10, 60, 200]), settles=st.booleans())
    def time_passes(self, seconds: int, settles: bool) -> None:
        for _ in range(seconds // 2):
            self.tick(2)
            if settles:
                self.fleet.settle()

    def tick(self, seconds: float) -> None:
        paper = self.fleet
        paper.load()
        before = dict(paper.wanted)
        ready = {role: self.count(role, GroupState.READY) for role in Role}
        seen = paper.observe()
        decision = paper.tick(seconds)
        for role in Role:
            told, pool = decision.of(role), paper.policy.of(role)
            if told.wanted < before[role]:
                assert told.wanted == before[role] - 1, "more than one group at once"
                last = self.downs[role][-1] if self.downs[role] else float("-inf")
                assert paper.now - last >= pool.down_cooldown_s, "two groups within one cool-down"
                self.downs[role].append(paper.now)
                assert told.wanted > 0 or pool.min_groups == 0, "the last group went"
                if told.wanted > 0 and ready[role]:
                    assert self.count(role, GroupState.READY) >= 1, "the last ready group went"
                assert "instead of" in told.reason
            if told.wanted > before[role]:
                assert told.wanted <= pool.max_groups
                assert "instead of" in told.reason
                if paper.policy.gpu_budget is not None:
                    assert decision.gpus <= paper.policy.gpu_budget, "a group was added above the budget"
            if role not in self.by_hand:
                assert told.wanted <= pool.max_groups
            self.prompt(role, seen.fast, before[role] == told.wanted, decision.of(role).held)
        started = self.by_hand.get(Role.PREFILL)
        if started is not None and paper.now - started > 100 and 1 <= paper.wanted[Role.PREFILL] <= 5:
            del self.by_hand[Role.PREFILL]

    def prompt(self, role: Role, fast: Window | None, unchanged: bool, held: str) -> None:
        """A breach that lasts ten seconds has led to a decision, or the planner says what keeps it."""
        late = fast is not None and ((fast.ttft_s if role is Role.PREFILL else fast.itl_s) or 0) > (
            self.fleet.policy.of(role).aim_s
        )
        if not late or not unchanged or held or not self.count(role, GroupState.READY):
            self.bad.pop(role, None)
        elif self.fleet.now - self.bad.setdefault(role, self.fleet.now) > 10:
            raise AssertionError(f"{role} is late for {self.fleet.now - self.bad[role]} s, and nothing is said")

    def count(self, role: Role, state: GroupState) -> int:
        return sum(group.state is state and not group.leaving for group in self.fleet.groups[role].values())

    @invariant()
    def deterministic(self) -> None:
        paper = self.fleet
        if paper.decisions:
            seen = paper.observe()
            assert plan(paper.state, seen, paper.policy, paper.now + 1) == plan(
                paper.state, seen, paper.policy, paper.now + 1
            )


TestPlanned = Planned.TestCase
TestPlanned.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)


@given(
    prefill=st.floats(0.05, 4.5),
    decode=st.floats(0.05, 4.5),
    groups=st.integers(1, 6),
    odd=st.sampled_from([1.0, 4.0]),
)
@settings(max_examples=8, deadline=None)
def test_constant_load_leads_to_a_number_that_stays(prefill: float, decode: float, groups: int, odd: float) -> None:
    paper = fleet(groups, groups)
    paper.odd = odd
    paper.demand = {Role.PREFILL: prefill * BEARS[Role.PREFILL], Role.DECODE: decode * BEARS[Role.DECODE]}
    numbers = []
    for _ in range(400):
        paper.load()
        paper.tick(4)
        paper.settle()
        numbers.append(tuple(paper.wanted.values()))
    assert len(set(numbers[200:])) == 1, numbers
    for role, use in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
        assert paper.wanted[role] >= use, "too few"


@given(use=st.floats(0.3, 4.0), noise=st.lists(st.floats(0.96, 1.04), min_size=20, max_size=60))
@settings(max_examples=8, deadline=None)
def test_noise_within_a_band_does_not_flap(use: float, noise: list[float]) -> None:
    paper = fleet(1, 5)
    paper.demand = {Role.PREFILL: 300.0, Role.DECODE: use * BEARS[Role.DECODE]}
    numbers = []
    for at in range(500):
        paper.load(noise[at % len(noise)])
        paper.tick(4)
        paper.settle()
        numbers.append(paper.wanted[Role.DECODE])
    changes = [(one, two) for one, two in pairwise(numbers) if one != two]
    ups = sum(two > one for one, two in changes)
    assert ups <= 1, "it went up again and again"
    assert len(set(numbers[250:])) == 1
