"""The pair table: every request, its attempts and their rooms, as one pure state table. Events in, actions out.

Rules that it keeps (docs/pairing.md has the whole table):
- The two legs of a room share one fate: when one fails before decode's tokens are shown, the other is aborted and the
  request goes to a fresh pair in a fresh room.
- Decode's first tokens are kept back until prefill says that the KV is good, at most for `hold_s`; the two must have
  sampled the same first token. What turns out bad before it is shown is tried again, afterwards it ends the request.
- Once tokens are shown, prefill's end no longer matters, unless it is an abort.
- A request whose decode leg is lost in mid-stream goes on elsewhere, behind the tokens that its client has, with
  weights of the same version.
- Where there is no pair, a request waits for one that is coming up, as long as it may.
- Each request ends exactly once; each room that was opened is closed on both sides.
- Nothing is sent to an epoch that is known to be lost.

The caller routes, draws rooms, does the I/O, and must answer every `AbortLeg` with `LegClosed` within bounded time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tandem.core.pair_book import PairBook
from tandem.core.pair_events import (
    Action,
    ClientGone,
    Deliver,
    Event,
    Failure,
    FailureKind,
    GroupLost,
    GroupUp,
    LegAccepted,
    LegClosed,
    LegFailed,
    LegFinished,
    LegTokens,
    Move,
    Opened,
    Refused,
    Satisfied,
    SendLeg,
    Submit,
    Tick,
    Withdraw,
)
from tandem.core.pair_records import LegState, Request, Retries, Room
from tandem.core.room_number import ROOM_LIMIT, room_number
from tandem.core.types import Role

__all__ = ["ROOM_LIMIT", "PairTable", "room_number"]


class PairTable(PairBook):
    """All requests and rooms of one gateway. `handle` is the only way in; it never blocks and never reads a clock."""

    def __init__(self, *, retries: Retries | None = None, linger_s: float = 10.0) -> None:
        """`linger_s`: how long a prefill leg may stay open after decode has finished, in seconds."""
        super().__init__(retries or Retries(), linger_s)
        self._lost: dict[str, int] = {}
        self._handlers: dict[type[Event], Callable[[Any, float], list[Action]]] = {
            Submit: self._submit,
            Opened: self._opened,
            Refused: self._refused,
            LegAccepted: self._accepted,
            LegTokens: self._tokens,
            LegFinished: self._finished,
            LegFailed: self._failed,
            LegClosed: self._closed,
            GroupLost: self._group_lost,
            GroupUp: self._group_up,
            Move: self._move,
            ClientGone: self._client_gone,
            Withdraw: self._withdraw,
            Satisfied: self._satisfied,
            Tick: self._tick,
        }

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event at time `now` (seconds, never going back) and return what is to be done, in order.

        What comes late (a room or request that is over) is dropped. Raises ValueError for what only a faulty caller
        does: a request name or a room number that is in use.
        """
        return self._handlers[type(event)](event, now)

    # Requests

    def _submit(self, event: Submit, now: float) -> list[Action]:
        if event.request in self._requests:
            raise ValueError(f"request {event.request} is already in the table")
        request = self._requests[event.request] = Request(event, now)
        if request.complete:
            return [self._finish(request, "length")]
        self._arm(request)
        return [self._need_pair(request)]

    def _opened(self, event: Opened, now: float) -> list[Action]:
        if event.room in self._rooms:
            raise ValueError(f"room {event.room} is already open")
        if not 0 < event.room < ROOM_LIMIT:
            raise ValueError(f"room {event.room} is not a positive int63")
        request = self._asked(event.request)
        if request is None:
            return []
        for role in Role:
            target = event.pair.target(role)
            if target.epoch <= self._lost.get(target.group, -1):
                failure = Failure(kind=FailureKind.UNREACHABLE, message=f"group {target.group} was lost while routing")
                return self._again(request, frozenset({target.group}), failure, now)
        room = self._rooms[event.room] = Room(event.room, event.request, event.pair, event.version)
        request.room = room
        request.parked_at = None
        request.progress = now
        self._arm(request)
        return [SendLeg(request=request.name, room=room.room, role=role, pair=event.pair) for role in Role]

    def _refused(self, event: Refused, now: float) -> list[Action]:
        request = self._asked(event.request)
        if request is None:
            return []
        if request.parked_at is None:
            request.parked_at = now
        if now >= request.submit.deadline:
            return self._too_late(request)
        if not event.coming or now >= request.gives_up_at():
            return self._fail(request, event.failure)
        self._parked[request.name] = request
        self._arm(request)
        return []

    def _asked(self, name: str) -> Request | None:
        """The request, if it still waits for the answer to a `NeedPair`."""
        request = self._requests.get(name)
        if request is None or not request.asking:
            return None
        request.asking = False
        return request

    def _client_gone(self, event: ClientGone, now: float) -> list[Action]:
        failure = Failure(kind=FailureKind.CLIENT_GONE, message="the client has gone")
        return self._withdraw(Withdraw(request=event.request, failure=failure), now)

    def _withdraw(self, event: Withdraw, now: float) -> list[Action]:
        request = self._requests.get(event.request)
        return [] if request is None else self._fail(request, event.failure)

    def _satisfied(self, event: Satisfied, now: float) -> list[Action]:
        request = self._requests.get(event.request)
        if request is None:
            return []
        return [*(request.room.abort("satisfied") if request.room is not None else ()), self._finish(request, "stop")]

    def _move(self, event: Move, now: float) -> list[Action]:
        request = self._requests.get(event.request)
        room = None if request is None else request.room
        if request is None or room is None or not room.may_leave(event.group, event.epoch):
            return []
        request.room = None
        request.attempt += 1
        request.avoid |= {event.group}
        request.why = "moved"
        self._arm(request)
        return [*room.abort("moved"), self._need_pair(request)]

    # Legs

    def _accepted(self, event: LegAccepted, now: float) -> list[Action]:
        room = self._rooms.get(event.room)
        if room is not None and room.legs[event.role] is LegState.SENT:
            room.legs[event.role] = LegState.ACCEPTED
        return []

    def _tokens(self, event: LegTokens, now: float) -> list[Action]:
        room = self._rooms.get(event.room)
        if room is None or not event.ids:
            return []
        request = self._current(room)
        if request is None or room.legs[Role.DECODE] not in (LegState.SENT, LegState.ACCEPTED):
            return []
        request.progress = now
        if room.held is not None:
            room.held += event.ids
            return []
        if room.shown:  # most of all events
            request.progressed(len(event.ids))
            return [Deliver(request=request.name, room=room.room, ids=event.ids)]
        room.produced = True
        room.first = event.ids[0]
        if room.at_odds:
            return self._bad_kv(room, request, now)
        if room.prefilled or not request.submit.hold_s:
            return self._show(room, request, event.ids)
        room.held = list(event.ids)
        room.hold_until = now + request.submit.hold_s
        self._arm(request)
        return []

    def _finished(self, event: LegFinished, now: float) -> list[Action]:
        room = self._rooms.get(event.room)
        if room is None:
            return []
        actions = self._close(room, event.role)
        request = self._current(room)
        if request is None or not actions:
            return actions
        if event.role is Role.PREFILL:
            room.prefilled = True
            room.promised = event.first
            if room.at_odds:
                return actions + self._bad_kv(room, request, now)
            return actions if room.held is None else actions + self._release(room, request, now)
        if not room.produced:
            failure = Failure(kind=FailureKind.BROKEN, message="decode ended without a token")
            return actions + self._fate(room, Role.DECODE, failure, now)
        if room.held is not None:
            # All of the answer is there, but prefill has not said yet that it is good.
            room.reason = event.reason
            return actions
        return actions + self._complete(room, request, event.reason, now)

    def _failed(self, event: LegFailed, now: float) -> list[Action]:
        room = self._rooms.get(event.room)
        if room is None:
            return []
        actions = self._close(room, event.role)
        if not actions:
            return []
        return actions + self._fate(room, event.role, event.failure, now)

    def _closed(self, event: LegClosed, now: float) -> list[Action]:
        room = self._rooms.get(event.room)
        if room is None or room.legs[event.role] is not LegState.ABORTING:
            return []
        return self._close(room, event.role)

    # Groups

    def _group_lost(self, event: GroupLost, now: float) -> list[Action]:
        self._lost[event.group] = max(event.epoch, self._lost.get(event.group, -1))
        return self._lose(event.group, lambda epoch: epoch <= event.epoch, now)

    def _group_up(self, event: GroupUp, now: float) -> list[Action]:
        # A group that was removed and made anew may start at an epoch that was lost before.
        self._lost[event.group] = event.epoch - 1
        actions = self._lose(event.group, lambda epoch: epoch != event.epoch, now)
        waiting, self._parked = self._parked, {}
        return actions + [self._need_pair(request) for request in waiting.values()]

    def _lose(self, group: str, gone: Callable[[int], bool], now: float) -> list[Action]:
        failure = Failure(kind=FailureKind.GROUP_LOST, message=f"group {group} was lost", retry_after=2.0)
        actions: list[Action] = []
        for room in list(self._rooms.values()):
            for role in Role:
                target = room.pair.target(role)
                if target.group != group or not gone(target.epoch):
                    continue
                aborted = room.abort_leg(role, "group_lost", notify=False)
                if aborted:
                    actions += aborted + self._fate(room, role, failure, now)
        return actions

    # Time

    def _tick(self, event: Tick, now: float) -> list[Action]:
        actions: list[Action] = []
        while self._lingering and self._lingering[0][0] <= now:
            _, number = self._lingering.popleft()
            room = self._rooms.get(number)
            if room is not None:
                actions += room.abort("linger")
        while (name := self._timers.pop(now)) is not None:
            request = self._requests.get(name)
            if request is None:
                continue
            if request.due() > now:
                self._arm(request)
            else:
                actions += self._overdue(request, now)
        return actions

    def _overdue(self, request: Request, now: float) -> list[Action]:
        room, submit = request.room, request.submit
        if now >= submit.deadline:
            return self._too_late(request)
        if room is None:
            if request.wake is not None:
                return [self._need_pair(request)]
            waited = now - (request.parked_at if request.parked_at is not None else now)
            message = f"no group came up within {waited:.0f} s"
            return self._fail(request, Failure(kind=FailureKind.NO_CAPACITY, message=message, retry_after=5.0))
        if room.doubt is not None:
            return self._distrust(room, request, room.doubt, now)
        if room.held is not None:
            return self._release(room, request, now)
        request.room = None
        if room.produced:
            failure = Failure(kind=FailureKind.STALLED, message=f"no token for {submit.stall_s:g} s")
            avoid = frozenset({room.pair.decode.group})
        else:
            message = f"no first token within {submit.first_token_s:g} s"
            failure = Failure(kind=FailureKind.NO_FIRST_TOKEN, message=message)
            avoid = frozenset({room.pair.prefill.group, room.pair.decode.group})
        return room.abort(failure.kind.value) + self._again(request, avoid, failure, now)
