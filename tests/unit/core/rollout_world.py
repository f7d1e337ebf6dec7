"""Two pools on paper: groups that start, serve, fail and leave when a test says so, and do what `roll` decides."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from msgspec.structs import replace

from tandem.core.rollout import roll
from tandem.core.rollout_check import is_held_back, is_waiting
from tandem.core.rollout_types import Action, Create, Member, Memory, Plan, Pool, Remove, Rules, Status
from tandem.core.types import GroupState, Role

P, D = Role.PREFILL, Role.DECODE
RULES = Rules(canary_s=30, progress_s=100)


@dataclass
class World:
    """`step` asks what to do and does it; everything else happens to the groups."""

    pools: dict[Role, Pool]
    now: float = 1000.0
    nodes: int | None = None
    """Groups that find nodes; None = all."""
    plans: dict[Role, Plan] = field(default_factory=dict)
    prompts: bool = False
    """Whether the first group of a revision is asked a prompt before it serves; else it serves as it is ready."""
    by_hand: set[str] = field(default_factory=set)
    """Groups that somebody has cordoned."""
    formats: dict[str, str] = field(default_factory=dict)
    """KV format of each revision that was ever wanted."""
    weights: dict[str, str] = field(default_factory=dict)
    """What each of them declares of the weights."""

    # -- what is wanted

    def want(self, role: Role, **changes: Any) -> None:
        self.pools[role] = replace(self.pools[role], **changes)

    def rules(self, **changes: Any) -> None:
        for role, pool in self.pools.items():
            self.want(role, rules=replace(pool.rules, **changes))

    # -- what is there

    def members(self, role: Role) -> tuple[Member, ...]:
        return self.pools[role].members if role in self.pools else ()

    def alive(self, role: Role) -> list[Member]:
        return [one for one in self.members(role) if not one.leaving]

    def revisions(self, role: Role) -> str:
        """Of the groups that do not leave, by their numbers."""
        alive = sorted(self.alive(role), key=lambda one: int(one.group.rpartition("-")[2]))
        return " ".join(one.revision for one in alive)

    def ready(self, role: Role) -> list[Member]:
        return [one for one in self.alive(role) if one.ready]

    def memory(self, role: Role) -> Memory:
        return self.pools[role].memory

    def status(self, role: Role) -> Status:
        return self.plans[role].status

    def pairs(self) -> set[tuple[str, str]]:
        return {one.pairs_with for one in self.ready(P)} & {one.pairs_with for one in self.ready(D)}

    def capacity(self) -> Fraction:
        """Share of the wanted service that pairs can give."""
        if not all(pool.groups for pool in self.pools.values()):
            return Fraction(0)
        total = Fraction(0)
        for kind in self.pairs():
            counts = {role: sum(one.pairs_with == kind for one in self.ready(role)) for role in Role}
            total += min(Fraction(count, self.pools[role].groups) for role, count in counts.items())
        return total

    # -- what happens

    def put(self, group: str, **changes: Any) -> None:
        for role, pool in self.pools.items():
            members = tuple(replace(one, **changes) if one.group == group else one for one in pool.members)
            self.want(role, members=members)

    def gone(self, *groups: str) -> None:
        for role, pool in self.pools.items():
            self.want(role, members=tuple(one for one in pool.members if one.group not in groups))

    def serve(self, *groups: str) -> None:
        """They become ready; without names, all that start and have their nodes."""
        for role in Role:
            for one in self.members(role):
                able = one.state in (GroupState.STARTING, GroupState.FAILED) and one.placed is not None
                if one.group in groups or (not groups and able and not one.leaving):
                    held = self.held(one)
                    self.put(
                        one.group,
                        state=GroupState.CORDONED if held else GroupState.READY,
                        ready_since=None if held else self.now,
                        served=not held,
                        placed=one.placed or self.now,
                        weight_version=one.weights or one.weight_version,
                    )

    def held(self, one: Member) -> bool:
        """Whether it is kept from serving until it has answered a prompt."""
        return is_held_back(one, self.memory(one.role))

    def waiting(self) -> list[Member]:
        """Groups that are up and held back."""
        return [one for role in self.pools for one in self.alive(role) if is_waiting(one, self.memory(role))]

    def answer(self, *groups: str, wrong: str = "") -> None:
        """Groups that wait are asked, or some of them; those that have a partner that is up answer, or need none."""
        up = (GroupState.READY, GroupState.CORDONED)
        for one in self.waiting():
            other = P if one.role is D else D
            partners = [two for two in self.members(other) if two.state in up and two.pairs_with == one.pairs_with]
            if groups and one.group not in groups:
                continue
            if wrong:
                self.put(one.group, canary_failed=wrong)
            elif partners or other not in self.pools or not self.pools[other].groups:
                self.put(one.group, checked=True)
        self.cordon_or_not()

    def cordon_or_not(self) -> None:
        """Who is held back serves nobody; who is not any more, does."""
        for role in self.pools:
            for one in self.members(role):
                if one.state is GroupState.CORDONED and one.group not in self.by_hand and not self.held(one):
                    self.put(one.group, state=GroupState.READY, ready_since=self.now, served=True)
                elif one.state is GroupState.READY and self.held(one):
                    self.put(one.group, state=GroupState.CORDONED, ready_since=None)

    def fail(self, group: str, times: int = 1) -> None:
        one = self.find(group)
        failures = one.failures + times
        self.put(
            group,
            state=GroupState.FAILED,
            ready_since=None,
            failures=failures,
            checked=not one.canary,
            reason="rank 1 died",
        )

    def find(self, group: str) -> Member:
        return next(one for role in Role for one in self.members(role) if one.group == group)

    def place(self) -> None:
        """Groups get nodes as long as there are any; one that leaves still has its own."""
        for role in Role:
            for one in self.members(role):
                held = sum(two.placed is not None for either in Role for two in self.members(either))
                room = self.nodes is None or held < self.nodes
                if one.placed is None and not one.leaving:
                    self.put(one.group, placed=self.now if room else None, no_room=not room)

    def empty(self) -> None:
        """What leaves is gone."""
        self.gone(*[one.group for role in Role for one in self.members(role) if one.leaving])

    # -- what is done about it

    def ask(self) -> dict[Role, Plan]:
        for pool in self.pools.values():
            self.formats[pool.revision] = pool.kv_format
            self.weights[pool.revision] = pool.weights
        return roll(tuple(self.pools.values()), self.now)

    def step(self) -> list[Action]:
        self.plans = self.ask()
        for role, plan in self.plans.items():
            self.want(role, memory=plan.memory)
        for role, plan in self.plans.items():
            for action in plan.actions:
                self.do(role, action)
        self.cordon_or_not()
        return [action for plan in self.plans.values() for action in plan.actions]

    def do(self, role: Role, action: Action) -> None:
        if isinstance(action, Remove):
            self.put(action.group, leaving=True)
        elif isinstance(action, Create):
            new = Member(
                group=action.group,
                role=role,
                revision=action.revision,
                kv_format=self.formats[action.revision],
                weights=self.weights[action.revision],
                state=GroupState.STARTING,
                canary=self.prompts and action.canary,
                checked=not (self.prompts and action.canary),
            )
            self.want(role, members=(*self.members(role), new))

    def run(self, passes: int = 20) -> None:
        """Everybody is well for a while: groups start, and those that leave do."""
        for _ in range(passes):
            self.step()
            self.empty()
            self.place()
            self.serve()
            self.answer()
            self.now += 40
        self.step()


def world(prefill: int = 2, decode: int = 2, *, weights: str = "", **rules: Any) -> World:
    """A fleet that serves with revision A in both pools."""
    at = replace(RULES, **rules)
    pools = {
        role: Pool(role=role, groups=groups, revision="A", kv_format="kv1", weights=weights, rules=at)
        for role, groups in ((P, prefill), (D, decode))
    }
    fresh = World(pools)
    fresh.run(3)
    return fresh


def change(fleet: World, *roles: Role, to: str = "B", kv_format: str = "kv1", weights: str = "") -> None:
    for role in roles:
        fleet.want(role, revision=to, kv_format=kv_format, weights=weights)


def until_canary(**rules: object) -> World:
    """Decode has its first group of revision B, and it is up."""
    fleet = world(decode=3, **rules)
    change(fleet, D)
    fleet.step()
    fleet.empty()
    fleet.step()
    fleet.place()
    fleet.serve()
    return fleet


def member(group: str, **changes: object) -> Member:
    role = Role(group.partition("-")[0])
    ready = Member(group=group, role=role, revision="A", state=GroupState.READY, ready_since=0.0, placed=0.0)
    return replace(ready, **changes)


def shrunk(*members: Member, to: int = 1) -> list[str]:
    """The groups that go when so many are wanted, in the order in which that was decided."""
    pool = Pool(role=D, groups=to, revision="A", rules=RULES, members=members, memory=Memory(good="A", target="A"))
    return [action.group for action in roll([pool], 10.0)[D].actions]
