"""Which groups a pool should get and lose now, so that it has the right number of them, all of the right revision.

Pure and level-triggered: `roll` looks at what is there, not at what happened, so it may be called at any time, as often
as wanted, and again after its caller died. What it cannot see in the groups stands in `Memory`. Rules that it keeps:

- never more groups than wanted + `max_surge`, but for a number that was lowered; one that leaves is not counted;
- of ready groups it leaves wanted - `max_unavailable`, the last complete pair, and the pairs' capacity
  (`rollout_pairs.py`), unless 0 groups are wanted: then somebody wants none;
- as long as a revision has not shown that it serves, one group has it, the canary. The others keep the good one;
- the canary serves nobody before it has answered a known prompt rightly (`rollout_check.py`), and counts as nothing;
- a revision that failed is not tried again, until the pool was told to have another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tandem.core.rollout_memory import remember, stalled, why_broken
from tandem.core.rollout_pairs import Ledger
from tandem.core.rollout_stall import in_time
from tandem.core.rollout_status import Blocked, View, tell
from tandem.core.rollout_types import Action, Create, Member, Memory, Plan, Pool, Remove
from tandem.core.types import GroupState, Role

__all__ = ["roll", "templates_to_keep"]


def roll(pools: Sequence[Pool], now: float) -> dict[Role, Plan]:
    """What to do for each pool of a fleet at `now` (Unix seconds); give both pools, in any order.

    Store the memories first, then carry out the actions; a caller that dies in between does no harm.
    """
    pools = sorted(pools, key=lambda pool: list(Role).index(pool.role))
    if len({pool.role for pool in pools}) < len(pools):
        raise ValueError("two pools of one role; give one prefill and one decode pool of the same fleet")
    ledger = Ledger(pools)
    memories = remember(pools, now)
    turns = [_Turn(pool, memory, ledger, now) for pool, memory in zip(pools, memories, strict=True)]
    for turn in turns:
        turn.take()
    return {turn.pool.role: turn.plan() for turn in turns}


def templates_to_keep(memory: Memory) -> frozenset[str]:
    """Revisions whose templates the caller must be able to make groups of."""
    return frozenset({memory.good, memory.target} - {""})


class _Turn:
    """The decisions about one pool."""

    def __init__(self, pool: Pool, memory: Memory, ledger: Ledger, now: float) -> None:
        self.pool = pool
        self.memory = memory
        self.actions: list[Action] = []
        self._ledger = ledger
        self._now = now
        self._most = pool.groups + pool.rules.max_surge
        self._least_ready = pool.groups - pool.rules.max_unavailable
        self._blocked = Blocked.NO
        self._stalled = stalled(pool, memory, now)

    def take(self) -> None:
        """Decide."""
        refused = self.memory.failed == self.pool.revision and self.memory.good != ""
        if not self.pool.groups:
            for one in self._alive():
                self._remove(one, "no group is wanted")
        elif self.pool.paused or self.pool.held or self._stalled or (refused and not self.pool.rules.rollback):
            self._hold()
        elif refused:
            self._converge(self.memory.good)
        elif self.memory.passed or self.memory.good in ("", self.pool.revision):
            self._converge(self.pool.revision)
        else:
            self._canary()

    def plan(self) -> Plan:
        """What was decided."""
        view = View(
            pool=self.pool,
            memory=self.memory,
            alive=tuple(self._alive()),
            partners=tuple(one for role in Role if role is not self.pool.role for one in self._ledger.alive(role)),
            idle=not self.actions,
            blocked=self._blocked,
            stalled=self._stalled,
            now=self._now,
        )
        memory, status = in_time(view, tell(view))
        return Plan(actions=tuple(self.actions), memory=memory, status=status)

    # -- the four ways to go on

    def _converge(self, revision: str) -> None:
        """Towards the right number of groups of a revision that is known to serve, or the first one there is."""
        others = self._others(revision)
        spare = self._spare()
        for one in self._by_loss(others):
            if not one.ready or (spare > 0 and self._pairs_allow(one)):
                spare -= one.ready
                self._remove(one, f"has revision {one.revision}, and {revision} is wanted")
        self._shrink(revision)
        missing = self.pool.groups - len(self._of(revision))
        self._fill(min(missing, self._room(revision)), revision)

    def _canary(self) -> None:
        """One group of the new revision. The others stay as they are; what is lost of them comes back as it was."""
        memory, wanted, revision = self.memory, self.pool.groups, self.pool.revision
        new = self._of(revision)
        waits = bool(new) and all(one.no_room for one in new)
        # A canary that finds no nodes gets those of another group, if one may be missing.
        gives_way = self._most == wanted or (waits and self.pool.rules.max_unavailable > 0)
        others = self._others(revision)
        above = len(others) - (wanted - 1 if gives_way else wanted)
        spare = self._spare()
        for one in self._by_loss(others):
            leftover = one.revision != memory.good and not one.ready
            if leftover or (above > 0 and (not one.ready or (spare > 0 and self._pairs_allow(one)))):
                above, spare = above - 1, spare - one.ready
                self._remove(one, f"makes room for the first group of revision {revision}")
        if not new:
            self._fill(min(1, self._most - self._count()), revision, canary=True)
        if not memory.dark:
            missing = max(self._least_ready - len(self._others(revision)), wanted - self._count())
            self._fill(min(missing, self._most - self._count()), memory.good)

    def _hold(self) -> None:
        """The right number, and no change: a group that is lost comes back with the revision known to be good."""
        own = self._own_revision()
        self._shrink(own)
        good = [one for one in self._alive() if not self._is_doubtful(one)]
        self._fill(min(self.pool.groups - len(good), self._room(own)), own)

    def _shrink(self, keep: str) -> None:
        """Down to as many as may be, first those that have the least to lose. `keep`: the revision to end with."""
        others = len(self._others(keep))
        for one in self._by_loss(self._alive(), keep):
            above = self._count() - (self._most if others else self.pool.groups)
            if above > 0 and (not one.ready or self._pairs_allow(one)):
                others -= one.revision != keep
                self._remove(one, f"{_count(self.pool.groups)} wanted")

    def _room(self, revision: str) -> int:
        """For so many further groups; surge is for a change, so not when all have this revision."""
        return (self._most if self._others(revision) else self.pool.groups) - self._count()

    # -- small steps

    def _fill(self, count: int, revision: str, *, canary: bool = False) -> None:
        for _ in range(count):
            group = self._ledger.create(self.pool.role, revision)
            self.actions.append(Create(group=group, revision=revision, canary=canary))

    def _remove(self, member: Member, reason: str) -> None:
        self._ledger.remove(member)
        self.actions.append(Remove(group=member.group, reason=reason))

    # -- small questions

    def _alive(self) -> list[Member]:
        return self._ledger.alive(self.pool.role)

    def _of(self, revision: str) -> list[Member]:
        return [one for one in self._alive() if one.revision == revision]

    def _others(self, revision: str) -> list[Member]:
        return [one for one in self._alive() if one.revision != revision]

    def _count(self) -> int:
        return self._ledger.count(self.pool.role)

    def _spare(self) -> int:
        """So many ready groups may be replaced now, as far as this pool goes."""
        return self._ledger.ready(self.pool.role) - self._least_ready

    def _pairs_allow(self, member: Member) -> bool:
        if self._ledger.last_pair(member):
            self._blocked = Blocked.LAST_PAIR
            return False
        if not self._ledger.keeps_capacity(member):
            self._blocked = Blocked.PARTNERS
            return False
        return True

    def _own_revision(self) -> str:
        """Of groups that come back while nothing may change."""
        memory, wanted = self.memory, self.pool.revision
        through = memory.passed and memory.failed != wanted and self._count() > 0 and not self._others(wanted)
        if memory.good:
            return wanted if through else memory.good
        counts = Counter(one.revision for one in self._alive())
        return min(counts, key=lambda revision: (-counts[revision], revision), default=self.pool.revision)

    def _is_doubtful(self, member: Member) -> bool:
        """Whether it is of a change that holds, and not sure to serve: it takes no good group's place."""
        if member.revision != self.pool.revision or self.memory.good in ("", member.revision):
            return False
        return not self.memory.passed or bool(why_broken(member, self.pool, self._now))

    def _by_loss(self, members: list[Member], keep: str = "") -> list[Member]:
        """Those first that have the least to lose. `keep`: the revision to end with; "" = the good one."""
        keep = keep or self.memory.good

        def loss(one: Member) -> tuple[int, bool, bool, bool, int, int, str]:
            works = one.state not in (GroupState.STARTING, GroupState.FAILED, GroupState.GONE)
            broken = bool(why_broken(one, self.pool, self._now)) or one.lost or one.state is GroupState.FAILED
            state = 0 if broken else 1 + works
            current = one.revision == self.pool.revision
            tail = one.group.rpartition("-")[2]
            number = int(tail) if tail.isdecimal() else 0
            return state, one.revision == keep, current, one.ready, one.load, -number, one.group

        return sorted(members, key=loss)


def _count(groups: int) -> str:
    return "1 group is" if groups == 1 else f"{groups} groups are"
