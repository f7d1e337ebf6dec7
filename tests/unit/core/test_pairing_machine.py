"""Whatever happens in whatever order, the pair table keeps its promises."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

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
    Move,
    NeedPair,
    Opened,
    Refused,
    RoomClosed,
    Satisfied,
    SendLeg,
    Submit,
    Tick,
)
from tandem.core.pair_records import Retries
from tandem.core.pairing import PairTable
from tandem.core.routing import Pair, Target
from tandem.core.types import Role

RETRIES = Retries(losses=3, tries=5, most=12, delay_s=0.5, delay_most_s=1)
FIRST_TOKEN_S, STALL_S, CAPACITY_S, HOLD_S, TOTAL_S = 4.0, 2.0, 3.0, 1.0, 20.0
LIMIT = 12
roles = st.sampled_from(Role)
picks = st.integers(0, 10**6)
prefills = st.sampled_from(["p0", "p1"])
decodes = st.sampled_from(["d0", "d1"])
FAILURES = [FailureKind.UNREACHABLE, FailureKind.BROKEN, FailureKind.ABORTED, FailureKind.BAD_REQUEST]
kinds = st.sampled_from(FAILURES)


class Pairs(RuleBasedStateMachine):
    """A faulty world around the table; `self.running` is what the engines still work on."""

    def __init__(self, table: type[PairTable] = PairTable) -> None:
        super().__init__()
        self.table = table(retries=RETRIES, linger_s=1)
        self.now = 0.0
        self.names = itertools.count()
        self.room_numbers = itertools.count(1)
        self.epochs = dict.fromkeys(("p0", "p1", "d0", "d1"), 1)
        self.down: set[str] = set()
        self.waiting: dict[str, NeedPair] = {}
        self.since: dict[str, float] = {}
        """Since when there is no pair for a request."""
        self.parked: dict[str, float] = {}
        """Until when they wait for a group."""
        self.running: dict[tuple[int, Role], Target] = {}
        self.aborting: set[tuple[int, Role]] = set()
        self.open_rooms: set[int] = set()
        self.room_of: dict[str, int] = {}
        self.deadlines: dict[str, float] = {}
        self.must_move_by: dict[str, float] = {}
        self.live: set[str] = set()
        self.attempts: dict[str, int] = {}
        self.delivered: dict[str, list[tuple[int, int]]] = {}
        """(room, token) of each request."""
        self.usage: dict[str, int] = {}
        """Tokens that each request that is over is charged for."""
        self.produced: dict[int, list[int]] = {}
        self.versions: dict[int, str] = {}
        self.rested: dict[str, float] = {}
        """Since when they wait for their next try."""
        self.serial = itertools.count()
        for name, epoch in self.epochs.items():
            self.tell(GroupUp(group=name, epoch=epoch))

    def tell(self, event: Event) -> None:
        for action in self.table.handle(event, self.now):
            match action:
                case NeedPair(request=request, attempt=attempt, version=version):
                    assert request in self.live
                    assert self.attempts.get(request, 0) <= attempt <= RETRIES.most
                    self.attempts[request] = attempt
                    shown = self.delivered[request]
                    assert version == (self.versions[shown[-1][0]] if shown else None), "versions would be mixed"
                    self.waiting[request] = action
                    self.parked.pop(request, None)
                    self.must_move_by[request] = self.deadlines.setdefault(request, self.now + TOTAL_S)
                case SendLeg(request=request, room=room, role=role, pair=pair):
                    target = pair.target(role)
                    assert target.epoch == self.epochs[target.group], "sent to an old epoch"
                    assert target.group not in self.down, "sent to a group that is down"
                    assert (room, role) not in self.running
                    self.running[room, role] = target
                    self.open_rooms.add(room)
                    self.room_of[request] = room
                    self.since.pop(request, None)
                    self.must_move_by[request] = min(self.now + FIRST_TOKEN_S, self.deadlines[request])
                case AbortLeg(room=room, role=role):
                    assert (room, role) in self.running, "aborted a leg that does not run"
                    assert (room, role) not in self.aborting, "aborted a leg twice"
                    self.aborting.add((room, role))
                case Deliver(request=request, room=room, ids=ids):
                    assert request in self.live, "a token after the end"
                    assert room == self.room_of[request], "a token of another attempt"
                    self.delivered[request] += [(room, token) for token in ids]
                    self.must_move_by[request] = min(self.now + STALL_S, self.deadlines[request])
                case Finish(request=request):
                    self.ended(request, len(self.delivered[request]))
                    short = action.reason == "length" and len(self.delivered[request]) >= LIMIT
                    if not short and not isinstance(event, Satisfied):
                        assert self.delivered[request] == self.whole(request), "a token was lost"
                case Fail(request=request, delivered=delivered):
                    self.ended(request, delivered)
                case LegReleased(room=room, role=role):
                    del self.running[room, role]
                    self.aborting.discard((room, role))
                case RoomClosed(room=room):
                    self.open_rooms.remove(room)

    def ended(self, request: str, tokens: int) -> None:
        assert request in self.live, "a request ended twice"
        self.usage[request] = tokens
        self.live.remove(request)
        self.waiting.pop(request, None)
        self.parked.pop(request, None)

    def whole(self, request: str) -> list[tuple[int, int]]:
        """What its client has to have: of each room what was shown, of the last all."""
        shown, last = self.delivered[request], self.room_of[request]
        return [one for one in shown if one[0] != last] + [(last, token) for token in self.produced[last]]

    def some_room(self, pick: int) -> int:
        """Mostly a room that is open, now and then one that is over or never was."""
        rooms = sorted(self.open_rooms) * 4 + [0, max(self.produced, default=0)]
        return rooms[pick % len(rooms)]

    @rule(prefill=prefills, decode=decodes, count=st.integers(1, 3))
    def submit(self, prefill: str, decode: str, count: int) -> None:
        """Some requests come, and one of them is routed at once."""
        for _ in range(count):
            self.submit_one()
        self.open(prefill, decode, 0)

    def submit_one(self) -> None:
        name = f"r{next(self.names)}"
        self.live.add(name)
        self.delivered[name] = []
        hold = HOLD_S if next(self.serial) % 2 else 0.0
        self.tell(
            Submit(
                request=name,
                deadline=self.now + TOTAL_S,
                first_token_s=FIRST_TOKEN_S,
                stall_s=STALL_S,
                capacity_s=CAPACITY_S,
                hold_s=hold,
                limit=LIMIT,
            )
        )

    @precondition(lambda self: self.waiting)
    @rule(prefill=prefills, decode=decodes, stale=st.sampled_from([0, 0, 0, 1]))
    def route(self, prefill: str, decode: str, stale: int) -> None:
        self.open(prefill, decode, stale)

    def open(self, prefill: str, decode: str, stale: int) -> None:
        """The caller's view may be a little old: the table must know better."""
        request = next(iter(self.waiting))
        version = self.waiting.pop(request).version
        prefill_target, decode_target = (
            Target(role=role, group=name, epoch=self.epochs[name] - stale, dp_rank=0, dp_size=1, url="")
            for role, name in ((Role.PREFILL, prefill), (Role.DECODE, decode))
        )
        room = next(self.room_numbers)
        self.produced[room] = []
        pair = Pair(prefill=prefill_target, decode=decode_target, bootstrap_host="", bootstrap_port=0)
        self.versions[room] = version or ("v1" if room % 3 else "v2")
        self.tell(Opened(request=request, room=room, pair=pair, version=self.versions[room]))

    @precondition(lambda self: self.waiting)
    @rule(coming=st.booleans())
    def refuse(self, coming: bool) -> None:
        request = next(iter(self.waiting))
        del self.waiting[request]
        since = self.since.setdefault(request, self.now)
        until = self.deadlines[request] if self.delivered[request] else since + CAPACITY_S
        if coming:
            self.parked[request] = self.must_move_by[request] = min(until, self.deadlines[request])
        failure = Failure(kind=FailureKind.NO_CAPACITY, message="")
        self.tell(Refused(request=request, failure=failure, coming=coming))
        assert (request in self.live) == (coming and self.now < min(until, self.deadlines[request]))

    @precondition(lambda self: self.open_rooms)
    @rule(pick=picks, role=roles)
    def accept(self, pick: int, role: Role) -> None:
        self.tell(LegAccepted(room=self.some_room(pick), role=role))

    @precondition(lambda self: self.open_rooms)
    @rule(pick=picks, count=st.integers(1, 3))
    def produce(self, pick: int, count: int) -> None:
        room = self.some_room(pick)
        ids = [next(self.serial) for _ in range(count)]
        if (room, Role.DECODE) in self.running:
            self.produced[room] += ids
        for request, latest in self.room_of.items():
            if latest == room and request in self.live and (room, Role.DECODE) in self.running.keys() - self.aborting:
                # Whether they are shown, or held for a while.
                self.must_move_by[request] = min(self.now + max(STALL_S, HOLD_S), self.deadlines[request])
        self.tell(LegTokens(room=room, ids=ids))

    @precondition(lambda self: self.open_rooms)
    @rule(pick=picks, role=roles)
    def finish(self, pick: int, role: Role) -> None:
        room = self.some_room(pick)
        first = next(iter(self.produced.get(room, ())), None) if role is Role.PREFILL and pick % 5 else pick
        self.tell(LegFinished(room=room, role=role, reason="stop", first=first))

    @precondition(lambda self: self.open_rooms)
    @rule(pick=picks, role=roles, kind=kinds)
    def fail(self, pick: int, role: Role, kind: FailureKind) -> None:
        self.tell(LegFailed(room=self.some_room(pick), role=role, failure=Failure(kind=kind, message="")))

    @precondition(lambda self: self.aborting)
    @rule(pick=picks)
    def close(self, pick: int) -> None:
        room, role = sorted(self.aborting)[pick % len(self.aborting)]
        self.tell(LegClosed(room=room, role=role))

    @precondition(lambda self: not self.down)
    @rule(name=prefills | decodes)
    def lose(self, name: str) -> None:
        self.down.add(name)
        self.tell(GroupLost(group=name, epoch=self.epochs[name]))

    @precondition(lambda self: self.down or len(self.open_rooms) > 2)
    @rule(name=prefills | decodes)
    def restart(self, name: str) -> None:
        self.epochs[name] += 1
        self.down.discard(name)
        self.tell(GroupUp(group=name, epoch=self.epochs[name]))

    @precondition(lambda self: self.open_rooms)
    @rule(name=decodes)
    def leave(self, name: str) -> None:
        """The group drains: what decodes there goes elsewhere."""
        for request in self.table.decoding_on(name, self.epochs[name]):
            self.tell(Move(request=request, group=name, epoch=self.epochs[name]))
        assert self.table.decoding_on(name, self.epochs[name]) == []

    @precondition(lambda self: len(self.live) > 2)
    @rule(pick=picks, why=st.sampled_from([ClientGone, Satisfied]))
    def end(self, pick: int, why: type[ClientGone] | type[Satisfied]) -> None:
        self.tell(why(request=sorted(self.live)[pick % len(self.live)]))

    @rule(seconds=st.sampled_from([0.5, 1, 2, 3]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.tell(Tick())
        due = self.table.next_deadline()
        assert due is None or due > self.now
        for request in self.live:
            if self.rests(request):
                assert self.now - self.rested.setdefault(request, self.now) <= RETRIES.delay_most_s + seconds
            else:
                self.rested.pop(request, None)
                assert self.now < self.must_move_by[request], "a request outlived its time"

    def rests(self, request: str) -> bool:
        """Whether it waits for its next try: nothing is asked, and nothing runs for it."""
        room = self.room_of.get(request)
        runs = any((room, role) in self.running.keys() - self.aborting for role in Role)
        return not runs and request not in self.waiting and request not in self.parked

    @invariant()
    def the_table_knows_what_the_world_knows(self) -> None:
        assert self.table.open_requests == len(self.live)
        assert self.table.open_rooms == len(self.open_rooms) == len({room for room, _ in self.running})

    @invariant()
    def nothing_runs_on_where_nothing_runs(self) -> None:
        for key, target in self.running.items():
            lost = target.group in self.down or target.epoch != self.epochs[target.group]
            assert not lost or key in self.aborting

    @invariant()
    def every_client_has_beginnings_of_its_rooms_streams_one_behind_the_other(self) -> None:
        for tokens in self.delivered.values():
            for room, run in itertools.groupby(tokens, key=lambda one: one[0]):
                said = [token for _, token in run]
                assert said == self.produced[room][: len(said)], "a token was lost, doubled or moved"
            assert len({room for room, _ in tokens}) == len(list(itertools.groupby(tokens, key=lambda one: one[0])))
            assert len({self.versions[room] for room, _ in tokens}) <= 1, "versions are mixed"

    def step(self, name: str, dice: random.Random) -> None:
        """One step of a random walk: the rule of this name, if its time has come."""
        pick, role = dice.randrange(10**6), dice.choice(list(Role))
        prefill, decode = dice.choice(["p0", "p1"]), dice.choice(["d0", "d1"])
        match name:
            case "submit":
                self.submit(prefill, decode, 1)
            case "route" if self.waiting:
                self.route(prefill, decode, int(dice.random() < 0.1))
            case "refuse" if self.waiting:
                self.refuse(dice.random() < 0.7)
            case "leave":
                self.leave(decode)
            case "accept":
                self.accept(pick, role)
            case "produce":
                self.produce(pick, dice.randint(1, 3))
            case "finish":
                self.finish(pick, role)
            case "fail":
                self.fail(pick, role, dice.choice(FAILURES))
            case "close" if self.aborting:
                self.close(pick)
            case "lose":
                self.lose(dice.choice([prefill, decode]))
            case "restart":
                self.restart(next(iter(sorted(self.down)), prefill))
            case "end" if self.live:
                self.end(pick, dice.choice([ClientGone, Satisfied]))
            case "wait":
                self.wait(dice.choice([0.1, 0.5, 1, 2]))

    def wind_up(self, dice: random.Random) -> None:
        """Half a second in which nothing new comes: aborts are answered, some legs end well, some badly, some not."""
        for room, role in sorted(self.running):
            if (room, role) not in self.running:
                continue
            if (room, role) in self.aborting:
                self.tell(LegClosed(room=room, role=role))
            elif room % 4 and dice.random() < 0.3:
                first = next(iter(self.produced[room]), None)
                self.tell(LegFinished(room=room, role=role, reason="stop", first=first))
            elif room % 4 == 1 and dice.random() < 0.3:
                self.tell(LegFailed(room=room, role=role, failure=Failure(kind=dice.choice(FAILURES), message="")))
        for _ in range(len(self.waiting)):
            if dice.random() < 0.5:
                self.open(dice.choice(["p0", "p1"]), dice.choice(["d0", "d1"]), 0)
            else:
                self.refuse(coming=True)
        self.wait(0.5)

    def teardown(self) -> None:
        """Traffic ends by itself: what is open is finished, fails, or meets its deadline. No client leaves."""
        dice = random.Random(next(self.serial))
        last = max((self.deadlines[request] for request in self.live), default=self.now) + RETRIES.delay_most_s
        while self.live:
            assert self.now <= last, "a request outlives its deadline"
            self.wind_up(dice)
        # What prefill has not ended by itself is ended when it has lingered.
        for _ in range(4):
            self.wind_up(dice)
        assert not self.running, "a leg runs on for nobody"
        assert not self.open_rooms
        assert self.usage == {request: len(tokens) for request, tokens in self.delivered.items()}
        assert self.table.open_rooms == self.table.open_requests == self.table.parked == 0
        self.wait(TOTAL_S)
        assert self.table.next_deadline() is None, "a timer is set for nobody"


TestPairs = Pairs.TestCase
TestPairs.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


WALKS = 250
STEPS = 60
WEIGHTS = {
    "submit": 4, "route": 4, "refuse": 1, "accept": 1, "produce": 8, "finish": 4, "fail": 3, "close": 5, "lose": 1,
    "leave": 1, "restart": 2, "end": 1, "wait": 4,
}  # fmt: skip


@pytest.mark.parametrize("batch", range(2))
def test_long_random_walks_keep_the_same_promises(batch: int) -> None:
    """Hypothesis finds and shrinks the odd sequence; this covers the busy ones, in volume."""
    for number in range(WALKS):
        walk(batch * WALKS + number)


def walk(seed: int, table: type[PairTable] = PairTable) -> None:
    dice = random.Random(seed)
    world = Pairs(table)
    for rule_name in dice.choices(list(WEIGHTS), list(WEIGHTS.values()), k=STEPS):
        world.step(rule_name, dice)
        world.the_table_knows_what_the_world_knows()
        world.nothing_runs_on_where_nothing_runs()
        world.every_client_has_beginnings_of_its_rooms_streams_one_behind_the_other()
    world.teardown()


class ForgetsTheEpoch(PairTable):
    """What was lost before a pair is found is as good as any other: the simulator cannot see this, as nothing happens
    there between the question and the pair (`unit/sim/test_mutations.py` has all other mutations)."""

    def _opened(self, event: Opened, now: float) -> list[Action]:
        self._lost.clear()
        return super()._opened(event, now)


def test_a_table_that_forgets_the_epoch_is_caught() -> None:
    with pytest.raises(AssertionError, match="sent to a group that is down"):
        walk(0, ForgetsTheEpoch)
