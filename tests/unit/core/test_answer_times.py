"""How many requests kept both aims: counted by answer, for aims that nobody knew when they were counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tandem.core.answer_times import EDGES, SIDE, AnswerTimes
from tandem.core.traffic import BOUNDS, Traffic, TrafficReport

TTFT, ITL = 2.0, 0.05
GOOD, LATE, SLOW, BAD = (0.7, 0.03), (2.3, 0.03), (0.7, 0.06), (2.3, 0.06)


def answers(*times: tuple[float, float]) -> tuple[int, ...]:
    counted = AnswerTimes()
    for ttft, gap in times:
        counted.observe(ttft, gap)
    return counted.told()


def report(*times: tuple[float, float], run: str = "a1", **fields: object) -> TrafficReport:
    return replace(TrafficReport(replica=run[0], incarnation=run, answers=answers(*times)), **fields)


def seen(*newer: TrafficReport, older: tuple[TrafficReport, ...] = ()) -> Traffic:
    return Traffic.between({one.incarnation: one for one in older}, {one.incarnation: one for one in newer}, seconds=10)


def test_bounds_are_among_those_of_the_other_histograms_and_usual_aims_among_them() -> None:
    assert {0.01, 0.02, 0.025, 0.04, 0.05, 0.1, 0.25, 0.5, 1, 2, 2.5, 4, 5, 10, 20} <= set(EDGES) <= set(BOUNDS)


def test_a_tenth_that_misses_one_aim_and_another_tenth_that_misses_the_other_leave_eight_tenths() -> None:
    assert seen(report(*[GOOD] * 8, LATE, SLOW)).attainment(TTFT, ITL) == pytest.approx(0.8)


def test_a_tenth_that_misses_both_aims_leaves_nine_tenths() -> None:
    assert seen(report(*[GOOD] * 9, BAD)).attainment(TTFT, ITL) == pytest.approx(0.9)


def test_aims_that_change_are_held_against_answers_that_are_counted_already() -> None:
    traffic = seen(report(*[GOOD] * 7, LATE, LATE, SLOW))
    assert [traffic.attainment(*aims) for aims in ((2, 0.05), (2.5, 0.05), (2, 0.1), (4, 0.1), (0.5, 0.1))] == [
        0.7, 0.9, 0.8, 1.0, 0.0,
    ]  # fmt: skip


def test_an_answer_that_took_just_as_long_as_the_aim_kept_it() -> None:
    assert seen(report((TTFT, ITL))).attainment(TTFT, ITL) == 1


def test_an_answer_of_one_token_has_only_its_first_to_be_late_with() -> None:
    assert seen(report((1.0, 0.0), (3.0, 0.0))).attainment(TTFT, ITL) == 0.5


def test_an_aim_within_a_bucket_has_its_part_of_it() -> None:
    assert seen(report((2.9, 0.01))).attainment(3.0, ITL) == pytest.approx((3.0 - 2.5) / (3.2 - 2.5))


def test_requests_that_failed_or_were_turned_away_kept_no_aim() -> None:
    told = report(*[GOOD] * 6, failed=3, refused_busy=1, refused_limit=90, refused_other=90, client_gone=90)
    assert seen(told).attainment(TTFT, ITL) == pytest.approx(0.6)


def test_where_nobody_asked_nobody_knows() -> None:
    assert seen(report()).attainment(TTFT, ITL) is None


def test_replicas_add_up_and_only_what_was_added_counts() -> None:
    older = (report(*[BAD] * 50), report(*[GOOD] * 50, run="b1"))
    newer = (report(*[BAD] * 50, GOOD, GOOD), report(*[GOOD] * 51, LATE, run="b1"))
    assert seen(*newer, older=older).attainment(TTFT, ITL) == pytest.approx(3 / 4)


def test_while_a_replica_does_not_tell_nobody_knows() -> None:
    old = TrafficReport(replica="b", incarnation="b1", finished=5)
    assert seen(report(GOOD), old).attainment(TTFT, ITL) is None
    other = replace(old, answers=(SIDE + 1, 3, 1))
    assert seen(report(GOOD), other).attainment(TTFT, ITL) is None


def test_of_a_replica_that_has_begun_to_tell_what_it_tells_counts() -> None:
    old = TrafficReport(replica="a", incarnation="a1", finished=5)
    assert seen(report(GOOD, LATE), older=(old,)).attainment(TTFT, ITL) == 0.5


aims = st.sampled_from([edge for edge in EDGES if edge >= 0.01])
times = st.tuples(st.floats(0.0, 200.0), st.floats(0.0, 10.0))


@given(st.lists(times, min_size=1, max_size=50), aims, aims)
def test_for_aims_that_are_bounds_it_is_the_share_of_answers_that_kept_both(
    given_times: list[tuple[float, float]], ttft: float, gap: float
) -> None:
    true = sum(one <= ttft and other <= gap for one, other in given_times) / len(given_times)
    assert seen(report(*given_times)).attainment(ttft, gap) == pytest.approx(true)
