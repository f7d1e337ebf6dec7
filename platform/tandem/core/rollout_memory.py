"""What a rollout knows after a look at the groups: has the new revision shown that it serves, or that it does not?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from msgspec.structs import replace

from tandem.core.rollout_pairs import paired_since
from tandem.core.rollout_types import Member, Memory, Pool
from tandem.core.types import GroupState


def remember(pools: Sequence[Pool], now: float) -> list[Memory]:
    """The pools' memories as of now, in the same order. A pool's partner is the other one."""
    seen = [_look(pool, _partner(pool, pools), now) for pool in pools]
    coupled = [
        _go_along(pool, memory, _partner(pool, pools), [*seen], [*pools], now)
        for pool, memory in zip(pools, seen, strict=True)
    ]
    done = [_is_done(pool, memory, _partner(pool, pools)) for pool, memory in zip(pools, coupled, strict=True)]
    return [
        _proven(
            pool,
            replace(memory, good=pool.revision, good_format=pool.kv_format, good_weights=pool.weights, dark=False)
            if done[index] and _in_step(pool, memory, index, coupled, done)
            else memory,
        )
        for index, (pool, memory) in enumerate(zip(pools, coupled, strict=True))
    ]


def why_broken(member: Member, pool: Pool, now: float) -> str:
    """Why a group will not do, in one sentence; empty = it may. A lost node is no fault of its revision."""
    rules = pool.rules
    if member.canary_failed:
        return f"{member.group} failed the known prompt: {member.canary_failed}"
    if member.ready or member.lost or member.state not in (GroupState.STARTING, GroupState.FAILED):
        return ""
    why = f": {member.reason}" if member.reason else ""
    if member.failures >= rules.failures:
        return f"{member.group} failed {member.failures} times in a row{why}"
    if member.placed is not None and now >= member.placed + rules.progress_s:
        return f"{member.group} is not ready {rules.progress_s:g} s after it got its nodes{why}"
    return ""


def stalled(pool: Pool, memory: Memory, now: float) -> str:
    """Why a change does not go on although its canary has passed: another new group will not do. Empty = it goes on.

    A group that has served and restarts is not held to `progress_s`: it only counts when it fails again and again.
    """
    if pool.revision in (memory.good, memory.failed) or not memory.passed:
        return ""
    new = [one for one in alive(pool) if one.revision == pool.revision]
    return next((why for one in new if (why := why_broken(_patient(one), pool, now))), "")


def alive(pool: Pool) -> list[Member]:
    """Its groups that do not leave."""
    return [member for member in pool.members if not member.leaving]


# -- one pool


def _look(pool: Pool, partner: Pool | None, now: float) -> Memory:
    memory = pool.memory
    if memory.target != pool.revision:
        memory = _begin(pool, memory, now)
    memory = replace(memory, target_weights=pool.weights)  # an older one had not noted them
    if memory.failed_with and (partner is None or partner.revision != memory.failed_with):
        memory = replace(memory, failed="", failure="", failed_at=0.0, failed_with="", passed=False)
    if not memory.good:
        memory = _adopt(pool, memory)
    if not pool.groups and memory.good != pool.revision and not memory.passed:
        memory = replace(memory, dark=True)
    if not memory.passed and _serves(pool, partner, now):
        memory = replace(memory, passed=True, dark=False)
    if why := _failure(pool, memory, now):
        memory = replace(memory, failed=pool.revision, failure=why, failed_at=now, dark=False)
    return memory


def _proven(pool: Pool, memory: Memory) -> Memory:
    """Of what is there, the revisions that have shown at some time that they serve."""
    there = {one.revision for one in pool.members} & {*memory.proven}
    known = there | {memory.good} | ({memory.target} if memory.passed else set())
    return replace(memory, proven=tuple(sorted(known - {""})))


def _begin(pool: Pool, memory: Memory, now: float) -> Memory:
    """A change to another revision. What has passed its canary meanwhile is the one to go back to."""
    if memory.passed and memory.target != memory.failed:
        memory = replace(
            memory, good=memory.target, good_format=memory.target_format, good_weights=memory.target_weights
        )
    return replace(
        memory,
        target=pool.revision,
        target_format=pool.kv_format,
        passed=False,
        dark=not alive(pool),
        began=now,
    )


def _adopt(pool: Pool, memory: Memory) -> Memory:
    """Groups of another revision have served, and nothing is remembered: theirs is the good one."""
    others = [one for one in alive(pool) if one.revision != pool.revision and (one.served or one.ready)]
    if not others:
        return memory
    counts = Counter(one.revision for one in others)
    good = min(counts, key=lambda revision: (-counts[revision], revision))
    like = next(one for one in others if one.revision == good)
    return replace(memory, good=good, good_format=like.kv_format, good_weights=like.weights, dark=False)


def _serves(pool: Pool, partner: Pool | None, now: float) -> bool:
    """Whether a group of the wanted revision has served as long as a canary must, in a pair where there can be one."""
    for one in alive(pool):
        if one.revision != pool.revision or not one.ready or not one.checked:
            continue
        alone = partner is None or not partner.groups
        since = one.ready_since if partner is None or alone else paired_since(one, partner.members)
        if since is not None and now >= since + pool.rules.canary_s:
            return True
    return False


def _failure(pool: Pool, memory: Memory, now: float) -> str:
    """Why the wanted revision will not do; empty = it may, or there is nothing else to go back to."""
    if memory.good in ("", pool.revision) or memory.failed == pool.revision:
        return ""
    new = [one for one in alive(pool) if one.revision == pool.revision]
    if wrong := [one for one in new if one.canary_failed]:
        return why_broken(wrong[0], pool, now)
    if memory.passed and any(one.ready for one in new):
        return ""
    looked = [_patient(one) for one in new] if memory.passed else new
    return next((why for one in looked if (why := why_broken(one, pool, now))), "")


def _patient(member: Member) -> Member:
    return replace(member, placed=None) if member.served else member


# -- two pools


def _partner(pool: Pool, pools: Sequence[Pool]) -> Pool | None:
    return next((other for other in pools if other.role is not pool.role), None)


def _go_along(
    pool: Pool, memory: Memory, partner: Pool | None, memories: list[Memory], pools: list[Pool], now: float
) -> Memory:
    """If the other pool goes back to what the wanted revision does not pair with, this one goes back with it."""
    if partner is None or memory.good in ("", pool.revision) or memory.failed == pool.revision:
        return memory
    other = memories[pools.index(partner)]
    goes_back = other.failed == partner.revision and partner.rules.rollback
    to, own = (other.good_format, other.good_weights), (memory.good_format, memory.good_weights)
    if not goes_back or _alike(to, (pool.kv_format, pool.weights)) or not _alike(to, own):
        return memory
    why = f"the {partner.role} pool went back to revision {other.good}, which does not pair with it ({other.failure})"
    return replace(memory, failed=pool.revision, failure=why, failed_at=now, failed_with=partner.revision, dark=False)


def _is_done(pool: Pool, memory: Memory, partner: Pool | None) -> bool:
    """Whether the wanted revision has become the good one: it serves, it is all there is, and it pairs."""
    groups = alive(pool)
    if memory.failed == pool.revision or not memory.passed or len(groups) != pool.groups:
        return False
    if any(one.revision != pool.revision or not one.ready for one in groups):
        return False
    wanted = (pool.kv_format, pool.weights)
    return partner is None or all(_alike((one.kv_format, one.weights), wanted) for one in alive(partner))


def _in_step(pool: Pool, memory: Memory, index: int, memories: list[Memory], done: list[bool]) -> bool:
    """A change of KV format or weights is over for both pools at once: as long as one may go back, both can."""
    wanted = (pool.kv_format, pool.weights)
    if memory.good == "" or _alike((memory.good_format, memory.good_weights), wanted):
        return True
    others = [at for at in range(len(memories)) if at != index]
    return all(done[at] or _alike((memories[at].good_format, memories[at].good_weights), wanted) for at in others)


def _alike(one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether revisions of these KV formats and weights pair. Weights that nobody has noted are taken for the same."""
    return one[0] == other[0] and (one[1] == other[1] or not (one[1] and other[1]))
