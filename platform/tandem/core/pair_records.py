"""What the pair table remembers: a request, its rooms, and how often it may be tried."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from tandem.core.pair_events import AbortLeg, Action, Failure, FailureKind, LegReleased, RoomClosed, Submit
from tandem.core.route_types import Pair
from tandem.core.types import Role

FINAL = frozenset({FailureKind.BAD_REQUEST, FailureKind.DEADLINE})
"""Failures that no other pair could mend."""
UNSEEN = frozenset({FailureKind.UNREACHABLE})
"""Failures of which no engine can have taken harm: it never had the request."""


class Retries(msgspec.Struct, frozen=True, kw_only=True):
    """How often a request is tried. Each token that its client gets begins the count anew, but for `most`."""

    losses: int = 3
    """Pairs in a row that may be lost with it: a request that kills engines must not go round them all."""
    tries: int = 10
    """Attempts in a row, those included that no engine took: with the delays, about 10 s until a death is known."""
    most: int = 64
    """Attempts in all."""
    delay_s: float = 0.25
    """Before the third try in a row; it doubles with each further one. The second is immediate."""
    delay_most_s: float = 2.0

    def delay(self, tries: int) -> float:
        """Seconds to wait before the n-th try in a row."""
        return 0.0 if tries <= 2 else min(self.delay_most_s, self.delay_s * 2.0 ** (tries - 3))


class LegState(StrEnum):
    """Life of one leg: sent → accepted → closed, with aborting on the way when its end was asked for."""

    SENT = "sent"
    ACCEPTED = "accepted"
    ABORTING = "aborting"
    CLOSED = "closed"


class Room:
    """One attempt of a request on one pair."""

    __slots__ = (
        "doubt", "first", "held", "hold_until", "legs", "pair", "prefilled", "produced", "promised", "reason",
        "request", "room", "shown", "version",
    )  # fmt: skip

    def __init__(self, room: int, request: str, pair: Pair, version: str) -> None:
        self.room = room
        self.request = request
        self.pair = pair
        self.version = version
        self.legs = {Role.PREFILL: LegState.SENT, Role.DECODE: LegState.SENT}
        self.prefilled = False
        """Prefill has answered well."""
        self.promised: int | None = None
        """The first token, as prefill has it."""
        self.first: int | None = None
        """The first token, as decode has it."""
        self.produced = False
        self.shown = False
        """Tokens of it were delivered."""
        self.held: list[int] | None = None
        """Tokens that wait for prefill's word."""
        self.hold_until = 0.0
        self.doubt: Failure | None = None
        """Why what was shown may be wrong. What follows is held; it fails, unless decode gives up by itself at once."""
        self.reason: str | None = None
        """Why decode has finished, while its tokens are held."""

    @property
    def at_odds(self) -> bool:
        """Whether the two legs have different first tokens: then decode did not read what prefill wrote."""
        return self.first is not None and self.promised is not None and self.first != self.promised

    @property
    def closed(self) -> bool:
        """Both legs are over."""
        return all(state is LegState.CLOSED for state in self.legs.values())

    def may_leave(self, group: str, epoch: int) -> bool:
        """Whether its decode leg runs there, and may go on elsewhere: not while what it has shown is in doubt."""
        decode = self.pair.decode
        runs = self.legs[Role.DECODE] is not LegState.CLOSED and self.doubt is None
        return (decode.group, decode.epoch) == (group, epoch) and runs

    def abort(self, reason: str) -> list[Action]:
        """End what still runs of it, on both sides."""
        return [action for role in Role for action in self.abort_leg(role, reason, notify=True)]

    def abort_leg(self, role: Role, reason: str, *, notify: bool) -> list[Action]:
        if self.legs[role] in (LegState.ABORTING, LegState.CLOSED):
            return []
        self.legs[role] = LegState.ABORTING
        return [AbortLeg(room=self.room, role=role, target=self.pair.target(role), notify=notify, reason=reason)]

    def close_leg(self, role: Role) -> list[Action]:
        """The leg is over. Nothing, if it was before."""
        if self.legs[role] is LegState.CLOSED:
            return []
        self.legs[role] = LegState.CLOSED
        actions: list[Action] = [LegReleased(room=self.room, role=role, target=self.pair.target(role))]
        return [*actions, RoomClosed(room=self.room)] if self.closed else actions


class Request:
    """A request, from its `Submit` until it ends."""

    __slots__ = (
        "asking", "attempt", "avoid", "delivered", "losses", "name", "parked_at", "progress", "room", "submit",
        "tries", "version", "wake", "why",
    )  # fmt: skip

    def __init__(self, submit: Submit, now: float) -> None:
        self.name = submit.request
        self.submit = submit
        self.attempt = 1
        self.tries = 1
        self.losses = 0
        self.avoid: frozenset[str] = frozenset()
        self.delivered = submit.delivered
        self.version = submit.version
        self.why = ""
        """What became of the attempt before."""
        self.room: Room | None = None
        self.progress = now
        """When the attempt began, or last produced tokens."""
        self.asking = False
        """A `NeedPair` of it is not answered yet."""
        self.wake: float | None = None
        """When it is tried again, while it waits for that."""
        self.parked_at: float | None = None
        """Since when there is no pair for it."""

    @property
    def complete(self) -> bool:
        """Its client has all tokens that it may have."""
        return 0 < self.submit.limit <= self.delivered

    def gives_up_at(self) -> float:
        """Until when it waits for a pair that there is not."""
        if self.delivered or self.parked_at is None:
            return self.submit.deadline
        return min(self.submit.deadline, self.parked_at + self.submit.capacity_s)

    def due(self) -> float:
        """When it must have made progress or be over."""
        room, submit = self.room, self.submit
        if room is None:
            return self.gives_up_at() if self.wake is None else min(submit.deadline, self.wake)
        if room.held is not None:
            return min(submit.deadline, room.hold_until)
        patience = submit.stall_s if room.produced else submit.first_token_s
        return min(submit.deadline, self.progress + patience)

    def progressed(self, tokens: int) -> None:
        """Its client gets tokens."""
        self.delivered += tokens
        self.tries = 1
        self.losses = 0
        if self.avoid:
            self.avoid = frozenset()
