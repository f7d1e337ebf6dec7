"""What a pair table has open, and what follows when a leg, a pair or a whole request ends. `pairing.py` says when."""

from __future__ import annotations

from collections import deque

from tandem.core.deadlines import Deadlines
from tandem.core.pair_events import Action, Deliver, Fail, Failure, FailureKind, Finish, NeedPair
from tandem.core.pair_records import FINAL, UNSEEN, LegState, Request, Retries, Room
from tandem.core.pair_times import DOUBT_S
from tandem.core.types import Role


class PairBook:
    """The requests and rooms of a pair table."""

    def __init__(self, retries: Retries, linger_s: float) -> None:
        self._retries = retries
        self._linger_s = linger_s
        self._requests: dict[str, Request] = {}
        self._rooms: dict[int, Room] = {}
        self._parked: dict[str, Request] = {}
        """Requests that wait for a group to come up, in the order in which they began to."""
        self._timers = Deadlines()
        self._lingering: deque[tuple[float, int]] = deque()

    @property
    def timers_set(self) -> int:
        """Rises with each deadline that is set: as long as it stays, `next_deadline` comes no earlier than before."""
        return self._timers.set

    @property
    def open_requests(self) -> int:
        return len(self._requests)

    @property
    def open_rooms(self) -> int:
        return len(self._rooms)

    @property
    def parked(self) -> int:
        """Requests that wait for a group to come up."""
        return len(self._parked)

    def has_room(self, room: int) -> bool:
        """Whether the number is taken: SGLang does not survive a room that is used twice."""
        return room in self._rooms

    def decoding_on(self, group: str, epoch: int) -> list[str]:
        """The requests whose present room decodes there: what `Move` would move."""
        return [
            request.name
            for request in self._requests.values()
            if request.room is not None and request.room.may_leave(group, epoch)
        ]

    def next_deadline(self) -> float | None:
        """When `Tick` is due at the latest; None = nothing waits."""
        due = [self._timers.next(), self._lingering[0][0] if self._lingering else None]
        return min((one for one in due if one is not None), default=None)

    # Timers

    def _arm(self, request: Request) -> None:
        if self._timers.crowded(self._requests):
            self._timers.renew((one.name, one.due()) for one in self._requests.values())
        self._timers.put(request.name, request.due())

    # Tokens

    def _show(self, room: Room, request: Request, ids: list[int]) -> list[Action]:
        """The first tokens of the room go to the client; from now on the answer has this room's weights."""
        room.shown = True
        request.version = room.version
        request.progressed(len(ids))
        # The time for a stall may end before that for the first token would have.
        self._arm(request)
        return [Deliver(request=request.name, room=room.room, ids=ids)]

    def _release(self, room: Room, request: Request, now: float) -> list[Action]:
        """What was held is good, or may be held no longer."""
        held, room.held = room.held or [], None
        actions = self._show(room, request, held)
        return actions if room.reason is None else actions + self._complete(room, request, room.reason, now)

    def _complete(self, room: Room, request: Request, reason: str, now: float) -> list[Action]:
        """Decode has finished well, and all that it said is with the client."""
        if room.legs[Role.PREFILL] is not LegState.CLOSED:
            self._lingering.append((now + self._linger_s, room.room))
            self._timers.set += 1
        return [self._finish(request, reason)]

    def _bad_kv(self, room: Room, request: Request, now: float) -> list[Action]:
        message = "prefill and decode have different first tokens"
        return self._distrust(room, request, Failure(kind=FailureKind.BAD_KV, message=message), now)

    def _distrust(self, room: Room, request: Request, failure: Failure, now: float) -> list[Action]:
        """What decode says is not to be trusted: once it is shown it cannot be taken back, and the answer fails."""
        if room.shown:
            return self._fail(request, failure)
        request.room = None
        avoid = frozenset({room.pair.prefill.group, room.pair.decode.group})
        return room.abort(failure.kind.value) + self._again(request, avoid, failure, now)

    # Failures

    def _fate(self, room: Room, role: Role, failure: Failure, now: float) -> list[Action]:
        """One leg is lost: what becomes of the other, and of the request."""
        request = self._current(room)
        if role is Role.PREFILL and room.shown:
            if request is not None and failure.kind is FailureKind.BAD_KV:
                return self._distrust(room, request, failure, now)
            if request is None or failure.kind is not FailureKind.ABORTED:
                return []
            # SGLang may say so of a transfer that decode took for complete.
            # But if decode gave up first, SGLang passes that on to prefill, and decode's own word is on its way.
            message = f"prefill gave up after decode had begun: {failure.message}"
            room.doubt = Failure(kind=FailureKind.BAD_KV, message=message)
            room.held, room.hold_until = [], now + DOUBT_S
            self._arm(request)
            return []
        if request is None:
            return [] if role is Role.PREFILL and room.produced else room.abort("partner_failed")
        request.room = None
        actions = room.abort("partner_failed")
        return actions + self._again(request, frozenset({room.pair.target(role).group}), failure, now)

    def _again(self, request: Request, avoid: frozenset[str], failure: Failure, now: float) -> list[Action]:
        """A fresh attempt if the request may have one, else its end."""
        if request.complete:
            # Only the word of its end was lost.
            return [self._finish(request, "length")]
        request.attempt += 1
        request.tries += 1
        request.losses += failure.kind not in UNSEEN
        most = self._retries
        spent = request.losses >= most.losses or request.tries > most.tries or request.attempt > most.most
        if failure.kind in FINAL or spent:
            return self._fail(request, failure)
        request.avoid |= avoid
        request.why = failure.kind.value
        if delay := most.delay(request.tries):
            request.wake = now + delay
            self._arm(request)
            return []
        self._arm(request)
        return [self._need_pair(request)]

    def _finish(self, request: Request, reason: str) -> Finish:
        self._forget(request)
        return Finish(request=request.name, reason=reason)

    def _fail(self, request: Request, failure: Failure) -> list[Action]:
        self._forget(request)
        actions = [] if request.room is None else request.room.abort(failure.kind.value)
        actions.append(Fail(request=request.name, failure=failure, delivered=request.delivered))
        return actions

    def _too_late(self, request: Request) -> list[Action]:
        return self._fail(request, Failure(kind=FailureKind.DEADLINE, message="the request's time is over"))

    def _forget(self, request: Request) -> None:
        del self._requests[request.name]
        self._parked.pop(request.name, None)

    def _need_pair(self, request: Request) -> NeedPair:
        request.asking = True
        request.wake = None
        version = request.version if request.delivered else None
        return NeedPair(
            request=request.name, attempt=request.attempt, avoid=request.avoid, version=version, why=request.why
        )

    def _current(self, room: Room) -> Request | None:
        """The request that this room still answers, if any."""
        request = self._requests.get(room.request)
        return request if request is not None and request.room is room else None

    def _close(self, room: Room, role: Role) -> list[Action]:
        actions = room.close_leg(role)
        if room.closed:
            self._rooms.pop(room.room, None)
        return actions
