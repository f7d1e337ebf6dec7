"""Which groups may go without harm to the pairs that serve: prefill and decode of equal weights and KV format.

Two promises, kept for whatever a rollout removes:
- the last complete pair stays;
- when both pools change to something that does not pair with the old, capacity moves over in step. Capacity is the
  share of the wanted service that pairs can give: for each (weights, format) the smaller share of the two roles, over
  all of them. One prefill group of two beside three decode groups of four is half of it, since prefill bounds it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from tandem.core.rollout_types import Member, Pool
from tandem.core.types import GroupState, Role

_Kind = tuple[Role, tuple[str, str]]
"""Role, and what a partner has to have in common."""


def safe_to_remove(members: Iterable[Member], group: str) -> bool:
    """Whether some complete pair is left without `group`, or none is there with it. `members`: of both roles."""
    members = tuple(members)
    ready = Counter((one.role, one.pairs_with) for one in members if one.ready)
    without = Counter((one.role, one.pairs_with) for one in members if one.ready and one.group != group)
    return _complete(without) or not _complete(ready)


def paired_since(member: Member, partners: Iterable[Member]) -> float | None:
    """Since when pairs could be made with it; None = they cannot."""
    ready = [one.ready_since for one in partners if one.ready and one.pairs_with == member.pairs_with]
    if not member.ready or not ready or member.ready_since is None:
        return None
    return max(member.ready_since, min((since for since in ready if since is not None), default=member.ready_since))


class Ledger:
    """Both pools' groups while it is decided about them; what is removed counts as leaving at once."""

    def __init__(self, pools: Sequence[Pool]) -> None:
        self._pools = {pool.role: pool for pool in pools}
        self._taken = {member.group for pool in pools for member in pool.members}
        self._alive = {
            role: {one.group: one for one in pool.members if not one.leaving} for role, pool in self._pools.items()
        }
        self._next = dict.fromkeys(Role, 0)
        self._ready = Counter(
            (one.role, one.pairs_with) for alive in self._alive.values() for one in alive.values() if one.ready
        )

    def alive(self, role: Role) -> list[Member]:
        """Groups of a role that do not leave."""
        return list(self._alive.get(role, {}).values())

    def count(self, role: Role) -> int:
        """How many these are."""
        return len(self._alive.get(role, {}))

    def ready(self, role: Role) -> int:
        """How many of them are ready."""
        return sum(count for (one, _), count in self._ready.items() if one is role)

    def remove(self, member: Member) -> None:
        """It leaves from now on."""
        del self._alive[member.role][member.group]
        self._ready[member.role, member.pairs_with] -= member.ready

    def create(self, role: Role, revision: str) -> str:
        """A new group of that revision; returns its id, the lowest number that no group has, not even a leaving one."""
        while (group := f"{role}-{self._next[role]}") in self._taken:
            self._next[role] += 1
        self._taken.add(group)
        self._alive[role][group] = Member(group=group, role=role, revision=revision, state=GroupState.STARTING)
        return group

    def last_pair(self, member: Member) -> bool:
        """Whether no pair would be complete without it, and one is with it."""
        without = self._without(member)
        return _complete(self._ready) and not _complete(without)

    def keeps_capacity(self, member: Member) -> bool:
        """Whether pairs can give as much without it as now, or what both pools' rules leave of the wanted service."""
        return self._capacity(self._without(member)) >= min(self._capacity(self._ready), self._least())

    def _without(self, member: Member) -> Counter[_Kind]:
        return self._ready - Counter({(member.role, member.pairs_with): int(member.ready)})

    def _wanted(self) -> tuple[int, int]:
        prefill, decode = self._pools.get(Role.PREFILL), self._pools.get(Role.DECODE)
        return (prefill.groups, decode.groups) if prefill and decode else (0, 0)

    def _capacity(self, ready: Counter[_Kind]) -> int:
        """In parts of prefill's × decode's wanted number; 0 where one of them is 0, as there is nothing to keep."""
        prefill, decode = self._wanted()
        pairs = {pairs for _, pairs in ready}
        return sum(min(ready[Role.PREFILL, one] * decode, ready[Role.DECODE, one] * prefill) for one in pairs)

    def _least(self) -> int:
        """The capacity that is to be kept, in the same parts."""
        prefill, decode = self._wanted()
        given = {role: pool.rules.max_unavailable for role, pool in self._pools.items()}
        return prefill * decode - max(given.get(Role.PREFILL, 0) * decode, given.get(Role.DECODE, 0) * prefill)


def _complete(ready: Counter[_Kind]) -> bool:
    """Whether some pair is complete, of so many ready groups of each kind."""
    return any(ready[Role.PREFILL, one] > 0 and ready[Role.DECODE, one] > 0 for one in {pairs for _, pairs in ready})
