"""The life of one expert-parallel group as a pure state machine: events in, a new record and actions out.

Rules that it keeps:
- A group lives and dies as a whole: the first rank that dies fails the group, and all of it restarts at epoch + 1.
- Ranks of a new epoch start only after every rank of the old one has stopped.
- What an old epoch still says changes nothing.
- Restarts go on for ever, at growing intervals, and the group always says why it is not ready.
- A group that leaves keeps its streams until the last room is closed or the deadline has passed; one that was never
  ready, or is told to go at once, does not wait.

The caller stores each new record before it carries out the actions: an epoch that has run is then never used again,
also when the caller dies in between.
"""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from tandem.core.group_events import (
    Action,
    Adopted,
    Desired,
    Event,
    Forget,
    Place,
    Placed,
    RankDied,
    RankReady,
    RankStarted,
    Release,
    Released,
    RoomsClosed,
    Service,
    StartFailed,
    StartRanks,
    Stopped,
    StopRanks,
    Waiting,
    WatchRooms,
)
from tandem.core.types import Group, GroupSpec, GroupState, Rank, RankState

SERVING = frozenset({GroupState.READY, GroupState.CORDONED, GroupState.DRAINING})
"""States in which requests may still run."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds."""

    start: float = 300.0
    """From its placement, a group that is not ready by then is restarted."""
    settle: float = 1.0
    """A cordon is known to every gateway by then, so an empty group stays empty."""
    stable: float = 60.0
    """A group that was ready for so long starts again without delay when it fails."""
    backoff: float = 1.0
    """Delay before the second restart in a row; it doubles with each further one. The first one is immediate."""
    backoff_most: float = 60.0

    def delay(self, failures: int) -> float:
        """Seconds to wait before the restart that follows the n-th failure in a row."""
        if failures <= 1:
            return 0.0
        return float(min(self.backoff_most, self.backoff * 2.0 ** min(failures - 2, 30)))


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A group and what its state machine remembers about it. Only `group` is stored; `adopt` makes do with that."""

    group: Group
    spec: GroupSpec | None
    policy: Policy
    service: Service | None = None
    live: int = 0
    """Epoch whose ranks may be running; 0 = none."""
    begun: bool = False
    """StartRanks was asked for in this epoch."""
    gpus: int = 0
    """GPUs per node that this epoch was placed with."""
    shape: tuple[int, int] | None = None
    """Nodes and GPUs per node of the placement that is held or asked for."""
    stopping: bool = False
    releasing: bool = False
    watched: bool = False
    """WatchRooms was asked for in this drain."""
    empty: bool = False
    """RoomsClosed came in this drain."""
    forgotten: bool = False
    failures: int = 0
    """In a row."""
    cause: str = ""
    """Of the failure that it has not recovered from yet."""
    retry_at: float = 0.0
    start_by: float | None = None
    ready_since: float | None = None


def new(spec: GroupSpec, *, policy: Policy, epoch: int = 0) -> Record:
    """The record of a group that does not exist yet. `epoch`: the last one that a group of this name had."""
    return Record(
        group=Group(group=spec.group, role=spec.role, epoch=epoch, state=GroupState.GONE), spec=None, policy=policy
    )


def adopt(group: Group, spec: GroupSpec | None, *, policy: Policy, now: float) -> Record:
    """The record of a group found in the store by a controller that knows nothing else about it.

    Follow with `Adopted` when all its ranks are found alive, with `RankDied` when not, with `Tick` when it is neither
    starting nor serving.
    """
    gone = group.state is GroupState.GONE
    service = Service(
        url=group.url,
        bootstrap_host=group.bootstrap_host,
        bootstrap_port=group.bootstrap_port,
        dp_size=group.dp_size,
        weight_version=group.weight_version,
    )
    gpus = spec.gpus_per_node if spec else 1
    return Record(
        group=group,
        spec=spec,
        policy=policy,
        service=service if group.url else None,
        live=0 if gone else group.epoch,
        begun=True,
        gpus=gpus,
        # Whatever the state, a placement may be there and must be given back in the end.
        shape=(len(group.ranks), gpus) if group.ranks else None,
        start_by=now + policy.start if group.state is GroupState.STARTING else None,
        ready_since=group.since if group.state in SERVING else None,
    )


def step(record: Record, event: Event, now: float) -> tuple[Record, tuple[Action, ...]]:
    """Take one event; returns the new record and what to do. `now` is in Unix seconds."""
    taken = _take(record, event, now)
    if taken is None:
        return record, ()
    actions: list[Action] = []
    return _advance(taken, now, actions), tuple(actions)


def wake_at(record: Record) -> float | None:
    """When to send the next Tick (Unix seconds), None = no need."""
    group, spec = record.group, record.spec
    if record.stopping or record.releasing:
        return None
    if group.state is GroupState.STARTING:
        return record.start_by
    if group.state is GroupState.FAILED:
        return record.retry_at
    if group.state in SERVING and spec is not None and spec.draining:
        settled = group.since + record.policy.settle
        return min(spec.drain_deadline, settled) if group.state is GroupState.CORDONED else spec.drain_deadline
    return None


# -- what an event says


def _take(record: Record, event: Event, now: float) -> Record | None:
    """The record with the event's news in it; None when the event is not about what is going on now."""
    group = record.group
    epoch = getattr(event, "epoch", group.epoch)
    if isinstance(event, Stopped):
        if not record.stopping or epoch != record.live:
            return None
        return replace(record, live=0, stopping=False, start_by=None, ready_since=None, group=_silent(group))
    if epoch != group.epoch:
        return None
    match event:
        case Desired(spec=spec):
            return replace(record, spec=spec)
        case Released():
            return replace(record, shape=None, releasing=False) if record.releasing else None
        case RoomsClosed():
            return replace(record, empty=True) if group.state is GroupState.DRAINING else None
        case RankDied(rank=rank, reason=reason) if record.live:
            group = _put_rank(group, replace(group.ranks[rank], state=RankState.DEAD, detail=reason))
            return _fail(replace(record, group=group), f"rank {rank} {reason}", now)
        case StartFailed(reason=reason):
            return _fail(record, reason, now)
        case Adopted(ranks=ranks) if record.live:
            return _adopted(record, ranks, now)
        case Placed() | Waiting() | RankStarted() | RankReady():
            starting = group.state is GroupState.STARTING and not record.stopping and not record.releasing
            return _started(record, event, now) if starting else None
    return record


def _started(record: Record, event: Placed | Waiting | RankStarted | RankReady, now: float) -> Record | None:
    """News of a group that is starting."""
    group = record.group
    match event:
        case Waiting(reason=reason) if record.live == 0:
            return replace(record, group=replace(group, reason=reason))
        case Placed() if record.live == 0:
            group = replace(group, reason=_why_again(record))
            return replace(record, group=group, start_by=now + record.policy.start, live=group.epoch)
        case RankStarted(rank=rank) if group.ranks[rank.rank].state is RankState.PENDING:
            return replace(record, group=_put_rank(group, rank))
        case RankReady(rank=number, service=service) if record.live:
            group = _put_rank(group, replace(group.ranks[number], state=RankState.READY, detail=""))
            return replace(record, group=group, service=service or record.service)
    return None


def _fail(record: Record, reason: str, now: float) -> Record:
    """The first failure of an epoch counts; what follows is its echo."""
    if record.stopping or record.releasing or record.group.state in (GroupState.FAILED, GroupState.GONE):
        return record
    stable = record.ready_since is not None and now - record.ready_since >= record.policy.stable
    failures = 1 if stable else record.failures + 1
    delay = record.policy.delay(failures)
    then = ""
    if record.spec is not None and not record.spec.draining:
        wait = f" in {delay:.0f} s" if delay else ""
        then = f"; restarts at epoch {record.group.epoch + 1}{wait} (failure {failures} in a row)"
    group = _enter(record.group, GroupState.FAILED, now, reason + then)
    return replace(record, group=group, cause=reason, failures=failures, retry_at=now + delay, start_by=None)


def _adopted(record: Record, ranks: tuple[Rank, ...], now: float) -> Record:
    record = replace(record, group=replace(record.group, ranks=ranks))
    if record.group.state in SERVING and not _all_ready(record.group):
        return _fail(record, "a rank lost its readiness while the controller was away", now)
    return record


# -- what follows from it


def _advance(record: Record, now: float, actions: list[Action]) -> Record:
    """Bring the group closer to what it should be, as far as it can go without further news."""
    if record.live and not record.stopping:
        record = _run(record, now, actions)
    if record.live == 0 and not record.releasing:
        record = _rest(record, now, actions)
    return record


def _run(record: Record, now: float, actions: list[Action]) -> Record:
    """Ranks may run: let the group start, serve, be cordoned and drain, or have it stopped."""
    if record.group.state is GroupState.STARTING:
        record = _start(record, now)
    if record.group.state is not GroupState.FAILED:
        if reason := _reason_to_stop(record, now):
            group = replace(_enter(record.group, GroupState.DRAINING, now, reason), reason=reason)
            record = replace(record, group=group)
        elif record.group.state is GroupState.STARTING:
            if not record.begun:
                actions.append(StartRanks(epoch=record.live, spec=_wanted(record)))
            return replace(record, begun=True)
        else:
            return _serve(record, now, actions)
    actions.append(StopRanks(epoch=record.live))
    return replace(record, stopping=True)


def _start(record: Record, now: float) -> Record:
    """A starting group becomes ready when every rank is, or fails when it takes too long."""
    group, service = record.group, record.service
    if service is not None and _all_ready(group):
        group = _reached(_enter(group, GroupState.READY, now, ""), service)
        return replace(record, group=group, cause="", ready_since=now)
    if record.start_by is not None and now >= record.start_by:
        late = ", ".join(str(rank.rank) for rank in group.ranks if rank.state is not RankState.READY)
        return _fail(record, f"was not ready after {record.policy.start:.0f} s: waited for rank {late}", now)
    return record


def _serve(record: Record, now: float, actions: list[Action]) -> Record:
    """Give a serving group the state that is asked for; a drain begins with a cordon that every gateway has seen."""
    spec, group = _wanted(record), record.group
    if not spec.draining:
        state, reason = (GroupState.CORDONED, "cordoned") if spec.cordoned else (GroupState.READY, "")
        return replace(record, group=_enter(group, state, now, reason), watched=False, empty=False)
    if group.state is GroupState.READY:
        group = _enter(group, GroupState.CORDONED, now, "is about to drain")
    if group.state is GroupState.CORDONED and now >= group.since + record.policy.settle:
        group = _enter(group, GroupState.DRAINING, now, "waits for its last room to close")
    if group.state is GroupState.DRAINING and not record.watched:
        actions.append(WatchRooms(epoch=group.epoch))
        record = replace(record, watched=True)
    return replace(record, group=group)


def _rest(record: Record, now: float, actions: list[Action]) -> Record:
    """No rank runs: start the next epoch, or leave."""
    group, spec = record.group, record.spec
    leaves = spec is None or spec.draining
    if spec is not None and not leaves:
        shape = (spec.nodes, spec.gpus_per_node)
        if group.state is GroupState.STARTING and record.shape == shape and group.role is spec.role:
            return record
        if group.state is GroupState.FAILED and now < record.retry_at:
            return record
        if record.shape in (None, shape):
            return _next_epoch(record, spec, now, actions)
    if record.shape is not None:
        if group.state is GroupState.STARTING:
            group = _enter(group, GroupState.DRAINING, now, "told to stop" if leaves else "takes another shape")
        actions.append(Release())
        return replace(record, releasing=True, group=group)
    if not record.forgotten:
        actions.append(Forget(epoch=group.epoch))
    return replace(record, group=_enter(group, GroupState.GONE, now, group.reason), forgotten=True)


def _next_epoch(record: Record, spec: GroupSpec, now: float, actions: list[Action]) -> Record:
    last = record.group
    group = Group(
        group=spec.group,
        role=spec.role,
        epoch=last.epoch + 1,
        state=GroupState.STARTING,
        reason=_why_again(record),
        since=now,
        ranks=tuple(Rank(rank=rank) for rank in range(spec.nodes)),
    )
    actions.append(Place(epoch=group.epoch, spec=spec))
    return Record(
        group=group,
        spec=spec,
        policy=record.policy,
        gpus=spec.gpus_per_node,
        shape=(spec.nodes, spec.gpus_per_node),
        failures=record.failures,
        cause=record.cause,
    )


# -- small questions and changes


def _reason_to_stop(record: Record, now: float) -> str:
    """Why a group whose ranks run should not go on; empty = it should."""
    spec, group = record.spec, record.group
    if spec is None:
        return "told to stop"
    if (spec.role, spec.nodes, spec.gpus_per_node) != (group.role, len(group.ranks), record.gpus):
        return "takes another shape"
    if not spec.draining:
        return ""
    if group.state is GroupState.STARTING:
        return "told to leave before it was ready"
    if record.empty:
        return "drained"
    return "stopped at its drain deadline" if now >= spec.drain_deadline else ""


def _why_again(record: Record) -> str:
    """Why a group that is starting does so, if not for the first time."""
    return f"restarts, since {record.cause}" if record.cause else ""


def _wanted(record: Record) -> GroupSpec:
    assert record.spec is not None, "a group that nobody wants is stopped before this"
    return record.spec


def _all_ready(group: Group) -> bool:
    return all(rank.state is RankState.READY for rank in group.ranks)


def _enter(group: Group, state: GroupState, now: float, reason: str) -> Group:
    return group if group.state is state else replace(group, state=state, since=now, reason=reason)


def _reached(group: Group, service: Service) -> Group:
    return replace(
        group,
        url=service.url,
        bootstrap_host=service.bootstrap_host,
        bootstrap_port=service.bootstrap_port,
        dp_size=service.dp_size,
        weight_version=service.weight_version,
    )


def _silent(group: Group) -> Group:
    """A group none of whose ranks runs any more: nothing of it can be reached."""
    ranks = tuple(replace(rank, state=RankState.DEAD, detail=rank.detail or "stopped") for rank in group.ranks)
    return replace(group, ranks=ranks, url="", bootstrap_host="", bootstrap_port=0)


def _put_rank(group: Group, rank: Rank) -> Group:
    return replace(group, ranks=(*group.ranks[: rank.rank], rank, *group.ranks[rank.rank + 1 :]))
