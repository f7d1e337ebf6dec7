"""What a group's state machine is told (events) and what it asks for (actions). Plain values, no behaviour."""

from __future__ import annotations

import msgspec

from tandem.core.types import GroupSpec, Rank


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened. `group.step` takes it with the time."""


class Desired(Event, frozen=True, kw_only=True):
    """What the group should be now; None = it should not exist."""

    spec: GroupSpec | None


class Tick(Event, frozen=True, kw_only=True):
    """Time has passed; due at `group.wake_at`."""


class Placed(Event, frozen=True, kw_only=True):
    """Every rank has its node."""

    epoch: int


class Waiting(Event, frozen=True, kw_only=True):
    """The ranks cannot be placed yet; it is still being tried. `reason` is one sentence for a person."""

    epoch: int
    reason: str


class StartFailed(Event, frozen=True, kw_only=True):
    """The group could not be placed or started at all."""

    epoch: int
    reason: str


class RankStarted(Event, frozen=True, kw_only=True):
    """A rank's engine process runs, and is not ready yet. `rank` tells node, host, PID and log."""

    epoch: int
    rank: Rank


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """How a group that is ready is reached; fields as in `types.Group`."""

    url: str
    bootstrap_host: str = ""
    bootstrap_port: int = 0
    dp_size: int = 1
    weight_version: str = ""


class RankReady(Event, frozen=True, kw_only=True):
    """A rank's engine answers. Rank 0 brings the group's `service`."""

    epoch: int
    rank: int
    service: Service | None = None


class RankDied(Event, frozen=True, kw_only=True):
    """A rank's engine ended, fell ill or cannot be reached: all three end the group. One sentence says which."""

    epoch: int
    rank: int
    reason: str


class Adopted(Event, frozen=True, kw_only=True):
    """A restarted controller found every rank of this epoch alive; `ranks` is what they say of themselves."""

    epoch: int
    ranks: tuple[Rank, ...]


class RoomsClosed(Event, frozen=True, kw_only=True):
    """A draining group has no request left."""

    epoch: int


class WeightsLoaded(Event, frozen=True, kw_only=True):
    """Every rank has the weights in `path` (as in `types.GroupSpec`), and they answered well."""

    epoch: int
    path: str
    version: str


class WeightsFailed(Event, frozen=True, kw_only=True):
    """The weights could not be loaded, or answered badly; what the ranks hold now is not known."""

    epoch: int
    version: str
    reason: str


class Stopped(Event, frozen=True, kw_only=True):
    """No engine of this epoch, or an older one, runs any more."""

    epoch: int


class Released(Event, frozen=True, kw_only=True):
    """The placement was given back."""


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """Something to do, after the new record has been stored."""


class Place(Action, frozen=True, kw_only=True):
    """Get a node for every rank, or see that the present ones still live. Answered by Placed, Waiting, StartFailed."""

    epoch: int
    spec: GroupSpec


class StartRanks(Action, frozen=True, kw_only=True):
    """Start every rank, with the weights that `spec` names. Answered by RankStarted and RankReady, or RankDied, of
    each; or StartFailed."""

    epoch: int
    spec: GroupSpec


class StopRanks(Action, frozen=True, kw_only=True):
    """Stop every rank of this epoch and of older ones. Answered by Stopped, however long it takes."""

    epoch: int


class WatchRooms(Action, frozen=True, kw_only=True):
    """Tell with RoomsClosed when the group has no request left."""

    epoch: int


class LoadWeights(Action, frozen=True, kw_only=True):
    """Give an empty group the weights in `path`, and see how they answer. Answered by WeightsLoaded, WeightsFailed."""

    epoch: int
    path: str
    version: str


class Release(Action, frozen=True, kw_only=True):
    """Give the placement back. Answered by Released."""


class Forget(Action, frozen=True, kw_only=True):
    """The group is gone for good: remember its epoch, delete its record and its wish to exist."""

    epoch: int
