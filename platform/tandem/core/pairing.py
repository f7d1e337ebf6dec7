"""The pair table: every request, its attempts and their rooms, as one pure state table. Events in, actions out.

Rules that it keeps:
- The two legs of a room share one fate: when one fails before the first token, the other is aborted and the request
  goes to a fresh pair in a fresh room, at most `max_attempts` times in all.
- Once decode has produced a token the KV has arrived, so prefill's end, good or bad, no longer matters.
- After the first delivered token a failure ends the request: nothing is delivered twice.
- Each request ends exactly once; each room that was opened is closed on both sides.
- Nothing is sent to an epoch that is known to be lost.

The caller routes, draws rooms, does the I/O, and must answer every `AbortLeg` with `LegClosed` within bounded time.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from tandem.core.pair_events import (
    AbortLeg,
    Action,
    ClientGone,
    Deliver,
    Event,
    Fail,
    Failure,
    FailureKind,
    Finish,
    GroupLost,
    GroupUp,
    LegAccepted,
    LegClosed,
    LegFailed,
    LegFinished,
    LegReleased,
    LegTokens,
    NeedPair,
    Opened,
    Refused,
    RoomClosed,
    Satisfied,
    SendLeg,
    Submit,
    Tick,
    Withdraw,
)
from tandem.core.routing import Pair
from tandem.core.types import Role

ROOM_LIMIT = 2**63
FINAL = frozenset({FailureKind.BAD_REQUEST, FailureKind.DEADLINE})
"""Failures that no other pair could mend."""


def room_number(bits: int, *, dp_size: int, dp_rank: int) -> int:
    """A room from random bits, such that `room % dp_size == dp_rank`, between 1 and 2**63 - 1.

    A prefill server with DP attention and `--load-balance-method auto` takes a request on rank `room % dp_size`
    (SGLang 0.5.23, `data_parallel_controller.follow_bootstrap_room_scheduler`), and decode looks for the KV there.
    """
    size = max(1, dp_size)
    if not 0 <= dp_rank < size:
        raise ValueError(f"DP rank {dp_rank} is not in 0 … {size - 1}")
    # Multiples of `size` below the limit, 0 left out (room 0 is SGLang's own health check).
    multiple = 1 + bits % (ROOM_LIMIT // size - 1)
    room = multiple * size + dp_rank
    return room if room < ROOM_LIMIT else room - size


class LegState(StrEnum):
    """Life of one leg: sent → accepted → closed, with aborting on the way when its end was asked for."""

    SENT = "sent"
    ACCEPTED = "accepted"
    ABORTING = "aborting"
    CLOSED = "closed"


class _Room:
    __slots__ = ("legs", "pair", "produced", "request", "room")

    def __init__(self, room: int, request: str, pair: Pair) -> None:
        self.room = room
        self.request = request
        self.pair = pair
        self.produced = False
        self.legs = {Role.PREFILL: LegState.SENT, Role.DECODE: LegState.SENT}


class _Request:
    __slots__ = ("attempts", "avoid", "delivered", "name", "progress", "room", "submit")

    def __init__(self, submit: Submit, now: float) -> None:
        self.name = submit.request
        self.submit = submit
        self.attempts = 1
        self.avoid: frozenset[str] = frozenset()
        self.delivered = 0
        self.room: _Room | None = None
        self.progress = now
        """When the attempt began, or last produced tokens."""

    def due(self) -> float:
        """When it must have made progress or be over."""
        if self.room is None:
            return self.submit.deadline
        patience = self.submit.stall_s if self.delivered else self.submit.first_token_s
        return min(self.submit.deadline, self.progress + patience)


class PairTable:
    """All requests and rooms of one gateway. `handle` is the only way in; it never blocks and never reads a clock."""

    def __init__(self, *, max_attempts: int = 3, linger_s: float = 10.0) -> None:
        """`linger_s`: how long a prefill leg may stay open after decode has finished, in seconds."""
        self._max_attempts = max_attempts
        self._linger_s = linger_s
        self._requests: dict[str, _Request] = {}
        self._rooms: dict[int, _Room] = {}
        self._lost: dict[str, int] = {}
        self._timers: list[tuple[float, int, str]] = []
        self.timers_set = 0
        """Rises with each deadline that is set: as long as it stays, `next_deadline` comes no earlier than before."""
        self._lingering: deque[tuple[float, int]] = deque()
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

    @property
    def open_requests(self) -> int:
        return len(self._requests)

    @property
    def open_rooms(self) -> int:
        return len(self._rooms)

    def has_room(self, room: int) -> bool:
        """Whether the number is taken: SGLang does not survive a room that is used twice."""
        return room in self._rooms

    def next_deadline(self) -> float | None:
        """When `Tick` is due at the latest; None = nothing waits."""
        due = [queue[0][0] for queue in (self._timers, self._lingering) if queue]
        return min(due, default=None)

    # Requests

    def _submit(self, event: Submit, now: float) -> list[Action]:
        if event.request in self._requests:
            raise ValueError(f"request {event.request} is already in the table")
        request = self._requests[event.request] = _Request(event, now)
        self._arm(request)
        return [self._need_pair(request)]

    def _opened(self, event: Opened, now: float) -> list[Action]:
        if event.room in self._rooms:
            raise ValueError(f"room {event.room} is already open")
        if not 0 < event.room < ROOM_LIMIT:
            raise ValueError(f"room {event.room} is not a positive int63")
        request = self._requests.get(event.request)
        if request is None or request.room is not None:
            return []
        for role in Role:
            target = event.pair.target(role)
            if target.epoch <= self._lost.get(target.group, -1):
                failure = Failure(kind=FailureKind.GROUP_LOST, message=f"group {target.group} was lost while routing")
                return self._again(request, frozenset({target.group}), failure)
        room = self._rooms[event.room] = _Room(event.room, event.request, event.pair)
        request.room = room
        request.progress = now
        self._arm(request)
        return [SendLeg(request=request.name, room=room.room, role=role, pair=event.pair) for role in Role]

    def _refused(self, event: Refused, now: float) -> list[Action]:
        request = self._requests.get(event.request)
        if request is None or request.room is not None:
            return []
        return self._fail(request, event.failure)

    def _client_gone(self, event: ClientGone, now: float) -> list[Action]:
        failure = Failure(kind=FailureKind.CLIENT_GONE, message="the client has gone")
        return self._withdraw(Withdraw(request=event.request, failure=failure), now)

    def _withdraw(self, event: Withdraw, now: float) -> list[Action]:
        request = self._requests.get(event.request)
        return [] if request is None else self._fail(request, event.failure)

    def _satisfied(self, event: Satisfied, now: float) -> list[Action]:
        request = self._requests.pop(event.request, None)
        if request is None:
            return []
        return [*self._abort_room(request.room, "satisfied"), Finish(request=request.name, reason="stop")]

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
        room.produced = True
        request.progress = now
        request.delivered += len(event.ids)
        if request.delivered == len(event.ids):
            # The time for a stall may end before that for the first token would have.
            self._arm(request)
        return [Deliver(request=request.name, room=room.room, ids=event.ids)]

    def _finished(self, event: LegFinished, now: float) -> list[Action]:
        room = self._rooms.get(event.room)
        if room is None:
            return []
        actions = self._close_leg(room, event.role)
        request = self._current(room)
        if request is None or event.role is Role.PREFILL or not actions:
            return actions
        del self._requests[request.name]
        actions.append(Finish(request=request.name, reason=event.reason))
        if room.legs[Role.PREFILL] is not LegState.CLOSED:
            self._lingering.append((now + self._linger_s, room.room))
            self.timers_set += 1
        return actions

    def _failed(self, event: LegFailed, now: float) -> list[Action]:
        room = self._rooms.get(event.room)
        if room is None:
            return []
        actions = self._close_leg(room, event.role)
        if not actions:
            return []
        return actions + self._fate(room, event.role, event.failure)

    def _closed(self, event: LegClosed, now: float) -> list[Action]:
        room = self._rooms.get(event.room)
        if room is None or room.legs[event.role] is not LegState.ABORTING:
            return []
        return self._close_leg(room, event.role)

    def _group_lost(self, event: GroupLost, now: float) -> list[Action]:
        self._lost[event.group] = max(event.epoch, self._lost.get(event.group, -1))
        return self._lose(event.group, lambda epoch: epoch <= event.epoch)

    def _group_up(self, event: GroupUp, now: float) -> list[Action]:
        # A group that was removed and made anew may start at an epoch that was lost before.
        self._lost[event.group] = event.epoch - 1
        return self._lose(event.group, lambda epoch: epoch != event.epoch)

    def _lose(self, group: str, gone: Callable[[int], bool]) -> list[Action]:
        failure = Failure(kind=FailureKind.GROUP_LOST, message=f"group {group} was lost", retry_after=2.0)
        actions: list[Action] = []
        for room in list(self._rooms.values()):
            for role in Role:
                target = room.pair.target(role)
                if target.group != group or not gone(target.epoch):
                    continue
                aborted = self._abort_leg(room, role, "group_lost", notify=False)
                if aborted:
                    actions += aborted + self._fate(room, role, failure)
        return actions

    # Time

    def _tick(self, event: Tick, now: float) -> list[Action]:
        actions: list[Action] = []
        while self._lingering and self._lingering[0][0] <= now:
            _, number = self._lingering.popleft()
            room = self._rooms.get(number)
            if room is not None:
                actions += self._abort_room(room, "linger")
        while self._timers and self._timers[0][0] <= now:
            _, _, name = heapq.heappop(self._timers)
            request = self._requests.get(name)
            if request is None:
                continue
            if request.due() > now:
                self._arm(request)
            else:
                actions += self._overdue(request, now)
        return actions

    def _overdue(self, request: _Request, now: float) -> list[Action]:
        if now >= request.submit.deadline:
            failure = Failure(kind=FailureKind.DEADLINE, message="the request's time is over")
            return self._fail(request, failure)
        if request.delivered:
            message = f"no token for {request.submit.stall_s:g} s"
            return self._fail(request, Failure(kind=FailureKind.STALLED, message=message))
        room, request.room = request.room, None
        assert room is not None, "a request without a room waits for nothing but its deadline"
        message = f"no first token within {request.submit.first_token_s:g} s"
        failure = Failure(kind=FailureKind.NO_FIRST_TOKEN, message=message)
        avoid = frozenset({room.pair.prefill.group, room.pair.decode.group})
        return self._abort_room(room, "no_first_token") + self._again(request, avoid, failure)

    def _arm(self, request: _Request) -> None:
        # At least one entry per request is at or before its due time; stale ones are dropped or put back by `_tick`.
        self.timers_set += 1
        if len(self._timers) > 64 + 4 * len(self._requests):
            # Nearly all are of requests that are over; left there, they would pile up for as long as a token may take.
            self._timers = [(one.due(), serial, one.name) for serial, one in enumerate(self._requests.values())]
            heapq.heapify(self._timers)
        heapq.heappush(self._timers, (request.due(), self.timers_set, request.name))

    # Consequences

    def _fate(self, room: _Room, role: Role, failure: Failure) -> list[Action]:
        """One leg is lost: what becomes of the other, and of the request."""
        if role is Role.PREFILL and room.produced:
            return []
        request = self._current(room)
        actions = self._abort_room(room, "partner_failed")
        if request is None:
            return actions
        request.room = None
        return actions + self._again(request, frozenset({room.pair.target(role).group}), failure)

    def _again(self, request: _Request, avoid: frozenset[str], failure: Failure) -> list[Action]:
        """A fresh attempt if the request may have one, else its end."""
        if request.delivered or failure.kind in FINAL or request.attempts >= self._max_attempts:
            return self._fail(request, failure)
        request.attempts += 1
        request.avoid |= avoid
        self._arm(request)
        return [self._need_pair(request)]

    def _fail(self, request: _Request, failure: Failure) -> list[Action]:
        del self._requests[request.name]
        actions = self._abort_room(request.room, failure.kind.value)
        actions.append(Fail(request=request.name, failure=failure, delivered=request.delivered))
        return actions

    def _need_pair(self, request: _Request) -> NeedPair:
        return NeedPair(request=request.name, attempt=request.attempts, avoid=request.avoid)

    def _current(self, room: _Room) -> _Request | None:
        """The request that this room still answers, if any."""
        request = self._requests.get(room.request)
        return request if request is not None and request.room is room else None

    def _abort_room(self, room: _Room | None, reason: str) -> list[Action]:
        if room is None:
            return []
        return [action for role in Role for action in self._abort_leg(room, role, reason, notify=True)]

    def _abort_leg(self, room: _Room, role: Role, reason: str, *, notify: bool) -> list[Action]:
        if room.legs[role] in (LegState.ABORTING, LegState.CLOSED):
            return []
        room.legs[role] = LegState.ABORTING
        return [AbortLeg(room=room.room, role=role, target=room.pair.target(role), notify=notify, reason=reason)]

    def _close_leg(self, room: _Room, role: Role) -> list[Action]:
        if room.legs[role] is LegState.CLOSED:
            return []
        room.legs[role] = LegState.CLOSED
        actions: list[Action] = [LegReleased(room=room.room, role=role, target=room.pair.target(role))]
        if all(state is LegState.CLOSED for state in room.legs.values()):
            del self._rooms[room.room]
            actions.append(RoomClosed(room=room.room))
        return actions
