"""What the pair table is told (events) and what it asks for (actions). Plain values, no behaviour.

A *request* is what a client asked; a *room* is one attempt at it on one pair. `request` is an opaque name of the
caller's; `room` is SGLang's `bootstrap_room`.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from tandem.core.routing import Pair, Target
from tandem.core.types import Role


class FailureKind(StrEnum):
    """Why a leg, or in the end a request, failed."""

    UNREACHABLE = "unreachable"
    """No connection to the engine, or it closed before it answered."""
    REFUSED = "refused"
    """The engine answered with an error status."""
    ABORTED = "aborted"
    """The engine gave the request up inside a 200 (`finish_reason.type == "abort"`)."""
    BROKEN = "broken"
    """The stream ended early or made no sense."""
    BAD_REQUEST = "bad_request"
    """The engine says that the request itself is wrong: no other pair would say otherwise."""
    GROUP_LOST = "group_lost"
    """The group died, or left, or started a new epoch."""
    NO_FIRST_TOKEN = "no_first_token"
    """Nothing was produced within the time for a first token."""
    STALLED = "stalled"
    """A stream that had begun produced nothing for too long."""
    DEADLINE = "deadline"
    """The request's own time is over."""
    BAD_KV = "bad_kv"
    """Prefill says that its part failed, or sampled another first token than decode: what decode makes of it is not to
    be trusted."""
    NO_CAPACITY = "no_capacity"
    """No pair is ready."""
    CLIENT_GONE = "client_gone"
    """Nobody waits for the answer."""
    STOPPING = "stopping"
    """The gateway goes down and could not wait for the answer."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A failure with one sentence for a person. `retry_after` in seconds, 0 = unknown."""

    kind: FailureKind
    message: str
    retry_after: float = 0.0


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened. `PairTable.handle` takes it with the time."""


class Submit(Event, frozen=True, kw_only=True):
    """A client wants an answer. Times are seconds; `deadline` is on the caller's clock."""

    request: str
    deadline: float
    first_token_s: float
    """A pair that has produced nothing by then is given up for another."""
    stall_s: float
    """A stream without a token for so long is taken to another pair."""
    capacity_s: float = 0.0
    """How long it may wait for a group to come up. One that has tokens waits until its deadline."""
    hold_s: float = 0.0
    """How long decode's first tokens may be kept back for prefill's word that the KV is good."""
    limit: int = 0
    """Tokens that the answer may have at the most; 0 = not known."""
    delivered: int = 0
    """Tokens that the client has already, of an answer that another gateway began."""
    version: str | None = None
    """Weight version that those came from; None = any will do."""


class Opened(Event, frozen=True, kw_only=True):
    """The caller chose a pair and a fresh room for the request (its answer to `NeedPair`)."""

    request: str
    room: int
    pair: Pair
    version: str = ""
    """Weight version of the pair."""


class Refused(Event, frozen=True, kw_only=True):
    """The caller found no pair for the request (its other answer to `NeedPair`)."""

    request: str
    failure: Failure
    coming: bool = False
    """A group that would do is starting: there is something to wait for."""


class LegAccepted(Event, frozen=True, kw_only=True):
    """The engine has begun to answer: from now on it knows the request id."""

    room: int
    role: Role


class LegTokens(Event, frozen=True, kw_only=True):
    """The decode leg produced tokens."""

    room: int
    ids: list[int]


class LegFinished(Event, frozen=True, kw_only=True):
    """The engine ended the leg well, with `reason` ("stop" or "length"). The leg is over."""

    room: int
    role: Role
    reason: str
    first: int | None = None
    """Prefill only: the token that it sampled, which decode's stream has to begin with."""


class LegFailed(Event, frozen=True, kw_only=True):
    """The leg ended badly. The leg is over."""

    room: int
    role: Role
    failure: Failure


class LegClosed(Event, frozen=True, kw_only=True):
    """A leg that was to be aborted is over, one way or another."""

    room: int
    role: Role


class GroupLost(Event, frozen=True, kw_only=True):
    """Everything that ran on this group up to this epoch is lost."""

    group: str
    epoch: int


class GroupUp(Event, frozen=True, kw_only=True):
    """The group is ready at this epoch; whatever ran on another epoch of it is lost."""

    group: str
    epoch: int


class Move(Event, frozen=True, kw_only=True):
    """The group is leaving: if the request decodes there, it is to go on elsewhere. Only when there is an elsewhere."""

    request: str
    group: str
    epoch: int


class ClientGone(Event, frozen=True, kw_only=True):
    """Nobody waits for the request's answer any more."""

    request: str


class Withdraw(Event, frozen=True, kw_only=True):
    """The caller gives the request up, for the reason that it says."""

    request: str
    failure: Failure


class Satisfied(Event, frozen=True, kw_only=True):
    """The caller has all that it wants of the answer (a stop string); the rest is not to be produced."""

    request: str


class Tick(Event, frozen=True, kw_only=True):
    """Time has passed."""


class Action(msgspec.Struct, frozen=True, kw_only=True):
    """Something to be done. Returned by `PairTable.handle`, in order."""


class NeedPair(Action, frozen=True, kw_only=True):
    """Choose a pair and a fresh room (then `Opened`), or say why not (then `Refused`). Attempts count from 1."""

    request: str
    attempt: int
    avoid: frozenset[str]
    """Groups that failed this request before: only if there is no other."""
    version: str | None = None
    """Weight version that the pair must have, since the client has tokens from it; None = any."""
    why: str = ""
    """What became of the attempt before: a `FailureKind`, or "moved". Empty with the first."""


class SendLeg(Action, frozen=True, kw_only=True):
    """Send the request to the pair's half of this role. Both legs of a room are asked for together."""

    request: str
    room: int
    role: Role
    pair: Pair


class AbortLeg(Action, frozen=True, kw_only=True):
    """End this leg: tell the engine if `notify` (not if its group is lost), drop the connection, then `LegClosed`."""

    room: int
    role: Role
    target: Target
    notify: bool
    reason: str


class Deliver(Action, frozen=True, kw_only=True):
    """These tokens belong to the client."""

    request: str
    room: int
    ids: list[int]


class Finish(Action, frozen=True, kw_only=True):
    """The answer is complete. Exactly one `Finish` or `Fail` ends a request."""

    request: str
    reason: str


class Fail(Action, frozen=True, kw_only=True):
    """The request has failed for good."""

    request: str
    failure: Failure
    delivered: int
    """Tokens that the client had by then."""


class LegReleased(Action, frozen=True, kw_only=True):
    """A leg is over: its target has this much less to do."""

    room: int
    role: Role
    target: Target


class RoomClosed(Action, frozen=True, kw_only=True):
    """Both legs of a room are over: the lease ends here."""

    room: int
