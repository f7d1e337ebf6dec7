"""The pair table's rules, one by one."""

from __future__ import annotations

from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.pair_events import (
    AbortLeg,
    Action,
    ClientGone,
    Deliver,
    Fail,
    Failure,
    FailureKind,
    Finish,
    GroupLost,
    GroupUp,
    LegClosed,
    LegFailed,
    LegFinished,
    LegTokens,
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
from tandem.core.pairing import ROOM_LIMIT, PairTable, room_number
from tandem.core.routing import Pair, Target
from tandem.core.types import Role

PREFILL, DECODE = Role.PREFILL, Role.DECODE
A = TypeVar("A", bound=Action)
BROKEN = Failure(kind=FailureKind.BROKEN, message="it broke")


def pair(prefill: str = "p0", decode: str = "d0", epoch: int = 1) -> Pair:
    def target(role: Role, group: str) -> Target:
        return Target(role=role, group=group, epoch=epoch, dp_rank=0, dp_size=1, url=f"http://{group}")

    return Pair(
        prefill=target(PREFILL, prefill), decode=target(DECODE, decode), bootstrap_host=prefill, bootstrap_port=1
    )


def opened(table: PairTable, room: int = 7, *, request: str = "r", now: float = 0.0) -> None:
    submit = Submit(request=request, deadline=now + 100, first_token_s=10, stall_s=5)
    assert table.handle(submit, now) == [NeedPair(request=request, attempt=1, avoid=frozenset())]
    sends = table.handle(Opened(request=request, room=room, pair=pair()), now)
    assert [type(send) for send in sends] == [SendLeg, SendLeg]


def kinds(actions: list[Action]) -> list[type[Action]]:
    return [type(action) for action in actions]


def aborted(actions: list[Action]) -> set[Role]:
    return {action.role for action in actions if isinstance(action, AbortLeg)}


def the(kind: type[A], actions: list[Action]) -> A:
    (found,) = [action for action in actions if isinstance(action, kind)]
    return found


def empty(table: PairTable) -> bool:
    return not table.open_requests and not table.open_rooms


def test_a_good_request_sends_both_legs_delivers_and_leaves_nothing() -> None:
    opened(table := PairTable())
    assert kinds(table.handle(LegFinished(room=7, role=PREFILL, reason="length"), 1)) != []
    assert the(Deliver, table.handle(LegTokens(room=7, ids=[1, 2]), 2)).ids == [1, 2]
    end = table.handle(LegFinished(room=7, role=DECODE, reason="stop"), 3)
    assert the(Finish, end).reason == "stop"
    assert RoomClosed(room=7) in end
    assert empty(table)


@pytest.mark.parametrize(("failing", "other"), [(PREFILL, DECODE), (DECODE, PREFILL)])
def test_a_leg_that_fails_takes_the_other_along_and_the_request_goes_elsewhere(failing: Role, other: Role) -> None:
    opened(table := PairTable())
    actions = table.handle(LegFailed(room=7, role=failing, failure=BROKEN), 1)
    assert aborted(actions) == {other}
    need = the(NeedPair, actions)
    assert (need.attempt, need.avoid) == (2, {"p0" if failing is PREFILL else "d0"})


def test_attempts_are_bounded() -> None:
    opened(table := PairTable(retries=Retries(losses=2)))
    table.handle(LegFailed(room=7, role=PREFILL, failure=BROKEN), 1)
    table.handle(Opened(request="r", room=8, pair=pair()), 1)
    assert the(Fail, table.handle(LegFailed(room=8, role=DECODE, failure=BROKEN), 2)).failure == BROKEN


def test_once_decode_has_the_kv_prefills_failure_does_not_matter() -> None:
    opened(table := PairTable())
    table.handle(LegTokens(room=7, ids=[1]), 1)
    assert not {Fail, NeedPair, AbortLeg} & set(kinds(table.handle(LegFailed(room=7, role=PREFILL, failure=BROKEN), 2)))
    assert kinds(table.handle(LegTokens(room=7, ids=[2]), 3)) == [Deliver]


def test_prefills_success_alone_means_nothing() -> None:
    opened(table := PairTable())
    table.handle(LegFinished(room=7, role=PREFILL, reason="length"), 1)
    assert NeedPair in kinds(table.handle(LegFailed(room=7, role=DECODE, failure=BROKEN), 2))


def test_what_the_engine_calls_a_bad_request_is_not_tried_again() -> None:
    opened(table := PairTable())
    bad = Failure(kind=FailureKind.BAD_REQUEST, message="too long")
    actions = table.handle(LegFailed(room=7, role=PREFILL, failure=bad), 1)
    assert the(Fail, actions).failure == bad
    assert aborted(actions) == {DECODE}


def test_a_client_that_goes_away_ends_both_legs() -> None:
    opened(table := PairTable())
    actions = table.handle(ClientGone(request="r"), 1)
    assert aborted(actions) == {PREFILL, DECODE}
    assert the(Fail, actions).failure.kind is FailureKind.CLIENT_GONE


def test_a_room_is_closed_only_when_both_aborted_legs_are_over() -> None:
    opened(table := PairTable())
    table.handle(ClientGone(request="r"), 1)
    assert RoomClosed(room=7) not in table.handle(LegClosed(room=7, role=PREFILL), 2)
    assert RoomClosed(room=7) in table.handle(LegClosed(room=7, role=DECODE), 2)
    assert empty(table)


def test_a_satisfied_request_finishes_and_stops_what_still_runs() -> None:
    opened(table := PairTable())
    table.handle(LegFinished(room=7, role=PREFILL, reason="length"), 1)
    table.handle(LegTokens(room=7, ids=[1]), 2)
    actions = table.handle(Satisfied(request="r"), 3)
    assert aborted(actions) == {DECODE}
    assert the(Finish, actions).reason == "stop"


def test_tokens_after_the_end_are_dropped() -> None:
    opened(table := PairTable())
    table.handle(Satisfied(request="r"), 1)
    assert table.handle(LegTokens(room=7, ids=[9]), 2) == []


def test_tokens_of_an_abandoned_attempt_are_dropped() -> None:
    opened(table := PairTable())
    table.handle(LegFailed(room=7, role=PREFILL, failure=BROKEN), 1)
    table.handle(Opened(request="r", room=8, pair=pair("p1", "d1")), 1)
    assert table.handle(LegTokens(room=7, ids=[9]), 2) == []


def test_a_pair_without_a_first_token_in_time_is_given_up_for_another() -> None:
    opened(table := PairTable())
    assert table.handle(Tick(), 9.9) == []
    actions = table.handle(Tick(), 10)
    assert aborted(actions) == {PREFILL, DECODE}
    assert the(NeedPair, actions).avoid == {"p0", "d0"}


def test_a_stream_that_stalls_goes_on_elsewhere() -> None:
    opened(table := PairTable())
    table.handle(LegTokens(room=7, ids=[1]), 8)
    assert table.handle(Tick(), 12.9) == []
    actions = table.handle(Tick(), 13)
    assert aborted(actions) == {PREFILL, DECODE}
    assert (the(NeedPair, actions).avoid, the(NeedPair, actions).why) == ({"d0"}, "stalled")


def test_a_stall_is_noticed_also_when_the_first_token_came_early() -> None:
    opened(table := PairTable())
    table.handle(LegTokens(room=7, ids=[1]), 1)
    assert the(NeedPair, table.handle(Tick(), 6)).why == "stalled"


def test_no_request_outlives_its_deadline() -> None:
    opened(table := PairTable())
    for second in range(1, 100):
        table.handle(LegTokens(room=7, ids=[1]), second)
        assert table.handle(Tick(), second) == []
    assert the(Fail, table.handle(Tick(), 100)).failure.kind is FailureKind.DEADLINE


def test_the_table_says_when_it_wants_to_be_woken() -> None:
    opened(table := PairTable())
    assert table.next_deadline() == 10
    assert PairTable().next_deadline() is None


def test_a_prefill_that_hangs_on_after_the_answer_is_ended() -> None:
    opened(table := PairTable(linger_s=1))
    table.handle(LegTokens(room=7, ids=[1]), 1)
    table.handle(LegFinished(room=7, role=DECODE, reason="stop"), 2)
    assert table.handle(Tick(), 2.9) == []
    assert aborted(table.handle(Tick(), 3)) == {PREFILL}


def test_a_lost_group_is_not_told_but_its_partner_is() -> None:
    opened(table := PairTable())
    aborts = [a for a in table.handle(GroupLost(group="p0", epoch=1), 1) if isinstance(a, AbortLeg)]
    assert {(abort.role, abort.notify) for abort in aborts} == {(PREFILL, False), (DECODE, True)}


def test_nothing_is_sent_to_a_lost_epoch() -> None:
    table = PairTable()
    table.handle(GroupLost(group="d0", epoch=1), 0)
    table.handle(Submit(request="r", deadline=9, first_token_s=9, stall_s=9), 0)
    assert the(NeedPair, table.handle(Opened(request="r", room=7, pair=pair()), 0)).avoid == {"d0"}
    assert SendLeg in kinds(table.handle(Opened(request="r", room=7, pair=pair(epoch=2)), 0))


def test_a_group_made_anew_may_start_at_an_old_epoch() -> None:
    table = PairTable()
    table.handle(GroupLost(group="d0", epoch=5), 0)
    table.handle(GroupUp(group="d0", epoch=1), 1)
    opened(table, now=1)


def test_a_new_epoch_ends_what_ran_on_the_old_one() -> None:
    opened(table := PairTable())
    actions = table.handle(GroupUp(group="d0", epoch=2), 1)
    assert aborted(actions) == {PREFILL, DECODE}
    assert NeedPair in kinds(actions)


def test_a_refusal_ends_the_request() -> None:
    table = PairTable()
    table.handle(Submit(request="r", deadline=9, first_token_s=9, stall_s=9), 0)
    none = Failure(kind=FailureKind.NO_CAPACITY, message="no decode group is ready")
    assert table.handle(Refused(request="r", failure=none), 0) == [Fail(request="r", failure=none, delivered=0)]
    assert empty(table)


def test_a_room_that_is_open_is_never_opened_again() -> None:
    opened(table := PairTable())
    table.handle(Submit(request="s", deadline=9, first_token_s=9, stall_s=9), 0)
    with pytest.raises(ValueError, match="already open"):
        table.handle(Opened(request="s", room=7, pair=pair()), 0)


@given(bits=st.integers(0, 2**63 - 1), size=st.integers(1, 64), data=st.data())
def test_a_room_is_a_positive_int63_that_names_its_prefill_rank(bits: int, size: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, size - 1))
    room = room_number(bits, dp_size=size, dp_rank=rank)
    assert 0 < room < ROOM_LIMIT
    assert room % size == rank
