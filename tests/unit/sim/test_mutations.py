"""The simulator finds bugs: a pair table with any of these is caught, by the check that is meant for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from tandem.core.pair_events import (
    AbortLeg,
    Action,
    ClientGone,
    Deliver,
    Event,
    Fail,
    Finish,
    GroupLost,
    GroupUp,
    LegClosed,
    LegReleased,
    Move,
    NeedPair,
    RoomClosed,
    SendLeg,
    Submit,
    Tick,
)
from tandem.core.pair_records import Request, Retries, Room
from tandem.core.pairing import PairTable
from tandem.core.types import Role
from tandem.sim.gateway import LINGER_S
from tandem.sim.ledger import Invariant
from tandem.sim.schedule import draw
from tandem.sim.world import breaks

SEEDS = range(30)
REQUESTS = 300


class SkipsTheAbortOfDecode(PairTable):
    def handle(self, event: Event, now: float) -> list[Action]:
        actions = super().handle(event, now)
        return [a for a in actions if not (isinstance(a, AbortLeg) and a.role is Role.DECODE)]


class SkipsTheAbortOfPrefillAfterAMove(PairTable):
    def handle(self, event: Event, now: float) -> list[Action]:
        actions = super().handle(event, now)
        if not isinstance(event, Move):
            return actions
        return [a for a in actions if not (isinstance(a, AbortLeg) and a.role is Role.PREFILL)]


class DeliversATokenTwice(PairTable):
    def _fate(self, room: Room, role: Role, failure: Any, now: float) -> list[Action]:
        request = self._current(room)
        again = [] if request is None or room.first is None else [room.first]
        actions = super()._fate(room, role, failure, now)
        if request is None or not again or role is Role.PREFILL:
            return actions
        return [Deliver(request=request.name, room=room.room, ids=again), *actions]


class ForgetsWhatWasDelivered(PairTable):
    def _again(self, request: Request, *rest: Any) -> list[Action]:
        request.delivered = 0
        return super()._again(request, *rest)


class IgnoresLostGroups(PairTable):
    def _group_lost(self, event: GroupLost, now: float) -> list[Action]:
        return []


class TakesEveryEpochForLost(PairTable):
    def _lose(self, group: str, gone: Callable[[int], bool], now: float) -> list[Action]:
        return super()._lose(group, lambda epoch: True, now)


class UsesARoomAgain(PairTable):
    def handle(self, event: Event, now: float) -> list[Action]:
        before = {name: request.room for name, request in self._requests.items()}
        found: list[Action] = []
        for action in super().handle(event, now):
            room = before.get(action.request) if isinstance(action, NeedPair) and action.attempt > 1 else None
            if room is None:
                found.append(action)
            else:
                found += [SendLeg(request=room.request, room=room.room, role=role, pair=room.pair) for role in Role]
        return found


class ListensToRoomsThatAreOver(PairTable):
    def _current(self, room: Room) -> Request | None:
        return self._requests.get(room.request)


class TrustsEveryKv(PairTable):
    def _submit(self, event: Submit, now: float) -> list[Action]:
        return super()._submit(msgspec.structs.replace(event, hold_s=0.0), now)


class IgnoresPrefillsToken(PairTable):
    def _finished(self, event: Any, now: float) -> list[Action]:
        return super()._finished(msgspec.structs.replace(event, first=None), now)


class GoesOnWithAnyWeights(PairTable):
    def _need_pair(self, request: Request) -> NeedPair:
        return msgspec.structs.replace(super()._need_pair(request), version=None)


class GivesUpAtOnce(PairTable):
    def __init__(self, **settings: Any) -> None:
        super().__init__(retries=Retries(losses=1), **settings)


class NeverGivesUp(PairTable):
    def __init__(self, **settings: Any) -> None:
        super().__init__(retries=Retries(losses=10**6, tries=10**6, most=10**6), **settings)


class DropsTheRequestWithItsRoom(PairTable):
    def _again(self, *rest: Any) -> list[Action]:
        return [action for action in super()._again(*rest) if not isinstance(action, NeedPair)]


class NeverClosesAnAbortedLeg(PairTable):
    def _closed(self, event: LegClosed, now: float) -> list[Action]:
        return []


class KeepsTheAccountOpen(PairTable):
    def handle(self, event: Event, now: float) -> list[Action]:
        return [action for action in super().handle(event, now) if not isinstance(action, LegReleased)]


class ClosesARoomTwice(PairTable):
    def handle(self, event: Event, now: float) -> list[Action]:
        actions = super().handle(event, now)
        return actions + [action for action in actions if isinstance(action, RoomClosed)]


class FinishesTwice(PairTable):
    def handle(self, event: Event, now: float) -> list[Action]:
        actions = super().handle(event, now)
        return actions + [action for action in actions if isinstance(action, Finish)]


class FinishesAStreamThatBroke(PairTable):
    def _fail(self, request: Request, failure: Any) -> list[Action]:
        if not request.delivered:
            return super()._fail(request, failure)
        return [
            Finish(request=action.request, reason="stop") if isinstance(action, Fail) else action
            for action in super()._fail(request, failure)
        ]


class LeavesRequestsParked(PairTable):
    def _group_up(self, event: GroupUp, now: float) -> list[Action]:
        parked, self._parked = self._parked, {}
        try:
            return super()._group_up(event, now)
        finally:
            self._parked = parked


class DoesNotWait(PairTable):
    def _submit(self, event: Submit, now: float) -> list[Action]:
        return super()._submit(msgspec.structs.replace(event, capacity_s=0.0), now)


class IgnoresMoves(PairTable):
    def _move(self, event: Move, now: float) -> list[Action]:
        return []


class HasNoTimers(PairTable):
    def _tick(self, event: Tick, now: float) -> list[Action]:
        return super()._tick(event, now) if any(now >= r.submit.deadline for r in self._requests.values()) else []


class NeverTiresOfALingeringPrefill(PairTable):
    def _complete(self, room: Room, request: Request, reason: str, now: float) -> list[Action]:
        return [self._finish(request, reason)]


class IgnoresTheClientsLeaving(PairTable):
    def _client_gone(self, event: ClientGone, now: float) -> list[Action]:
        return []


class ThrowsHeldTokensAway(PairTable):
    def _show(self, room: Room, request: Request, ids: list[int]) -> list[Action]:
        return super()._show(room, request, ids[:1])


MUTATIONS: list[tuple[type[PairTable], set[Invariant]]] = [
    (SkipsTheAbortOfDecode, {Invariant.LEAKED}),
    (SkipsTheAbortOfPrefillAfterAMove, {Invariant.LEAKED}),
    (DeliversATokenTwice, {Invariant.DOUBLED}),
    (ForgetsWhatWasDelivered, {Invariant.MIXED, Invariant.USAGE}),
    (IgnoresLostGroups, {Invariant.LEAKED}),
    (TakesEveryEpochForLost, {Invariant.SPURIOUS}),
    (UsesARoomAgain, {Invariant.ROOM}),
    (ListensToRoomsThatAreOver, {Invariant.DOUBLED, Invariant.ALTERED, Invariant.LEAKED, Invariant.LOST}),
    (TrustsEveryKv, {Invariant.ALTERED}),
    (IgnoresPrefillsToken, {Invariant.ALTERED}),
    (GoesOnWithAnyWeights, {Invariant.MIXED}),
    (GivesUpAtOnce, {Invariant.LOST}),
    (NeverGivesUp, {Invariant.ATTEMPTS}),
    (DropsTheRequestWithItsRoom, {Invariant.LOST}),
    (NeverClosesAnAbortedLeg, {Invariant.LEAKED}),
    (KeepsTheAccountOpen, {Invariant.LEAKED}),
    (ClosesARoomTwice, {Invariant.LEAKED}),
    (FinishesTwice, {Invariant.DOUBLED}),
    (FinishesAStreamThatBroke, {Invariant.LOST}),
    (LeavesRequestsParked, {Invariant.LOST}),
    (DoesNotWait, {Invariant.LOST}),
    (IgnoresMoves, {Invariant.LATE}),
    (HasNoTimers, {Invariant.LATE}),
    (NeverTiresOfALingeringPrefill, {Invariant.LEAKED}),
    (IgnoresTheClientsLeaving, {Invariant.LATE}),
    (ThrowsHeldTokensAway, {Invariant.ALTERED, Invariant.LOST}),
]


@pytest.mark.parametrize(("table", "by"), MUTATIONS, ids=[table.__name__ for table, _ in MUTATIONS])
def test_a_broken_table_is_caught(table: type[PairTable], by: set[Invariant]) -> None:
    found = (breaks(draw(seed, REQUESTS), lambda: table(linger_s=LINGER_S)) for seed in SEEDS)
    violation = next((one for one in found if one is not None), None)
    assert violation is not None, f"{len(SEEDS)} seeds did not notice"
    assert violation.invariant in by, str(violation)
