"""Drives the pair table: carries out its actions on real engines, and tells it what comes of them.

One `PairDriver` per gateway replica, on one event loop. Legs read the engines' streams; the table decides everything
else.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable

import msgspec

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
    LegFailed,
    LegReleased,
    Move,
    NeedPair,
    Opened,
    Refused,
    Satisfied,
    SendLeg,
    Submit,
    Tick,
    Withdraw,
)
from tandem.core.pairing import PairTable, room_number
from tandem.core.routing import NoCapacity, Router
from tandem.core.types import Group, GroupState, Role
from tandem.engine.client import Ended, EngineClient
from tandem.gateway.observe.metrics import Metrics
from tandem.gateway.pairing.engine_body import leg_body
from tandem.gateway.pairing.leaving import Leaving
from tandem.gateway.pairing.legs import Leg, outcome_of
from tandem.gateway.pairing.ticket import Ticket, request_fields

_LOST = frozenset({GroupState.FAILED, GroupState.GONE})


class Patience(msgspec.Struct, frozen=True, kw_only=True):
    """How long what may take. All in seconds; see `pair_events.Submit`."""

    timeout: float
    first_token_s: float
    stall_s: float
    capacity_s: float = 0.0
    hold_s: float = 0.0


class PairDriver:
    """The pair table with hands. All methods belong to the loop that it was made on."""

    def __init__(
        self,
        client: EngineClient,
        metrics: Metrics,
        router: Router | None = None,
        *,
        rooms: Callable[[], int] | None = None,
    ) -> None:
        """`rooms` draws 63 random bits; the default is the system's random source."""
        self.incarnation = secrets.token_hex(6)
        """What the engines' request ids of this driver begin with, and of no other."""
        self.router = Router() if router is None else router
        self.table = PairTable()
        self.kv_bytes_per_token = 0
        """What a prompt's token hands from prefill to decode; 0 = not known."""
        self._client = client
        self._metrics = metrics
        self._draw = rooms or (lambda: secrets.randbits(63))
        self._loop = asyncio.get_running_loop()
        self._tickets: dict[str, Ticket] = {}
        self._legs: dict[tuple[int, Role], Leg] = {}
        self._epochs: dict[str, int] = {}
        self._versions: dict[str, str] = {}
        """Weight version of each group."""
        self.tasks: set[asyncio.Task[None]] = set()
        """What runs for legs now; the loop itself keeps no strong reference."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._timers_seen = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._leaving = Leaving(self._move_off)

    # Requests

    def submit(self, ticket: Ticket, patience: Patience) -> None:
        """Put a request into the table; its news come through the ticket. Raises ValueError if its name is taken."""
        if ticket.request in self._tickets:
            raise ValueError(f"request {ticket.request} is already on its way")
        self._tickets[ticket.request] = ticket
        self._idle.clear()
        self.tell(
            Submit(
                request=ticket.request,
                deadline=self._loop.time() + patience.timeout,
                first_token_s=patience.first_token_s,
                stall_s=patience.stall_s,
                capacity_s=patience.capacity_s,
                hold_s=patience.hold_s,
                limit=ticket.limit,
                **request_fields(ticket),
            )
        )

    def client_gone(self, ticket: Ticket) -> None:
        self.tell(ClientGone(request=ticket.request))

    def satisfied(self, ticket: Ticket) -> None:
        self.tell(Satisfied(request=ticket.request))

    def withdraw_all(self) -> None:
        """End every request with an error: the gateway cannot wait any longer."""
        failure = Failure(kind=FailureKind.STOPPING, message="this gateway is going down; try again", retry_after=1.0)
        for request in list(self._tickets):
            self.tell(Withdraw(request=request, failure=failure))

    # Groups

    def put_group(self, group: Group) -> None:
        """A group is there, or has changed."""
        known = self._epochs.get(group.group, group.epoch)
        self._epochs[group.group] = group.epoch
        self._versions[group.group] = group.weight_version
        self.router.put(group)
        self._leaving.put(group)
        if group.routable:
            self.tell(GroupUp(group=group.group, epoch=group.epoch))
        elif group.state in _LOST or known != group.epoch:
            # One that starts anew has lost what ran before; cordoned and draining ones work on.
            running = group.epoch if group.state in _LOST else group.epoch - 1
            self.tell(GroupLost(group=group.group, epoch=max(known, running)))

    def remove_group(self, name: str) -> None:
        """A group is gone."""
        self.router.remove(name)
        self._leaving.remove(name)
        epoch = self._epochs.pop(name, None)
        self._versions.pop(name, None)
        if epoch is not None:
            self.tell(GroupLost(group=name, epoch=epoch))

    async def drain(self, within: float) -> None:
        """Wait until no request and no room is open; after `within` seconds end what is left."""
        try:
            async with asyncio.timeout(within):
                await self._idle.wait()
        except TimeoutError:
            self.withdraw_all()
            for leg in list(self._legs.values()):
                leg.cut()
            if self.tasks:
                await asyncio.wait(self.tasks, timeout=1.0)
        if self._timer is not None:
            self._timer.cancel()
        self._leaving.close()

    def _move_off(self, group: Group) -> bool:
        """Take the streams that decode on the group to others; whether all could be."""
        names = self.table.decoding_on(group.group, group.epoch)
        for name in names:
            version = self._tickets[name].weight_version if self._tickets[name].history else None
            if self.router.shortage(version) is None:
                self.tell(Move(request=name, group=group.group, epoch=group.epoch))
        return not self.table.decoding_on(group.group, group.epoch)

    # The table

    def tell(self, event: Event) -> None:
        """Give the table an event and carry out all that follows."""
        now = self._loop.time()
        actions = self.table.handle(event, now)
        while actions:
            further: list[Action] = []
            for action in actions:
                if type(action) is Deliver:  # most of all there is
                    self._deliver(action, now)
                elif (answer := self._do(action, now)) is not None:
                    further += self.table.handle(answer, now)
            actions = further
        if self.table.timers_set != self._timers_seen:
            self._arm()
        if not self.table.open_requests and not self.table.open_rooms:
            self._idle.set()

    def _deliver(self, action: Deliver, now: float) -> None:
        self.router.grow(action.room, len(action.ids), now)
        ticket = self._tickets[action.request]
        if ticket.prefilled is not None:
            self._metrics.kv_transferred(now - ticket.prefilled, len(ticket.prompt) * self.kv_bytes_per_token)
            ticket.prefilled = None
        ticket.deliver(action.room, action.ids)

    def _do(self, action: Action, now: float) -> Event | None:
        match action:
            case NeedPair():
                return self._choose(action)
            case SendLeg(request=request, room=room, role=role):
                self._send(action)
            case AbortLeg(room=room, role=role, notify=notify, reason=reason):
                self._metrics.aborts.labels(role.value, reason).inc()
                self._legs[room, role].abort(notify=notify)
            case LegReleased(room=room, role=role):
                self.router.release(room, role, now)
                self._legs.pop((room, role), None)
            case Finish(request=request) | Fail(request=request):
                self._tickets.pop(request).finish(action)
            case _:  # RoomClosed
                self._metrics.open_rooms.set(self.table.open_rooms)
        return None

    def _choose(self, need: NeedPair) -> Event:
        ticket = self._tickets[need.request]
        if need.attempt > ticket.attempts:
            ticket.attempts = need.attempt
            if need.attempt > 1:
                self._note_retry(ticket, need)
        pair = self.router.choose(ticket.ask, avoid=need.avoid, version=need.version, now=self._loop.time())
        if isinstance(pair, NoCapacity):
            failure = Failure(kind=FailureKind.NO_CAPACITY, message=pair.reason, retry_after=pair.retry_after)
            return Refused(request=need.request, failure=failure, coming=pair.coming)
        room = 0
        while not room or self.table.has_room(room):
            room = room_number(self._draw(), dp_size=pair.prefill.dp_size, dp_rank=pair.prefill.dp_rank)
        ticket.pair = pair
        if ticket.trace is not None:
            ticket.trace.routed(pair, need.attempt)
        ticket.ended = None
        ticket.weight_version = self._versions.get(pair.decode.group, "")
        return Opened(request=need.request, room=room, pair=pair, version=ticket.weight_version)

    def _note_retry(self, ticket: Ticket, need: NeedPair) -> None:
        """An attempt beyond the first: a migration, if the client has tokens."""
        self._metrics.retries.inc()
        if ticket.history:
            ticket.migrations += 1
            self._metrics.migrated(need.why)
        if ticket.trace is not None:
            ticket.trace.event("migration" if ticket.history else "retry")

    def _send(self, send: SendLeg) -> None:
        ticket = self._tickets[send.request]
        target = send.pair.target(send.role)
        uncached = send.pair.choice.uncached_tokens if send.pair.choice is not None else None
        known = len(ticket.prompt) + len(ticket.history)
        self.router.open(send.room, target, known, uncached=uncached, now=self._loop.time())
        common = ticket.asked.common(ticket.history)
        rid, body = leg_body(send.pair, send.role, send.room, common, self.incarnation)
        trace = None
        if ticket.trace is not None:
            trace = ticket.trace.leg(
                send.role.value,
                group=target.group,
                epoch=target.epoch,
                dp_rank=target.dp_rank,
                room=send.room,
                attempt=ticket.attempts,
            )
        leg = Leg(self, self._client, send.room, send.role, target, rid, body, ticket, trace)
        self._legs[send.room, send.role] = leg
        leg.start()
        if send.role is Role.PREFILL:
            self._metrics.rooms_opened.inc()
            self._metrics.open_rooms.set(self.table.open_rooms)

    # What legs report beside their events

    def leg_ended(self, leg: Leg, ended: Ended) -> None:
        """The engine is done with the leg; noted before the table hears of it."""
        ticket = leg.ticket
        if leg.role is Role.PREFILL:
            # Prefill is where a prefix is found; decode gets the whole KV either way. What a further pair finds is its
            # own affair: the client pays for one.
            if not ticket.history:
                ticket.cached_tokens = ended.cached_tokens
            ticket.prefilled = self._loop.time()
            self.router.prefilled(leg.room, cached=ended.cached_tokens, now=ticket.prefilled)
            if ticket.pair is not None and ticket.pair.choice is not None:
                self._metrics.prefix(predicted=ticket.pair.choice.cached_tokens, found=ended.cached_tokens)
        else:
            ticket.ended = ended

    def leg_over(self, leg: Leg, event: Event, seconds: float) -> None:
        """The leg reports its end, after this time."""
        if isinstance(event, LegFailed):
            self._metrics.leg_failures.labels(leg.role.value, event.failure.kind.value).inc()
        self._metrics.leg_ended(leg.role.value, leg.target.group, outcome_of(event), seconds)

    def _arm(self) -> None:
        self._timers_seen = self.table.timers_set
        due = self.table.next_deadline()
        if due is None or (self._timer is not None and self._timer_due <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        # Kept here, as uvloop's handle of a time that is due already does not tell it.
        self._timer, self._timer_due = self._loop.call_at(due, self._tick), due

    def _tick(self) -> None:
        self._timer = None
        self.tell(Tick())
        self._arm()
