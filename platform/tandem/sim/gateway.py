"""A simulated gateway replica: the real pair table and the real router, driven as `gateway/pairing/pairs.py` does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

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
    LegReleased,
    LegTokens,
    Move,
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
from tandem.core.pair_times import CONFIRM_KV_S
from tandem.core.pairing import PairTable, room_number
from tandem.core.routing import NoCapacity, Router
from tandem.core.types import Group, GroupState, Role
from tandem.sim.ledger import Attempt, Invariant, Tracked
from tandem.sim.legs import SimLeg
from tandem.sim.schedule import Fault, FaultKind
from tandem.sim.view import View

if TYPE_CHECKING:
    from tandem.sim.world import World

LOST = frozenset({GroupState.FAILED, GroupState.GONE})
FIRST_TOKEN_S = 4.0
STALL_S = 2.0
CAPACITY_S = 8.0
LINGER_S = 3.0
AGAIN_S = 1.0
"""As in `gateway/pairing/leaving.py`."""


class SimGateway:
    """One gateway: its table, its router, its legs, and what it knows of the groups."""

    def __init__(self, world: World, number: int, table: PairTable) -> None:
        self.world = world
        self.number = number
        self.table = table
        self.router = Router()
        self.view = View(world.clock.now)
        self.usage: dict[str, int] = {}
        """Request → tokens it is charged for."""
        self.news_lost_until = 0.0
        self.news_late_until = 0.0
        self.up_at = world.clock.now
        self.dead = False
        self._seen: dict[str, int] = {}
        self._epochs: dict[str, int] = {}
        self._tracked: dict[str, Tracked] = {}
        self._legs: dict[tuple[int, Role], SimLeg] = {}
        self._attempts: dict[int, Attempt] = {}
        """All that ever were: what was held may be delivered when its room is closed."""
        self._open: set[int] = set()
        """Rooms that are not closed."""
        self._settle: list[tuple[Attempt, bool]] = []
        self._leaving: dict[str, int] = {}
        self._timer = 0
        self._timer_due: float | None = None
        self._timers_seen = 0

    # Requests

    def submit(self, tracked: Tracked) -> None:
        """A request, or the rest of one that another gateway has begun."""
        now = self.world.clock.now
        self._tracked[tracked.name] = tracked
        tracked.deadline = now + tracked.timeout
        for fault in tracked.faults:
            if fault.kind is FaultKind.CLIENT_GONE:
                self.world.clock.at(
                    now + fault.seconds, self._give_up, tracked, ClientGone(request=tracked.name), fault
                )
            elif fault.kind is FaultKind.WITHDRAWN:
                failure = Failure(kind=FailureKind.STOPPING, message="the gateway goes down")
                event = Withdraw(request=tracked.name, failure=failure)
                self.world.clock.at(now + fault.seconds, self._give_up, tracked, event, fault)
        self.tell(
            Submit(
                request=tracked.name,
                deadline=tracked.deadline,
                first_token_s=FIRST_TOKEN_S,
                stall_s=STALL_S,
                capacity_s=CAPACITY_S,
                hold_s=CONFIRM_KV_S,
                limit=tracked.ask.limit,
                delivered=len(tracked.delivered),
                version=tracked.version,
            )
        )

    def die(self) -> list[Tracked]:
        """The process is gone: it does nothing more, and its connections break. Returns what it leaves unanswered."""
        self.dead = True
        for leg in self._legs.values():
            leg.orphan()
        return list(self._tracked.values())

    def _give_up(self, tracked: Tracked, event: Event, fault: Fault) -> None:
        """Nobody wants the rest: it must be over at once."""
        if tracked.ended is None and not self.dead:
            self.world.ledger.took_place(fault.kind)
            self.tell(event)
            if tracked.ended is None:
                self.world.ledger.fail(Invariant.LATE, f"goes on after {fault.kind.value}", tracked)

    # Groups

    def hear(self, name: str, revision: int, group: Group | None) -> None:
        """What the store says of a group. What is older than what is known is dropped: a watch keeps the order."""
        if self.dead or revision <= self._seen.get(name, 0):
            return
        self._seen[name] = revision
        if self.world.story is not None:
            self.world.tell(
                f"gateway {self.number} hears: {name} {f'{group.state}/{group.epoch}' if group else 'gone'}"
            )
        known = self._epochs.get(name, -1 if group is None else group.epoch)
        self.view.put(name, group, self.world.versions, self.world.clock.now)
        if group is None:
            self._leaving.pop(name, None)
            self.router.remove(name)
            if self._epochs.pop(name, None) is not None:
                self._lose(name, lambda epoch: epoch <= known, GroupLost(group=name, epoch=known))
            return
        self._epochs[name] = group.epoch
        self.router.put(group)
        self._leaving[name] = self._leaving.get(name, 0) + 1
        if group.state is GroupState.DRAINING and group.migrate_at:
            self.world.clock.at(group.migrate_at, self._leave, name, self._leaving[name])
        if group.routable:
            self._lose(name, lambda epoch: epoch != group.epoch, GroupUp(group=name, epoch=group.epoch))
        elif group.state in LOST or known != group.epoch:
            lost = max(known, group.epoch if group.state in LOST else group.epoch - 1)
            self._lose(name, lambda epoch: epoch <= lost, GroupLost(group=name, epoch=lost))

    def _lose(self, name: str, gone: Callable[[int], bool], event: Event) -> None:
        """Tell the table; nothing may then still run on what is lost."""
        lost = [leg for leg in self._legs.values() if leg.target.group == name and gone(leg.target.epoch)]
        for leg in lost:
            cause = self.world.engines[leg.target.url].cause
            if cause is None:
                self.world.ledger.fail(Invariant.CRASHED, f"{leg} is said to be lost, and is not")
            self.world.ledger.hit(leg.attempt, cause, self.world.clock.now)
        self.tell(event)
        for leg in lost:
            if not leg.aborting and not leg.reported:
                self.world.ledger.fail(
                    Invariant.LEAKED, f"{leg} goes on, though the group is lost", leg.attempt.request
                )

    def _leave(self, name: str, serial: int) -> None:
        """A group leaves: take its streams elsewhere."""
        group = self.view.groups.get(name)
        if self.dead or group is None or self._leaving.get(name) != serial:
            return
        for request in self.table.decoding_on(name, group.epoch):
            tracked = self._tracked[request]
            if self.router.shortage(tracked.version) is None:
                last = tracked.attempts[-1]
                last.moved = True
                tracked.lean -= tracked.lean > 0
                self.tell(Move(request=request, group=name, epoch=group.epoch))
                if tracked.ended is None and tracked.attempts[-1] is last and not last.legs[Role.DECODE].reported:
                    self.world.ledger.fail(Invariant.LATE, f"was not moved off {name}, which leaves", tracked)
        if self.table.decoding_on(name, group.epoch):
            self.world.clock.after(AGAIN_S, self._leave, name, serial)

    # The table

    def tell(self, event: Event) -> None:
        """Give the table an event and carry out all that follows."""
        if self.dead:
            return
        now = self.world.clock.now
        if self.world.story is not None:
            self.world.tell(f"gateway {self.number} ← {event}")
        actions = self._handle(event, now)
        while actions:
            further: list[Action] = []
            for action in actions:
                if type(action) is Deliver:
                    self._deliver(action, now)
                elif (answer := self._do(action, now)) is not None:
                    further += self._handle(answer, now)
            actions = further
        if self._settle:
            self._check_settled()
        if self.table.timers_set != self._timers_seen:
            self._arm()

    def _handle(self, event: Event, now: float) -> list[Action]:
        try:
            actions = self.table.handle(event, now)
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError) as error:
            self.world.ledger.fail(Invariant.CRASHED, f"{event} raised {error!r}")
        if self.world.story is not None:
            for action in actions:
                self.world.tell(f"gateway {self.number} → {action}")
        return actions

    def _deliver(self, action: Deliver, now: float) -> None:
        self.router.grow(action.room, len(action.ids), now)
        tracked = self._tracked.get(action.request)
        attempt = self._attempts.get(action.room)
        if tracked is None or attempt is None or attempt.request is not tracked:
            self.world.ledger.fail(Invariant.DOUBLED, f"{action.request} gets tokens of a room that is over")
        self.world.ledger.delivered(attempt, action.ids, now)
        if tracked.faults:
            for fault in tracked.faults:
                if fault.kind is FaultKind.SATISFIED and len(tracked.delivered) >= fault.after:
                    self.world.clock.after(0.0, self._give_up, tracked, Satisfied(request=tracked.name), fault)

    def _do(self, action: Action, now: float) -> Event | None:
        match action:
            case NeedPair():
                return self._choose(action, now)
            case SendLeg():
                self._send(action, now)
            case AbortLeg(room=room, role=role, notify=notify):
                leg = self._legs.get((room, role))
                if leg is None:
                    self.world.ledger.fail(Invariant.LEAKED, f"the {role} leg of room {room} is aborted after its end")
                leg.abort(notify=notify)
            case LegReleased(room=room, role=role):
                self.router.release(room, role, now)
                leg = self._legs.pop((room, role), None)
                if leg is None or not leg.reported:
                    self.world.ledger.fail(Invariant.LEAKED, f"the {role} leg of room {room} is released, not over")
            case Finish(request=request) | Fail(request=request):
                self._over(request, action, now)
            case RoomClosed(room=room):
                if room not in self._open or not all(leg.reported for leg in self._attempts[room].legs.values()):
                    self.world.ledger.fail(Invariant.LEAKED, f"room {room} is closed, not over")
                self._open.discard(room)
            case _:
                self.world.ledger.fail(Invariant.CRASHED, f"an action of no known kind: {action}")
        return None

    def _choose(self, need: NeedPair, now: float) -> Event:
        tracked = self._tracked.get(need.request)
        if tracked is None:
            self.world.ledger.fail(Invariant.DOUBLED, f"{need.request} wants a pair after its end")
        self.world.ledger.need(need, tracked)
        if tracked.attempts:
            self._settle.append((tracked.attempts[-1], False))
        if tracked.delivered and len(tracked.route.prompt) != len(tracked.prompt) + len(tracked.delivered):
            tracked.route = tracked.first_ask.behind(tracked.delivered)
        pair = self.router.choose(tracked.route, avoid=need.avoid, version=need.version, now=now)
        if isinstance(pair, NoCapacity):
            failure = Failure(kind=FailureKind.NO_CAPACITY, message=pair.reason, retry_after=pair.retry_after)
            return Refused(request=need.request, failure=failure, coming=pair.coming)
        room = 0
        while not room or self.table.has_room(room):
            room = room_number(self.world.room_bits(), dp_size=pair.prefill.dp_size, dp_rank=pair.prefill.dp_rank)
        version = self.view.groups[pair.decode.group].weight_version
        return Opened(request=need.request, room=room, pair=pair, version=version)

    def _send(self, send: SendLeg, now: float) -> None:
        tracked = self._tracked.get(send.request)
        if tracked is None:
            self.world.ledger.fail(Invariant.DOUBLED, f"{send.request} is sent after its end")
        target = send.pair.target(send.role)
        group = self.view.groups.get(target.group)
        if group is None or not group.routable or group.epoch != target.epoch:
            self.world.ledger.fail(Invariant.MISDIRECTED, f"is sent to {target.group}/{target.epoch}", tracked)
        attempt = self._attempts.get(send.room)
        if attempt is None:
            number = len(tracked.attempts) + 1
            faults = self.world.faults_of(tracked, number)
            version = self.world.engines[send.pair.decode.url].version
            attempt = self._attempts[send.room] = Attempt(tracked, number, send.room, version, faults)
            self._open.add(send.room)
            self.world.ledger.opened(attempt)
        elif send.role in attempt.legs:
            self.world.ledger.fail(Invariant.ROOM, f"room {send.room} is used again", tracked)
        uncached = send.pair.choice.uncached_tokens
        known = len(tracked.prompt) + len(tracked.delivered)
        self.router.open(send.room, target, known, uncached=uncached, now=now)
        leg = SimLeg(self, attempt, send.role, target, self.world.jitter(tracked, attempt, send.role))
        attempt.legs[send.role] = self._legs[send.room, send.role] = leg
        leg.start()

    def _over(self, request: str, end: Finish | Fail, now: float) -> None:
        ledger = self.world.ledger
        tracked = self._tracked.pop(request, None)
        if tracked is None:
            ledger.fail(Invariant.DOUBLED, f"{request} ends twice")
        if request in self.usage:
            ledger.fail(Invariant.USAGE, "is counted twice", tracked)
        self.usage[request] = len(tracked.delivered)
        if tracked.attempts:
            self._settle.append((tracked.attempts[-1], isinstance(end, Finish)))
        if isinstance(end, Finish):
            ledger.finished(tracked, end)
            return
        ledger.failed(
            tracked,
            end,
            now,
            dry_s=self.view.dry_s(tracked.version, now),
            coming=self.view.coming(tracked.version),
            wait=CAPACITY_S,
        )

    def _check_settled(self) -> None:
        """Of an attempt that is over nothing may run on; but prefill's end may come after decode's."""
        for attempt, well in self._settle:
            for leg in attempt.legs.values():
                if not (leg.reported or leg.aborting or (well and leg.role is Role.PREFILL)):
                    self.world.ledger.fail(Invariant.LEAKED, f"{leg} goes on for nobody", attempt.request)
        self._settle.clear()

    # What legs report

    def heard(self, leg: SimLeg, ids: list[int]) -> None:
        """Decode has said tokens."""
        self.tell(LegTokens(room=leg.room, ids=ids))

    def leg_ended(self, leg: SimLeg) -> None:
        """The engine is done with the leg; noted before the table hears of it."""
        if leg.role is Role.PREFILL:
            self.router.prefilled(leg.room, cached=0, now=self.world.clock.now)

    # Time

    def _arm(self) -> None:
        self._timers_seen = self.table.timers_set
        due = self.table.next_deadline()
        if due is None or (self._timer_due is not None and self._timer_due <= due):
            return
        self._timer += 1
        self._timer_due = due
        self.world.clock.at(due, self._tick, self._timer)

    def _tick(self, serial: int) -> None:
        if serial != self._timer or self.dead:
            return
        self._timer_due = None
        self.tell(Tick())
        due, now = self.table.next_deadline(), self.world.clock.now
        if due is not None and due <= now:
            self.world.ledger.fail(
                Invariant.LATE, f"gateway {self.number} has done nothing about what was due at {due}"
            )
        self._arm()

    # The end

    def check_empty(self) -> None:
        """Nothing may be left."""
        left = {
            "requests in the table": self.table.open_requests,
            "rooms in the table": self.table.open_rooms,
            "parked requests": self.table.parked,
            "legs in the router's accounts": self.router.open_legs,
            "ranks with rooms in the router's accounts": len(self.router.loads()),
            "rooms and tokens in the router's ranks": sum(
                rank.rooms + rank.waiting_tokens for rank in self.router.ranks()
            ),
            "legs": len(self._legs),
            "rooms": len(self._open),
        }
        for what, count in left.items():
            if count:
                self.world.ledger.fail(Invariant.LEAKED, f"gateway {self.number} still has {count} {what}")
