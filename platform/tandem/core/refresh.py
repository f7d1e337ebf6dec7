"""Other weights for a fleet that goes on serving: which group takes them next, and what to do when one cannot.

Pure: the fleet in, wishes out. One group at a time is told to take the weights (`GroupSpec.weight_version`); its own
state machine (`group.py`) drains it in place, loads them and has them checked. Prefill and decode of different
versions never work together, so the order is such that at every moment some version has a ready group of each role.
If others die meanwhile, the one whose turn it is serves on, as long as it has not begun to load.
Which group is under way is not remembered but seen in the fleet, so a controller that comes back simply goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum

import msgspec
from msgspec.structs import replace

from tandem.core.group_record import SERVING, Weights
from tandem.core.types import Group, GroupSpec, GroupState, Role


class RefreshPhase(StrEnum):
    """How far a refresh is."""

    RUNNING = "running"
    ROLLING_BACK = "rolling_back"
    DONE = "done"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"


OVER = frozenset({RefreshPhase.DONE, RefreshPhase.ROLLED_BACK, RefreshPhase.FAILED})


class Refresh(msgspec.Struct, frozen=True, kw_only=True):
    """One change of a fleet's weights. The store holds the last one under `refresh`."""

    path: str
    """Folder of the new weights on every node."""
    version: str
    old_path: str = ""
    old_version: str = ""
    phase: RefreshPhase = RefreshPhase.RUNNING
    prompt: tuple[int, ...] = ()
    """Token ids of the canary."""
    answer: tuple[int, ...] = ()
    """What the first pair of the new version answered to it, greedily; every later pair must say the same."""
    expect: str = ""
    """The text that the answer must begin with; empty = any."""
    rollback: bool = True
    """After a failure, groups that have the new weights go back to the old ones."""
    allow_pause: bool = False
    """Go on although for a while no pair is ready."""
    drain_s: float = 660.0
    """Seconds that a group may take to be empty."""
    stop: bool = False
    """Somebody wants this phase to end: a refresh that runs goes back, one that goes back ends where it is."""
    group: str = ""
    """The group that takes its turn."""
    note: str = ""
    """What it waits for, in one sentence."""
    failure: str = ""
    """Why it did not succeed, in one sentence."""
    began: float = 0.0
    ended: float = 0.0
    """Unix seconds, as `began`; 0 while it goes on."""

    @property
    def target(self) -> Weights:
        """What the groups should come to have."""
        if self.phase is RefreshPhase.ROLLING_BACK:
            return Weights(self.old_path, self.old_version)
        return Weights(self.path, self.version)


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """A group that is to be told to take these weights."""

    group: str
    weights: Weights


def pause_reason(groups: Iterable[Group]) -> str:
    """Why the fleet cannot take other weights without a pause; empty = it can."""
    ready = [group for group in groups if group.state is GroupState.READY]
    for role in Role:
        count = sum(group.role is role for group in ready)
        if count < 2:
            has = f"only one {role} group is ready" if count else f"no {role} group is ready"
            return f"{has}, and while it takes the weights no pair is complete"
    return ""


def step(
    refresh: Refresh, groups: Sequence[Group], specs: Sequence[GroupSpec], now: float
) -> tuple[Refresh, tuple[Told, ...]]:
    """The refresh as it is now, and which groups to tell. Tell them before the refresh is stored: both may be repeated.

    `now` is in Unix seconds.
    """
    if refresh.phase in OVER:
        return refresh, ()
    wishes = {spec.group: spec for spec in specs if not spec.draining}
    living = [group for group in groups if group.group in wishes]
    if why := _failure(refresh, living, wishes, now):
        return _fail(refresh, living, wishes, why, now)
    target = refresh.target
    under_way = [group for group in living if _told(wishes[group.group], target) and not _has(group, target)]
    if under_way:
        group = under_way[0]
        if not refresh.allow_pause and _is_missed(group, living):
            own = Weights(group.weights_path, group.weight_version)
            note = f"{group.group} has to serve on, since no other pair is complete any more"
            return replace(refresh, group="", note=note), (Told(group=group.group, weights=own),)
        return replace(refresh, group=group.group, note=f"{group.group} is {group.state}: {group.reason}"), ()
    left = [group for group in living if not _has(group, target)]
    if unknown := sorted(wishes.keys() - {group.group for group in living}):
        return replace(refresh, group="", note=f"waits for {', '.join(unknown)} to start"), ()
    if not left:
        return replace(refresh, phase=_END[refresh.phase], group="", note="", ended=now), ()
    able = [group for group in left if _settled(group)]
    safe = [group for group in able if not group.routable or _pair_without(group, living)]
    # Whatever is starting may soon make it safe, so a pause is only for a fleet that has nothing to wait for.
    settled = all(_settled(group) for group in living)
    choice = safe or (able if settled and (refresh.allow_pause or not some_pair(living)) else [])
    if refresh.phase is RefreshPhase.RUNNING and (down := [one for one in living if _fell(one, target)]):
        # Do the new weights start at all? No other group is to depend on them until that is seen.
        return replace(refresh, group=down[0].group, note=f"{down[0].group} is {down[0].state}: {down[0].reason}"), ()
    if not choice:
        return replace(refresh, group="", note=_waits_for(living, able)), ()
    group = min(choice, key=lambda one: _order(one, living, target))
    told = Told(group=group.group, weights=target)
    return replace(refresh, group=group.group, note=f"{group.group} is told to take version {target.version}"), (told,)


# -- failures


def _failure(refresh: Refresh, living: list[Group], wishes: dict[str, GroupSpec], now: float) -> str:
    """Why the refresh cannot go on; empty = it can."""
    target = refresh.target
    for group in living:
        if target.version and group.refused == target.version:
            return f"{group.group} {group.reason or 'could not take the weights; the log of its engine says why'}"
    if refresh.stop:
        return "it was told to stop"
    for group in living:
        drains = group.state is GroupState.DRAINING and not group.loading and group.weight_version != target.version
        if drains and _told(wishes[group.group], target) and now >= group.since + refresh.drain_s:
            return f"{group.group} still had requests after {refresh.drain_s:g} s"
    return ""


def _fail(
    refresh: Refresh, living: list[Group], wishes: dict[str, GroupSpec], why: str, now: float
) -> tuple[Refresh, tuple[Told, ...]]:
    """Whoever does not have the new weights keeps the old ones; whoever has them follows later, if that is wanted.

    On the way back there is nothing to go back to: whoever does not have the old weights yet keeps what it has.
    """
    target = refresh.target
    late = [group for group in living if _told(wishes[group.group], target) and not _has(group, target)]
    over = replace(refresh, phase=RefreshPhase.FAILED, group="", note="", failure=why, ended=now)
    if refresh.phase is RefreshPhase.ROLLING_BACK:
        # One that has begun to load ends that; one that has never served knows no other weights.
        keep = [group for group in late if group.weight_version and not group.loading]
        own = tuple(Told(group=one.group, weights=Weights(one.weights_path, one.weight_version)) for one in keep)
        return replace(over, failure=f"{refresh.failure}; and going back failed: {why}"), own
    old = Weights(refresh.old_path, refresh.old_version)
    told = tuple(Told(group=group.group, weights=old) for group in late)
    if refresh.rollback:
        # Whoever wanted it to stop has got that; said again, it means the way back.
        back = replace(refresh, phase=RefreshPhase.ROLLING_BACK, stop=False, group="", note="", failure=why)
        return back, told
    return over, told


# -- small questions


_END = {RefreshPhase.RUNNING: RefreshPhase.DONE, RefreshPhase.ROLLING_BACK: RefreshPhase.ROLLED_BACK}


def _told(spec: GroupSpec, weights: Weights) -> bool:
    return spec.weight_version == weights.version


def _settled(group: Group) -> bool:
    return group.state in (GroupState.READY, GroupState.CORDONED)


def _has(group: Group, weights: Weights) -> bool:
    """Whether the group serves these weights, or would if it were not cordoned, or starts with them: an epoch begins
    with what the group served last. One that has failed will start, since restarts go on for ever."""
    stays = _settled(group) or group.state is GroupState.STARTING
    return stays and not group.loading and group.weight_version == weights.version


def _fell(group: Group, weights: Weights) -> bool:
    """Whether the group took these weights, has died since, and starts again."""
    return group.state is GroupState.STARTING and _has(group, weights)


def some_pair(groups: Iterable[Group]) -> bool:
    """Whether some weight version and KV format have a ready group of each role."""
    ready = {(group.weight_version, group.kv_format, group.role) for group in groups if group.routable}
    return any((*kind, Role.PREFILL) in ready and (*kind, Role.DECODE) in ready for *kind, _ in ready)


def _pair_without(group: Group, living: list[Group]) -> bool:
    return some_pair(other for other in living if other.group != group.group)


def _is_missed(group: Group, living: list[Group]) -> bool:
    """Whether a group whose turn it is should serve on instead: others died, and it still has what it had."""
    if group.loading or group.state not in SERVING:
        return False
    back = replace(group, state=GroupState.READY)
    others = [other for other in living if other.group != group.group]
    return not some_pair(others) and some_pair([*others, back])


def _order(group: Group, living: list[Group], target: Weights) -> tuple[int, bool, int, str]:
    """The role first that has fewer groups of the new version, so that these soon make a pair; then high numbers."""
    have = sum(other.role is group.role and _has(other, target) for other in living)
    tail = group.group.rpartition("-")[2]
    return have, group.role is not Role.PREFILL, -int(tail) if tail.isdecimal() else 0, group.group


def _waits_for(living: list[Group], able: list[Group]) -> str:
    away = [group.group for group in living if not _settled(group)]
    if away:
        return f"waits for {', '.join(away)} to be ready"
    return f"waits: without {able[0].group} no pair is complete; add a group, or stop the refresh and allow a pause"
