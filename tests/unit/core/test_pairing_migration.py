"""The pair table's rules for what goes on: migration, waiting for capacity, and the word of prefill."""

from __future__ import annotations

from typing import Any

import pytest
from test_pairing import BROKEN, DECODE, PREFILL, aborted, empty, kinds, pair, the

from tandem.core.pair_events import (
    AbortLeg,
    Deliver,
    Fail,
    Failure,
    FailureKind,
    Finish,
    GroupLost,
    GroupUp,
    LegFailed,
    LegFinished,
    LegTokens,
    Move,
    NeedPair,
    Opened,
    Refused,
    SendLeg,
    Submit,
    Tick,
)
from tandem.core.pair_records import Retries
from tandem.core.pairing import PairTable

NONE = Failure(kind=FailureKind.NO_CAPACITY, message="no decode group is ready")
UNREACHABLE = Failure(kind=FailureKind.UNREACHABLE, message="refused")
ABORTED = Failure(kind=FailureKind.ABORTED, message="transfer failed")


def submitted(**fields: Any) -> PairTable:
    times = {"deadline": 100.0, "first_token_s": 10.0, "stall_s": 5.0}
    table = PairTable()
    assert kinds(table.handle(Submit(request="r", **{**times, **fields}), 0)) == [NeedPair]
    return table


def running(version: str = "v1", **fields: Any) -> PairTable:
    table = submitted(**fields)
    table.handle(Opened(request="r", room=7, pair=pair(), version=version), 0)
    return table


def again(table: PairTable, room: int, now: float = 1, version: str = "v1") -> None:
    sent = table.handle(Opened(request="r", room=room, pair=pair("p1", "d1"), version=version), now)
    assert kinds(sent) == [SendLeg, SendLeg]


def test_a_decode_leg_lost_in_mid_stream_goes_on_elsewhere_with_the_same_weights() -> None:
    table = running()
    table.handle(LegTokens(room=7, ids=[1, 2]), 1)
    need = the(NeedPair, table.handle(LegFailed(room=7, role=DECODE, failure=BROKEN), 2))
    assert (need.attempt, need.avoid, need.version, need.why) == (2, {"d0"}, "v1", "broken")


def test_what_the_new_pair_says_follows_what_was_delivered() -> None:
    table = running()
    table.handle(LegTokens(room=7, ids=[1, 2]), 1)
    table.handle(GroupLost(group="d0", epoch=1), 2)
    again(table, 8)
    assert table.handle(LegTokens(room=7, ids=[3]), 3) == []
    assert table.handle(LegTokens(room=8, ids=[3]), 3) == [Deliver(request="r", room=8, ids=[3])]


def test_a_request_without_a_token_may_go_on_with_any_weights() -> None:
    need = the(NeedPair, running().handle(LegFailed(room=7, role=DECODE, failure=BROKEN), 2))
    assert need.version is None


def test_each_token_begins_the_count_of_losses_anew() -> None:
    table = running()
    for room in range(7, 20):
        table.handle(LegTokens(room=room, ids=[1]), 1)
        assert kinds(table.handle(LegFailed(room=room, role=DECODE, failure=BROKEN), 1))[-1] is NeedPair
        again(table, room + 1)


def test_three_losses_in_a_row_end_it() -> None:
    table = running()
    table.handle(LegTokens(room=7, ids=[1]), 1)
    table.handle(LegFailed(room=7, role=DECODE, failure=BROKEN), 1)
    again(table, 8)
    assert NeedPair not in kinds(table.handle(LegFailed(room=8, role=DECODE, failure=BROKEN), 1))
    assert NeedPair in kinds(table.handle(Tick(), 2))
    again(table, 9, 2)
    assert the(Fail, table.handle(LegFailed(room=9, role=DECODE, failure=BROKEN), 2)).delivered == 1


def woken(table: PairTable, now: float) -> float:
    """When the request in backoff asks for a pair."""
    while True:
        due = table.next_deadline()
        assert due is not None
        if NeedPair in kinds(table.handle(Tick(), max(now, due))):
            return max(now, due)


def test_attempts_that_no_engine_took_are_repeated_ever_more_slowly() -> None:
    table, now, waits = running(), 0.0, []
    for room in range(7, 40):
        actions = table.handle(LegFailed(room=room, role=DECODE, failure=UNREACHABLE), now)
        if Fail in kinds(actions):
            break
        if NeedPair not in kinds(actions):
            waits.append(woken(table, now) - now)
            now += waits[-1]
        again(table, room + 1, now)
    assert waits == [Retries().delay(tries) for tries in range(3, 11)]


def test_an_answer_that_lacks_nothing_but_its_end_is_complete() -> None:
    table = running(limit=2)
    table.handle(LegTokens(room=7, ids=[1, 2]), 1)
    assert the(Finish, table.handle(LegFailed(room=7, role=DECODE, failure=BROKEN), 2)).reason == "length"


def test_an_answer_that_another_gateway_began_asks_for_its_weights() -> None:
    table = PairTable()
    submit = Submit(request="r", deadline=9, first_token_s=9, stall_s=9, delivered=3, version="v1")
    assert the(NeedPair, table.handle(submit, 0)).version == "v1"


def test_one_that_lacks_no_token_needs_no_pair() -> None:
    submit = Submit(request="r", deadline=9, first_token_s=9, stall_s=9, delivered=3, limit=3, version="v1")
    assert PairTable().handle(submit, 0) == [Finish(request="r", reason="length")]


# Capacity


def test_where_nothing_is_coming_a_refusal_is_the_end() -> None:
    refused = submitted(capacity_s=50).handle(Refused(request="r", failure=NONE), 0)
    assert refused == [Fail(request="r", failure=NONE, delivered=0)]


def test_a_request_waits_for_a_group_that_is_coming_up() -> None:
    table = submitted(capacity_s=50)
    assert table.handle(Refused(request="r", failure=NONE, coming=True), 0) == []
    assert (table.parked, table.handle(Tick(), 49)) == (1, [])
    assert kinds(table.handle(GroupUp(group="d0", epoch=1), 49)) == [NeedPair]
    assert table.parked == 0


def test_it_waits_no_longer_than_it_may_in_all() -> None:
    table = submitted(capacity_s=50)
    table.handle(Refused(request="r", failure=NONE, coming=True), 0)
    table.handle(GroupUp(group="p0", epoch=1), 30)
    table.handle(Refused(request="r", failure=NONE, coming=True), 30)
    assert the(Fail, table.handle(Tick(), 50)).failure.kind is FailureKind.NO_CAPACITY
    assert empty(table)
    assert table.handle(GroupUp(group="d0", epoch=1), 51) == []


def test_a_stream_that_has_begun_waits_until_its_deadline() -> None:
    table = running(capacity_s=5)
    table.handle(LegTokens(room=7, ids=[1]), 1)
    table.handle(GroupLost(group="d0", epoch=1), 1)
    table.handle(Refused(request="r", failure=NONE, coming=True), 1)
    assert table.handle(Tick(), 99) == []
    assert the(Fail, table.handle(Tick(), 100)).failure.kind is FailureKind.DEADLINE


# The word of prefill


def test_the_first_tokens_wait_for_prefills_word() -> None:
    table = running(hold_s=3)
    assert table.handle(LegTokens(room=7, ids=[1]), 1) == []
    assert table.handle(LegTokens(room=7, ids=[2]), 1) == []
    released = table.handle(LegFinished(room=7, role=PREFILL, reason="length", first=1), 2)
    assert the(Deliver, released).ids == [1, 2]


def test_they_wait_no_longer_than_they_may() -> None:
    table = running(hold_s=3)
    table.handle(LegTokens(room=7, ids=[1]), 1)
    assert the(Deliver, table.handle(Tick(), 4)).ids == [1]


def test_an_answer_that_is_complete_before_prefills_word_ends_with_it() -> None:
    table = running(hold_s=3)
    table.handle(LegTokens(room=7, ids=[1]), 1)
    assert Finish not in kinds(table.handle(LegFinished(room=7, role=DECODE, reason="stop"), 1))
    assert kinds(table.handle(LegFinished(room=7, role=PREFILL, reason="length", first=1), 2))[-2:] == [Deliver, Finish]
    assert empty(table)


@pytest.mark.parametrize("decode_first", [True, False])
def test_legs_with_different_first_tokens_are_given_up_unseen(decode_first: bool) -> None:
    table = running(hold_s=3)
    events = [LegTokens(room=7, ids=[9, 9]), LegFinished(room=7, role=PREFILL, reason="length", first=1)]
    actions = [a for event in events[:: 1 if decode_first else -1] for a in table.handle(event, 1)]
    assert DECODE in aborted(actions)
    assert (the(NeedPair, actions).why, the(NeedPair, actions).avoid) == ("bad_kv", {"p0", "d0"})


@pytest.mark.parametrize("failure", [BROKEN, ABORTED])
def test_a_prefill_that_fails_while_tokens_are_held_takes_them_along(failure: Failure) -> None:
    table = running(hold_s=3)
    table.handle(LegTokens(room=7, ids=[1]), 1)
    assert NeedPair in kinds(table.handle(LegFailed(room=7, role=PREFILL, failure=failure), 2))


def test_an_abort_of_prefill_after_tokens_were_shown_fails_closed() -> None:
    table = running()
    table.handle(LegTokens(room=7, ids=[1]), 1)
    table.handle(LegFailed(room=7, role=PREFILL, failure=ABORTED), 2)
    assert table.handle(LegTokens(room=7, ids=[2]), 2) == []
    table.handle(LegFinished(room=7, role=DECODE, reason="stop"), 2)
    assert the(Fail, table.handle(Tick(), 3)).failure.kind is FailureKind.BAD_KV
    assert empty(table)


def test_an_abort_of_prefill_that_is_but_the_echo_of_decodes_own_is_a_migration() -> None:
    table = running()
    table.handle(LegTokens(room=7, ids=[1]), 1)
    table.handle(LegFailed(room=7, role=PREFILL, failure=ABORTED), 2)
    assert the(NeedPair, table.handle(LegFailed(room=7, role=DECODE, failure=ABORTED), 2)).version == "v1"


def test_a_move_does_not_lift_a_doubt() -> None:
    table = running()
    table.handle(LegTokens(room=7, ids=[1]), 1)
    table.handle(LegFailed(room=7, role=PREFILL, failure=ABORTED), 2)
    assert table.decoding_on("d0", 1) == []
    assert table.handle(Move(request="r", group="d0", epoch=1), 2) == []
    assert the(Fail, table.handle(Tick(), 3)).failure.kind is FailureKind.BAD_KV


def test_a_prefill_of_other_weights_fails_closed_when_tokens_are_out() -> None:
    table = running()
    table.handle(LegTokens(room=7, ids=[1]), 1)
    other = Failure(kind=FailureKind.BAD_KV, message="p0 has the weights 'v2'")
    assert the(Fail, table.handle(LegFailed(room=7, role=PREFILL, failure=other), 2)).failure == other


def test_different_first_tokens_after_one_was_shown_fail_closed() -> None:
    table = running()
    table.handle(LegTokens(room=7, ids=[9]), 1)
    wrong = LegFinished(room=7, role=PREFILL, reason="length", first=1)
    assert the(Fail, table.handle(wrong, 2)).failure.kind is FailureKind.BAD_KV


# Leaving


def test_a_stream_is_moved_off_a_group_that_leaves() -> None:
    table = running()
    table.handle(LegTokens(room=7, ids=[1]), 1)
    assert table.decoding_on("d0", 1) == ["r"]
    actions = table.handle(Move(request="r", group="d0", epoch=1), 2)
    assert [abort.notify for abort in actions if isinstance(abort, AbortLeg)] == [True, True]
    assert (the(NeedPair, actions).why, the(NeedPair, actions).version) == ("moved", "v1")
    assert table.decoding_on("d0", 1) == []


def test_a_move_is_no_loss() -> None:
    table = running()
    for room in range(7, 17):
        assert NeedPair in kinds(table.handle(Move(request="r", group="d0" if room == 7 else "d1", epoch=1), 2))
        again(table, room + 1, 2)


def test_only_what_decodes_there_is_moved() -> None:
    assert running().handle(Move(request="r", group="p0", epoch=1), 1) == []
    assert running().handle(Move(request="r", group="d0", epoch=2), 1) == []
