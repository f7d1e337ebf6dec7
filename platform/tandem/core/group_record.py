"""What the state machine of one group (`group.py`) remembers, and what follows from it without an event."""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from tandem.core.group_events import Service
from tandem.core.types import Group, GroupSpec, GroupState, Rank, RankState

SERVING = frozenset({GroupState.READY, GroupState.CORDONED, GroupState.DRAINING})
"""States in which requests may still run."""


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds."""

    start: float = 300.0
    """From its placement, a group that is not ready by then is restarted."""
    settle: float = 1.0
    """A cordon is known to every gateway by then, so an empty group stays empty."""
    migrate: float = 30.0
    """So long before the deadline of a drain, gateways begin to move what still decodes there."""
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
    loading: bool = False
    """LoadWeights was asked for, and not answered."""
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
    # The one that wrote it may have lived by a clock that was ahead: what waits from then on must not wait for that.
    group = replace(group, since=min(group.since, now))
    return Record(
        group=group,
        spec=spec,
        policy=policy,
        service=service if group.url else None,
        live=0 if gone else group.epoch,
        begun=True,
        gpus=gpus,
        failures=group.failures,
        # Whatever the state, a placement may be there and must be given back in the end.
        shape=(len(group.ranks), gpus) if group.ranks else None,
        start_by=now + policy.start if group.state is GroupState.STARTING else None,
        ready_since=group.since if group.state in SERVING else None,
    )


def wake_at(record: Record) -> float | None:
    """When to send the next Tick (Unix seconds), None = no need."""
    group, spec = record.group, record.spec
    if record.stopping or record.releasing:
        return None
    if group.state is GroupState.STARTING:
        return record.start_by
    if group.state is GroupState.FAILED:
        return record.retry_at
    if group.state in SERVING and spec is not None and (spec.draining or not up_to_date(spec, group)):
        settled = group.since + record.policy.settle if group.state is GroupState.CORDONED else None
        deadline = spec.drain_deadline if spec.draining else None
        return min((due for due in (settled, deadline) if due is not None), default=None)
    return None


class Weights(NamedTuple):
    """A set of weights: its folder on every node ("" = the fleet's own), and the version that names it."""

    path: str
    version: str


def wanted_weights(spec: GroupSpec, group: Group) -> Weights:
    """What the group should serve: what `spec` says, if it says anything and the group has not refused it."""
    if spec.weight_version in ("", group.refused):
        return Weights(group.weights_path, group.weight_version)
    return Weights(spec.weights_path, spec.weight_version)


def up_to_date(spec: GroupSpec, group: Group) -> bool:
    """Whether a serving group has the weights that it should have."""
    return not group.loading and wanted_weights(spec, group).version == group.weight_version


def with_own_weights(spec: GroupSpec, group: Group) -> GroupSpec:
    """The wish with the weights that this epoch was started with, or has taken since."""
    return replace(spec, weights_path=group.weights_path, weight_version=group.weight_version or group.loading)


def all_ready(group: Group) -> bool:
    """Whether every rank is."""
    return all(rank.state is RankState.READY for rank in group.ranks)


def enter(group: Group, state: GroupState, now: float, reason: str) -> Group:
    """The group in `state`; nothing changes if it is in it already."""
    return group if group.state is state else replace(group, state=state, since=now, reason=reason)


def reached(group: Group, service: Service) -> Group:
    """The group with the addresses of an engine that is ready."""
    return replace(
        group,
        url=service.url,
        bootstrap_host=service.bootstrap_host,
        bootstrap_port=service.bootstrap_port,
        dp_size=service.dp_size,
        weight_version=service.weight_version,
        loading="",
    )


def silent(group: Group) -> Group:
    """A group none of whose ranks runs any more: nothing of it can be reached."""
    ranks = tuple(replace(rank, state=RankState.DEAD, detail=rank.detail or "stopped") for rank in group.ranks)
    return replace(group, ranks=ranks, url="", bootstrap_host="", bootstrap_port=0, migrate_at=0.0, loading="")


def put_rank(group: Group, rank: Rank) -> Group:
    """The group with this rank in place of the one of its number."""
    return replace(group, ranks=(*group.ranks[: rank.rank], rank, *group.ranks[rank.rank + 1 :]))
