"""The life of one expert-parallel group as a pure state machine: events in, a new record and actions out.

Rules that it keeps:
- A group lives and dies as a whole: the first rank that dies fails the group, and all of it restarts at epoch + 1.
- Ranks of a new epoch start only after every rank of the old one has stopped.
- What an old epoch still says changes nothing.
- Restarts go on for ever, at growing intervals, and the group always says why it is not ready.
- A group that leaves keeps its streams until the last room is closed or the deadline has passed; one that was never
  ready, or is told to go at once, does not wait. Shortly before the deadline gateways move its streams elsewhere.
- Other weights are taken in place, by a group that is empty: cordon, drain, load, ready again at the same epoch. A
  group that cannot take them starts again with those that it had, and does not try them again until told other ones.

The caller stores each new record before it carries out the actions: an epoch that has run is then never used again,
also when the caller dies in between.
"""

from __future__ import annotations

from msgspec.structs import replace

from tandem.core.group_events import (
    Action,
    Adopted,
    Desired,
    Event,
    Forget,
    LoadWeights,
    Place,
    Placed,
    RankDied,
    RankReady,
    RankStarted,
    Release,
    Released,
    RoomsClosed,
    StartFailed,
    StartRanks,
    Stopped,
    StopRanks,
    Waiting,
    WatchRooms,
    WeightsFailed,
    WeightsLoaded,
)
from tandem.core.group_record import (
    SERVING,
    Policy,
    Record,
    adopt,
    all_ready,
    enter,
    new,
    put_rank,
    reached,
    silent,
    up_to_date,
    wake_at,
    wanted_weights,
    with_own_weights,
)
from tandem.core.types import Group, GroupSpec, GroupState, Rank, RankState

__all__ = ["SERVING", "Policy", "Record", "adopt", "new", "step", "wake_at", "with_own_weights"]


def step(record: Record, event: Event, now: float) -> tuple[Record, tuple[Action, ...]]:
    """Take one event; returns the new record and what to do. `now` is in Unix seconds."""
    taken = _take(record, event, now)
    if taken is None:
        return record, ()
    actions: list[Action] = []
    return _advance(taken, now, actions), tuple(actions)


# -- what an event says


def _take(record: Record, event: Event, now: float) -> Record | None:
    """The record with the event's news in it; None when the event is not about what is going on now."""
    group = record.group
    epoch = getattr(event, "epoch", group.epoch)
    if isinstance(event, Stopped):
        if not record.stopping or epoch != record.live:
            return None
        return replace(record, live=0, stopping=False, start_by=None, ready_since=None, group=silent(group))
    if epoch != group.epoch:
        return None
    match event:
        case Desired(spec=spec):
            if spec is not None and spec.weight_version != group.refused:
                group = replace(group, refused="")  # told other weights since, it may try these again
            return replace(record, spec=spec, group=group)
        case Released():
            return replace(record, shape=None, releasing=False) if record.releasing else None
        case RoomsClosed():
            return replace(record, empty=True) if group.state is GroupState.DRAINING else None
        case WeightsLoaded(path=path, version=version) if record.loading and version == group.loading:
            group = replace(group, weights_path=path, weight_version=version, loading="")
            return replace(record, group=group, loading=False)
        case WeightsFailed(version=version, reason=reason) if record.loading and version == group.loading:
            return _fail(record, f"could not take weight version {version}: {reason}", now)
        case WeightsLoaded() | WeightsFailed():
            return None
        case RankDied(rank=rank, reason=reason) if record.live:
            group = put_rank(group, replace(group.ranks[rank], state=RankState.DEAD, detail=reason))
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
            return replace(record, group=put_rank(group, rank))
        case RankReady(rank=number, service=service) if record.live:
            group = put_rank(group, replace(group.ranks[number], state=RankState.READY, detail=""))
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
    group = record.group
    if group.loading and group.state in SERVING:  # whatever it died of: these weights are not tried again
        group = replace(group, loading="", refused=group.loading)
    group = replace(enter(group, GroupState.FAILED, now, reason + then), migrate_at=0.0, failures=failures)
    return replace(record, group=group, cause=reason, failures=failures, retry_at=now + delay, start_by=None)


def _adopted(record: Record, ranks: tuple[Rank, ...], now: float) -> Record:
    record = replace(record, group=replace(record.group, ranks=ranks))
    if record.group.state in SERVING and not all_ready(record.group):
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
            group = replace(enter(record.group, GroupState.DRAINING, now, reason), reason=reason)
            record = replace(record, group=group)
        elif record.group.state is GroupState.STARTING:
            if not record.begun:
                spec = _wanted(record)  # as it is now: it may have changed since the group was placed
                group = replace(record.group, revision=spec.revision, kv_format=spec.kv_format)
                record = replace(record, group=group)
                actions.append(StartRanks(epoch=record.live, spec=with_own_weights(spec, group)))
            return replace(record, begun=True)
        else:
            return _serve(record, now, actions)
    actions.append(StopRanks(epoch=record.live))
    return replace(record, stopping=True)


def _start(record: Record, now: float) -> Record:
    """A starting group becomes ready when every rank is, or fails when it takes too long."""
    group, service = record.group, record.service
    if service is not None and all_ready(group):
        group = reached(enter(group, GroupState.READY, now, ""), service)
        return replace(record, group=group, cause="", ready_since=now)
    if record.start_by is not None and now >= record.start_by:
        late = ", ".join(str(rank.rank) for rank in group.ranks if rank.state is not RankState.READY)
        return _fail(record, f"was not ready after {record.policy.start:.0f} s: waited for rank {late}", now)
    return record


def _serve(record: Record, now: float, actions: list[Action]) -> Record:
    """Give a serving group the state that is asked for; a drain begins with a cordon that every gateway has seen."""
    spec, group = _wanted(record), record.group
    if not spec.draining and up_to_date(spec, group):
        state, reason = (GroupState.CORDONED, "cordoned") if spec.cordoned else (GroupState.READY, "")
        group = replace(enter(group, state, now, reason), reason=reason, migrate_at=0.0)
        return replace(record, group=group, watched=False, empty=False)
    weights = wanted_weights(spec, group)
    if group.state is GroupState.READY:
        why = "is about to drain" if spec.draining else f"is about to take weight version {weights.version}"
        group = enter(group, GroupState.CORDONED, now, why)
    if group.state is GroupState.CORDONED and now >= group.since + record.policy.settle:
        group = enter(group, GroupState.DRAINING, now, "waits for its last room to close")
    if group.state is GroupState.DRAINING:
        group = replace(group, migrate_at=_migrate_at(record, group.since))
        if not record.watched:
            actions.append(WatchRooms(epoch=group.epoch))
            record = replace(record, watched=True)
        elif record.empty and not record.loading:
            # Stored first: a controller that comes back must not believe that the old ones are still there.
            group = replace(group, loading=weights.version, reason=f"takes weight version {weights.version}")
            actions.append(LoadWeights(epoch=group.epoch, path=weights.path, version=weights.version))
            record = replace(record, loading=True)
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
            group = enter(group, GroupState.DRAINING, now, "told to stop" if leaves else "takes another shape")
        actions.append(Release())
        return replace(record, releasing=True, group=group)
    if not record.forgotten:
        actions.append(Forget(epoch=group.epoch))
    return replace(record, group=enter(group, GroupState.GONE, now, group.reason), forgotten=True)


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
        # Those that it served last: other ones have to show first, in a group that runs, that they answer well.
        weights_path=last.weights_path if last.weight_version else spec.weights_path,
        weight_version=last.weight_version,
        loading="" if last.weight_version else spec.weight_version,
        refused=last.refused,
        revision=spec.revision,
        kv_format=spec.kv_format,
        failures=record.failures,
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


def _migrate_at(record: Record, since: float) -> float:
    """When the streams of a group that drains since then are to be moved."""
    spec = _wanted(record)
    if not spec.draining:
        return since
    return max(since, spec.migrate_at or spec.drain_deadline - record.policy.migrate)


def _why_again(record: Record) -> str:
    """Why a group that is starting does so, if not for the first time."""
    return f"restarts, since {record.cause}" if record.cause else ""


def _wanted(record: Record) -> GroupSpec:
    assert record.spec is not None, "a group that nobody wants is stopped before this"
    return record.spec
