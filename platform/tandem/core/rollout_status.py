"""How a rollout stands, in a phase, a reason and a sentence that a person understands."""

from __future__ import annotations

from enum import Enum, auto

import msgspec

from tandem.core.rollout_check import is_waiting
from tandem.core.rollout_memory import why_broken
from tandem.core.rollout_pairs import paired_since
from tandem.core.rollout_types import Member, Memory, Phase, Pool, Status
from tandem.core.types import GroupState, Role


class Blocked(Enum):
    """Why a ready group could not be replaced although its own pool could spare it."""

    NO = auto()
    LAST_PAIR = auto()
    """It is of the only complete pair."""
    PARTNERS = auto()
    """The pairs that are left could not serve enough."""


class View(msgspec.Struct, frozen=True, kw_only=True):
    """A pool after its decisions."""

    pool: Pool
    memory: Memory
    alive: tuple[Member, ...]
    """Groups that do not leave, with those that are being made."""
    partners: tuple[Member, ...]
    """The same of the other role."""
    idle: bool
    """Nothing is to be done now."""
    blocked: Blocked
    stalled: str
    now: float

    @property
    def new(self) -> list[Member]:
        """Groups of the wanted revision."""
        return [one for one in self.alive if one.revision == self.pool.revision]

    @property
    def pending(self) -> list[Member]:
        """Groups that find no nodes."""
        return [one for one in self.alive if one.no_room]


def first_new(view: View) -> Member | None:
    """The group that shows whether the wanted revision serves; None = there is none yet."""
    return min(view.new, key=lambda one: (not one.ready, one.group), default=None)


def tell(view: View) -> Status:
    """The status of a pool."""
    phase, reason, message = _verdict(view)
    ready = sum(one.ready for one in view.alive)
    return Status(phase=phase, reason=reason, message=message, updated=len(view.new), ready=ready)


def _verdict(view: View) -> tuple[Phase, str, str]:
    pool, memory = view.pool, view.memory
    if not pool.groups:
        return Phase.COMPLETE, "NoGroupWanted", "no group is wanted"
    if memory.failed == pool.revision and memory.good:
        return _failed(view)
    right_number = len(view.alive) == pool.groups and len(view.new) == pool.groups
    shown = memory.passed or memory.good in ("", pool.revision)
    if right_number and shown and all(one.ready for one in view.alive):
        return Phase.COMPLETE, "AllReady", f"{_groups(pool.groups)} of revision {pool.revision}, all ready"
    changes = len(view.new) < len(view.alive) or memory.good not in ("", pool.revision)
    if pool.paused or pool.held:
        if changes:
            why = "the pool is paused" if pool.paused else pool.held
            message = f"{why}; {_share(view)}, and it goes on when that is over"
            return Phase.STOPPED, "Paused" if pool.paused else "Held", message
        return _start(view)
    if not changes or not memory.good:
        return _start(view)
    if view.stalled:
        message = f"{_share(view)}; {view.stalled}. The change goes on when that group is ready or gone"
        return Phase.STOPPED, "GroupFailed", message
    if view.blocked is Blocked.LAST_PAIR and view.idle and all(one.ready for one in view.alive):
        return Phase.STOPPED, "WouldPause", _would_pause(view)
    return _change(view)


def _failed(view: View) -> tuple[Phase, str, str]:
    pool, memory = view.pool, view.memory
    reason = "PartnerFailed" if memory.failed_with else "RevisionFailed"
    what = f"revision {pool.revision} failed: {memory.failure}"
    if not pool.rules.rollback:
        stays = f"nothing more is changed; {_share(view)}"
        return Phase.STOPPED, reason, f"{what}; {stays}. Change the template to go on"
    back = [one for one in view.alive if one.revision == memory.good]
    if len(back) == len(view.alive) == pool.groups:
        ready = sum(one.ready for one in back)
        has = f"{_groups(pool.groups)} of revision {memory.good} again, {ready} ready"
        return Phase.ROLLED_BACK, reason, f"{what}; {has}. It is not tried again: change the template to go on"
    if pool.paused or pool.held:
        return Phase.STOPPED, "Paused" if pool.paused else "Held", f"{what}; going back waits: {pool.held or 'paused'}"
    has = f"{len(back)} of {pool.groups} groups have revision {memory.good} again"
    return Phase.PROGRESSING, "RollingBack", f"{what}; going back: {has}{_why_waiting(view)}"


def _start(view: View) -> tuple[Phase, str, str]:
    """The right revision, not yet the right number of ready groups."""
    pool = view.pool
    ready = sum(one.ready for one in view.alive)
    message = f"{ready} of {_groups(pool.groups)} ready"
    if broken := [why for one in view.alive if (why := why_broken(one, pool, view.now))]:
        return Phase.STOPPED, "GroupFailed", f"{message}; {broken[0]}"
    if view.pending:
        return Phase.PROGRESSING, "WaitingForNodes", f"{message}; {_needs_nodes(view)}"
    return Phase.PROGRESSING, "Starting", f"{message}{_why_waiting(view)}"


def _change(view: View) -> tuple[Phase, str, str]:
    pool, memory = view.pool, view.memory
    pending = [one for one in view.pending if one.revision == pool.revision]
    if pending:
        return Phase.PROGRESSING, "WaitingForNodes", f"{_share(view)}; {_needs_nodes(view)}"
    lonely = [one for one in view.new if _is_lonely(one, view)]
    if lonely and view.idle and (not memory.passed or view.blocked is Blocked.PARTNERS):
        return Phase.PROGRESSING, "WaitingForPair", f"{_share(view)}; {_lonely(lonely[0], view)}"
    if not memory.passed:
        return Phase.PROGRESSING, "Canary", _canary(view)
    if view.blocked is Blocked.PARTNERS and view.idle:
        other = _other(pool.role)
        return Phase.PROGRESSING, "WaitingForPair", f"{_share(view)}; the rest follows as {other} groups change too"
    return Phase.PROGRESSING, "Rolling", f"{_share(view)}{_why_waiting(view)}"


# -- sentences


def _canary(view: View) -> str:
    canary = first_new(view)
    revision, most = view.pool.revision, view.pool.rules.canary_s
    if canary is None:
        return f"the first group of revision {revision} waits until {_waiting(view) or 'another group can be spared'}"
    first = f"{canary.group} is the first group of revision {revision}"
    if is_waiting(canary, view.memory):
        return f"{first}; it serves nobody until it has answered a known prompt{_detail(canary)}"
    if not canary.ready:
        return f"{first}: {canary.state}{_detail(canary)}"
    since = canary.ready_since
    for_s = max(0.0, view.now - since) if since is not None else 0.0
    if not canary.checked and for_s >= most:
        return f"{first}, and has not answered the known prompt yet"
    return f"{first}; it must serve for {most:g} s before others follow"


def _share(view: View) -> str:
    return f"{len(view.new)} of {len(view.alive)} groups have revision {view.pool.revision}"


def _waiting(view: View) -> str:
    late = [one for one in view.alive if not one.ready]
    return f"{late[0].group} is ready ({late[0].state}{_detail(late[0])})" if late else ""


def _why_waiting(view: View) -> str:
    waits = _waiting(view)
    return f"; waits until {waits}" if waits else ""


def _detail(member: Member) -> str:
    return f": {member.reason}" if member.reason else ""


def _needs_nodes(view: View) -> str:
    pool = view.pool
    each = "1 GPU" if pool.gpus_per_node == 1 else f"{pool.gpus_per_node} GPUs"
    nodes = "1 node" if pool.nodes == 1 else f"{pool.nodes} nodes"
    text = f"{view.pending[0].group} waits for {nodes} with {each} each"
    if pool.rules.max_unavailable == 0 and len(view.alive) > pool.groups:
        text += "; free some, or allow maxUnavailable 1, and it takes another group's"
    return text


def _is_lonely(member: Member, view: View) -> bool:
    """Whether it is up, and no partner is: to serve with or, before that, to be asked the known prompt with."""
    if is_waiting(member, view.memory):
        up = (GroupState.READY, GroupState.CORDONED)
        return not any(one.state in up and one.pairs_with == member.pairs_with for one in view.partners)
    return member.ready and paired_since(member, view.partners) is None


def _lonely(member: Member, view: View) -> str:
    weights, kv_format = member.pairs_with
    what = f'KV format "{kv_format}" and weights "{weights}"'
    return f"{member.group} is ready, but no ready {_other(view.pool.role)} group has its {what}, so no pair can use it"


def _would_pause(view: View) -> str:
    return (
        f"{_share(view)}; without its ready group no pair is complete, and no group may be added to it: "
        "set maxSurge to 1, or scale to 0 and back, which pauses the service"
    )


def _other(role: Role) -> Role:
    return Role.DECODE if role is Role.PREFILL else Role.PREFILL


def _groups(number: int) -> str:
    return "1 group" if number == 1 else f"{number} groups"
