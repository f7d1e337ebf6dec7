"""Whatever happens to two pools in whatever order, what is done about it does no harm, and ends where it should."""

from __future__ import annotations

import itertools
from fractions import Fraction

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from msgspec.structs import replace
from rollout_world import D, P, World

from tandem.core.rollout_types import Action, Create, Member, Phase, Pool, Remove, Rules
from tandem.core.types import GroupState, Role

roles = st.sampled_from(Role)
numbers = st.integers(0, 4)
bounds = st.sampled_from([(1, 0), (0, 1), (1, 1), (2, 0), (2, 1), (0, 2), (3, 2)])
either = st.booleans()
picks = st.integers(0, 10**6)
kinds = st.sampled_from(["good", "good", "good", "crash", "slow", "wrong"])


class Rollouts(RuleBasedStateMachine):
    """A revision's name says what becomes of its groups: good-3, slow-4 and crash-5 (never ready), wrong-6 (ready)."""

    def __init__(self) -> None:
        super().__init__()
        self.names = itertools.count(1)
        self.world = World({})
        self.risky: set[tuple[Role, str]] = set()
        """Bad revisions that came when there was a good one."""
        self.shown: set[tuple[Role, str]] = set()
        """Revisions that have shown that they serve."""
        self.end = "good"

    @initialize(
        groups=st.tuples(numbers, numbers), bounds=st.tuples(bounds, bounds), rollback=either, prompts=either, end=kinds
    )
    def begin(
        self,
        groups: tuple[int, int],
        bounds: tuple[tuple[int, int], tuple[int, int]],
        rollback: bool,
        prompts: bool,
        end: str,
    ) -> None:
        self.world.prompts = prompts
        for role, number, (surge, unavailable) in zip(Role, groups, bounds, strict=True):
            rules = Rules(max_surge=surge, max_unavailable=unavailable, canary_s=30, progress_s=100, rollback=rollback)
            self.world.pools[role] = Pool(
                role=role, groups=number, revision="good-0", kv_format="kv0", weights="w0", rules=rules
            )
        self.end = end

    # -- what people do

    @rule(role=roles, groups=numbers)
    def scale(self, role: Role, groups: int) -> None:
        self.world.want(role, groups=groups)

    @rule(both=either, role=roles, kind=kinds, new_format=either, new_weights=either)
    def change(self, both: bool, role: Role, kind: str, new_format: bool, new_weights: bool) -> None:
        number = next(self.names)
        for one in Role if both else (role,):
            pool = self.world.pools[one]
            kv_format = f"kv{number}" if new_format else pool.kv_format
            self.want_revision(one, f"{kind}-{number}", kv_format, f"w{number}" if new_weights else pool.weights)

    @rule(role=roles, pick=picks)
    def change_back(self, role: Role, pick: int) -> None:
        known = sorted(self.world.formats)
        if known:
            revision = known[pick % len(known)]
            self.want_revision(role, revision, self.world.formats[revision], self.world.weights[revision])

    @rule(role=roles, paused=either)
    def pause(self, role: Role, paused: bool) -> None:
        self.world.want(role, paused=paused)

    @rule(pick=picks)
    def delete_by_hand(self, pick: int) -> None:
        if group := self.some(pick):
            self.world.put(group, leaving=True)

    @rule(pick=picks)
    def cordon(self, pick: int) -> None:
        group = self.some(pick)
        if group and self.world.find(group).state is GroupState.READY:
            self.world.put(group, state=GroupState.CORDONED, ready_since=None)
            self.world.by_hand.add(group)

    def want_revision(self, role: Role, revision: str, kv_format: str, weights: str) -> None:
        pool = self.world.pools[role]
        if pool.memory.good and not revision.startswith("good"):
            self.risky.add((role, revision))
        self.world.want(role, revision=revision, kv_format=kv_format, weights=weights)

    # -- what befalls the groups

    @rule(pick=picks, times=st.integers(1, 3), lost=either)
    def fail(self, pick: int, times: int, lost: bool) -> None:
        if group := self.some(pick):
            self.world.fail(group, times)
            self.world.put(group, lost=lost)

    @rule(nodes=st.sampled_from([None, None, 2, 6]))
    def have_nodes(self, nodes: int | None) -> None:
        self.world.nodes = nodes

    @rule(seconds=st.sampled_from([1.0, 20.0, 40.0, 150.0]))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds

    @rule()
    def settle(self) -> None:
        """Groups come up, as far as they can, and what leaves is gone."""
        self.world.empty()
        self.world.place()
        self.come_up()

    @rule(pick=picks)
    def one_leaves(self, pick: int) -> None:
        leaving = [one.group for role in self.world.pools for one in self.world.members(role) if one.leaving]
        if leaving:
            self.world.gone(leaving[pick % len(leaving)])

    @rule()
    def forget(self) -> None:
        """The pools' status is lost, with all that was remembered. What was refused may then be tried again."""
        for role, pool in self.world.pools.items():
            if pool.memory.good and pool.memory.failed == "":
                self.world.want(role, memory=type(pool.memory)())
                self.risky -= {one for one in self.risky if one[0] is role}
                self.shown -= {one for one in self.shown if one[0] is role}
        self.world.cordon_or_not()

    def come_up(self) -> None:
        for role in Role:
            for one in self.world.alive(role):
                if one.placed is None or one.ready:
                    continue
                if one.revision.startswith("crash"):
                    self.world.fail(one.group)
                elif not one.revision.startswith("slow"):
                    self.come_up_well(one)

    def come_up_well(self, one: Member) -> None:
        """It is ready; or, if it was that before and is held back, it is asked."""
        wrong = "it said Rome" if one.revision.startswith("wrong") else ""
        if one in self.world.waiting() and one.group not in self.world.by_hand:
            self.world.answer(one.group, wrong=wrong)
            return
        self.world.by_hand.discard(one.group)
        self.world.serve(one.group)
        self.world.put(one.group, failures=0, lost=False)
        if wrong and not self.world.prompts:
            self.world.put(one.group, canary_failed=wrong)

    def some(self, pick: int) -> str:
        alive = [one.group for role in self.world.pools for one in self.world.alive(role)]
        return alive[pick % len(alive)] if alive else ""

    # -- what must hold

    @rule()
    def step(self) -> None:
        self.check_step()

    def check_step(self) -> list[Action]:
        """One pass, with everything that must hold about it."""
        world = self.world
        before = {role: (len(world.alive(role)), len(world.ready(role))) for role in Role}
        taken = {one.group for role in Role for one in world.members(role)}
        pairs, capacity = world.pairs(), world.capacity()
        good = {role: {one.group for one in world.ready(role)} for role in Role}
        again = World(dict(reversed(world.pools.items())), now=world.now).ask()
        patient = World({role: _has_not_waited(pool) for role, pool in world.pools.items()}, now=world.now).ask()
        actions = world.step()
        assert again == world.plans, "the order of the pools matters"
        for role, plan in world.plans.items():
            assert plan.actions == patient[role].actions, "a wait that is too long changes what is done"
            assert plan.memory.failed == patient[role].memory.failed, "a wait that is too long is a failure"
            if plan.status.reason == "Stalled":
                assert patient[role].status.phase is Phase.PROGRESSING
                assert world.now >= plan.memory.waits_since + world.pools[role].rules.progress_s
        wanted = all(pool.groups for pool in world.pools.values())
        for role, pool in world.pools.items():
            if pool.memory.passed:
                self.shown.add((role, pool.memory.target))
            if pool.memory.good:
                self.shown.add((role, pool.memory.good))
            had, had_ready = before[role]
            plan = world.plans[role]
            assert len(world.alive(role)) <= max(pool.groups + pool.rules.max_surge, had)
            if any(isinstance(action, Create) for action in plan.actions):
                assert len(world.alive(role)) <= pool.groups + pool.rules.max_surge
            assert len(world.ready(role)) >= min(had_ready, pool.groups - pool.rules.max_unavailable)
            assert plan.memory.failed != pool.revision or not [
                one for one in plan.actions if isinstance(one, Create) and one.revision == pool.revision
            ]
            if pool.paused and pool.memory.good not in ("", pool.revision):
                assert all(one.revision != pool.revision for one in plan.actions if isinstance(one, Create))
            assert plan.status.message
        assert not {action.group for action in actions if isinstance(action, Create)} & taken
        removed = {action.group for action in actions if isinstance(action, Remove)}
        if wanted and removed:
            assert not pairs or world.pairs(), "the last complete pair was removed"
        if wanted and any(removed & good[role] for role in Role):
            spared = max(_share(pool) for pool in world.pools.values())
            assert world.capacity() >= min(capacity, 1 - spared)
        assert world.step() == [], "a second pass does more"
        return actions

    @invariant()
    def a_bad_revision_never_has_more_than_its_canary(self) -> None:
        for role, revision in self.risky:
            assert sum(one.revision == revision for one in self.world.alive(role)) <= 1

    @invariant()
    def nobody_is_sent_to_a_canary_that_has_not_answered(self) -> None:
        for role in self.world.pools:
            for one in self.world.ready(role):
                assert one.checked or (role, one.revision) in self.shown, one

    @invariant()
    def nobody_is_sent_to_a_group_that_answers_wrongly(self) -> None:
        if self.world.prompts:
            served = {
                (role, one.revision) for role in self.world.pools for one in self.world.members(role) if one.served
            }
            assert not served & {one for one in self.risky if one[1].startswith("wrong")}

    # -- where it ends

    @rule(both=either)
    def calm(self, both: bool) -> None:
        """For a while nothing happens by itself: one change gets through, and another one that may be bad."""
        world = self.world
        world.nodes = None
        for role, pool in world.pools.items():
            few = not pool.rules.max_surge and pool.groups == 1
            world.want(role, paused=False, groups=2 if few else pool.groups)
        number = next(self.names)
        for role in Role:  # first to something that serves
            self.want_revision(role, f"good-{number}", f"kv{number}", f"w{number}")
        self.finish()
        for role, pool in world.pools.items():
            assert world.status(role).phase is Phase.COMPLETE, world.status(role)
            assert [one.revision for one in world.alive(role)] == [f"good-{number}"] * pool.groups
        old, number = f"good-{number}", next(self.names)
        changed = tuple(Role) if both else (D,)
        for role in changed:
            kv_format, weights = world.pools[P].kv_format, f"w{number}" if both else world.pools[P].weights
            self.want_revision(role, f"{self.end}-{number}", f"kv{number}" if both else kv_format, weights)
        self.finish()
        for role, pool in world.pools.items():
            revisions = [one.revision for one in world.alive(role)]
            if self.end == "good" or not pool.groups or role not in changed:
                assert world.status(role).phase is Phase.COMPLETE, world.status(role)
                assert revisions == [pool.revision] * pool.groups
            elif pool.rules.rollback:
                assert world.status(role).phase is Phase.ROLLED_BACK, world.status(role)
                assert revisions == [old] * pool.groups
            else:
                assert world.status(role).phase is Phase.STOPPED, world.status(role)
                assert sum(revision == pool.revision for revision in revisions) <= 1

    def finish(self) -> None:
        quiet = 0
        while quiet < 6:
            quiet = 0 if self.check_step() else quiet + 1
            self.a_bad_revision_never_has_more_than_its_canary()
            self.world.empty()
            self.world.place()
            self.come_up()
            self.world.now += 35


def _has_not_waited(pool: Pool) -> Pool:
    return replace(pool, memory=replace(pool.memory, waits_for="", waits_since=0.0))


def _share(pool: Pool) -> Fraction:
    return Fraction(pool.rules.max_unavailable, pool.groups)


TestRollouts = Rollouts.TestCase
TestRollouts.settings = settings(stateful_step_count=30)
