"""What a rollout is told, what it remembers and what it answers (`rollout.py`). Times are Unix seconds."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from tandem.core.types import GroupState, Role


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How a change goes through a pool. `max_surge` and `max_unavailable` cannot both be 0."""

    max_surge: int = 1
    """Groups above the wanted number while it goes on."""
    max_unavailable: int = 0
    """Ready groups below it that it may bring about."""
    canary_s: float = 30.0
    """The first group of a revision must serve for so long before there are others."""
    progress_s: float = 1800.0
    """A new group that has its nodes and is not ready so long after has failed; a change that waits for so long is told
    as stalled."""
    rollback: bool = True
    """After a failure go back to the revision that is known to be good; else stop where it is."""
    failures: int = 3
    """A group that fails so often in a row will not do."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One group that exists, as the caller sees it."""

    group: str
    role: Role
    revision: str
    state: GroupState
    kv_format: str = ""
    weights: str = ""
    """Names the weights that its revision declares; those that it serves may have been put in their place."""
    weight_version: str = ""
    """Of the weights that it serves; empty while it never has."""
    ready_since: float | None = None
    """None while it is not ready."""
    served: bool = False
    """Whether it has ever been ready."""
    placed: float | None = None
    """When all its nodes were found (pods scheduled, not yet started): its time to get ready runs from then."""
    no_room: bool = False
    """Nodes were looked for, and there are not enough."""
    failures: int = 0
    """In a row."""
    lost: bool = False
    """A node of it is lost: what follows says nothing about its revision."""
    leaving: bool = False
    """It drains or is being deleted; it counts as gone, and only its id is still taken."""
    running: int = 0
    waiting: int = 0
    """Requests there."""
    canary: bool = False
    """Made as the first of its revision, and to be asked a prompt whose answer is known before it serves."""
    checked: bool = True
    """False until it has answered that prompt rightly; True where nobody asks."""
    canary_failed: str = ""
    """Why its answer to that prompt was wrong, in one sentence; empty = it was not."""
    reason: str = ""
    """What it is doing, or why it failed, in one sentence."""

    @property
    def ready(self) -> bool:
        """Whether new pairs may use it. One that answers wrongly should not serve, whatever it says of itself."""
        return self.state is GroupState.READY and not self.leaving and not self.canary_failed

    @property
    def load(self) -> int:
        """Requests that would have to move if it left."""
        return self.running + self.waiting

    @property
    def pairs_with(self) -> tuple[str, str]:
        """Groups of the other role that have the same are its partners."""
        return self.weight_version, self.kv_format


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """What has to be known besides the groups. Store it before the actions are carried out: both may be repeated.

    Without it (a fresh one) a pool still does the right thing, but it may try a revision again that has failed.
    """

    good: str = ""
    """Revision that the pool served with as a whole; the templates of it and of `target` must be kept. Empty = none."""
    good_format: str = ""
    good_weights: str = ""
    """As in `Member.weights`; empty = not known, and then taken for any."""
    target: str = ""
    """Revision that the pool was last told to have."""
    target_format: str = ""
    target_weights: str = ""
    passed: bool = False
    """A group of `target` has served as long as a canary must."""
    proven: tuple[str, ...] = ()
    """Revisions of the groups that are there, of which that was so at some time."""
    dark: bool = False
    """The change began without a group, so until the canary has passed there is nothing else to keep up."""
    began: float = 0.0
    """When the pool was told to have `target`."""
    failed: str = ""
    """Revision that is not tried again. Empty = none."""
    failure: str = ""
    """Why, in one sentence."""
    failed_at: float = 0.0
    failed_with: str = ""
    """It failed only because the other pool went back from this revision. Empty = it failed itself."""
    waits_for: str = ""
    """What the change waits for, and how far it has come. Empty = it does not wait."""
    waits_since: float = 0.0


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """What the groups of one role should be, and what they are."""

    role: Role
    groups: int
    """How many there should be."""
    revision: str
    kv_format: str = ""
    """Of groups of this revision."""
    weights: str = ""
    """As in `Member.weights`, of this revision."""
    nodes: int = 1
    gpus_per_node: int = 1
    """Of a group; only told, not counted."""
    rules: Rules = Rules()
    paused: bool = False
    """The number is kept, the revision is not changed."""
    held: str = ""
    """Why nothing may change for now although nobody paused it, such as other weights being taken. Empty = it may."""
    members: tuple[Member, ...] = ()
    memory: Memory = Memory()


class Create(msgspec.Struct, frozen=True, kw_only=True):
    """A group that is to be made. Making it twice does no harm: it has the same id."""

    group: str
    revision: str
    canary: bool = False
    """The first one of a revision that is not known to serve: nothing is routed to it before it was checked."""


class Remove(msgspec.Struct, frozen=True, kw_only=True):
    """A group that is to drain and go."""

    group: str
    reason: str
    """In one sentence."""


Action = Create | Remove


class Phase(StrEnum):
    """How a pool stands to what it should be."""

    COMPLETE = "Complete"
    """All groups are there, ready, and of the revision that is wanted."""
    PROGRESSING = "Progressing"
    STOPPED = "Stopped"
    """It does not go on by itself, or only when something else happens first."""
    ROLLED_BACK = "RolledBack"
    """The wanted revision failed, and the groups have the last good one again."""


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """The phase, why, and the same for people."""

    phase: Phase
    reason: str
    """One word in CamelCase, as Kubernetes' conditions have it."""
    message: str
    updated: int = 0
    """Groups of the wanted revision that do not leave."""
    ready: int = 0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done for one pool now."""

    actions: tuple[Action, ...]
    memory: Memory
    status: Status
