"""What gateways' reports say of a stretch of time, while replicas come, go and start again."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from tandem.core.traffic import BOUNDS, Traffic, TrafficHistory, TrafficReport, percentile, share_within
from tandem.core.types import Role


def histogram(*seconds: float) -> tuple[int, ...]:
    counts = [0] * (len(BOUNDS) + 1)
    for value in seconds:
        counts[sum(bound < value for bound in BOUNDS)] += 1
    return tuple(counts)


def report(at: float, arrived: int, *, run: str = "a1", started: float = -1000.0, **fields: object) -> TrafficReport:
    """What a replica tells at `at`: each request has a prompt of 100 tokens and an answer of 10."""
    made = TrafficReport(
        replica=run[0],
        incarnation=run,
        started=started,
        at=at,
        arrived=arrived,
        admitted=arrived,
        input_tokens=100 * arrived,
        output_tokens=10 * arrived,
    )
    return replace(made, **fields)


class Watched:
    """A history that is given reports."""

    def __init__(self, keep_s: float = 60.0) -> None:
        self.history = TrafficHistory(keep_s)
        self.now = 0.0

    def look(self, now: float, *reports: TrafficReport) -> None:
        self.now = now
        self.history.add(reports, now)

    def window(self, length_s: float = 10.0) -> Traffic | None:
        return self.history.window(length_s, self.now)

    def of(self, length_s: float = 10.0) -> Traffic:
        found = self.window(length_s)
        assert found is not None
        return found


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_buckets_are_narrow_and_people_find_their_aims_among_them() -> None:
    assert max(high / low for low, high in itertools.pairwise(BOUNDS)) < 1.15
    assert {0.01, 0.025, 0.04, 0.05, 0.1, 0.25, 0.5, 1, 2, 2.5, 5, 10, 20, 50, 80} <= set(BOUNDS)


@given(st.lists(st.floats(0.01, 60), min_size=1, max_size=60), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_percentiles_from_10_ms_to_60_s_are_within_10_percent(seconds: list[float], share: float) -> None:
    true = sorted(seconds)[math.ceil(share * len(seconds) - 1e-9) - 1]
    assert percentile(histogram(*seconds), share) == pytest.approx(true, rel=0.1)


@given(st.lists(st.floats(0.001, 200), min_size=1, max_size=40), st.sampled_from([0.05, 0.25, 2.0, 10.0, 500.0]))
def test_the_share_within_an_aim_that_is_a_bound_is_exact(seconds: list[float], aim: float) -> None:
    exact = statistics.fmean(value <= aim for value in seconds)
    if aim in BOUNDS:
        assert share_within(histogram(*seconds), aim) == pytest.approx(exact)
    else:
        assert share_within(histogram(*seconds), aim) == pytest.approx(statistics.fmean(v <= 160 for v in seconds))


def test_of_nothing_there_is_neither_a_percentile_nor_a_share() -> None:
    traffic = Traffic(seconds=10)
    assert (traffic.ttft_s(0.95), traffic.itl_s(0.95)) == (None, None)
    assert (traffic.ttft_within(1), traffic.itl_within(1)) == (None, None)


def test_rates_are_differences_by_the_replicas_own_clock(watched: Watched) -> None:
    # Its clock is an hour off, and how old its reports are when they are read varies.
    watched.look(0, report(3600.0, 50))
    watched.look(10, report(3609.0, 68))
    traffic = watched.of()
    assert traffic.arrived == 18
    assert traffic.arrival_rate == pytest.approx(2)
    assert (traffic.input_rate, traffic.output_rate) == (pytest.approx(200), pytest.approx(20))


def test_requests_that_limits_or_their_own_errors_kept_out_are_no_load(watched: Watched) -> None:
    watched.look(0, report(0, 0))
    watched.look(10, report(10, 30, refused_limit=4, refused_other=6, refused_busy=7))
    assert watched.of().arrival_rate == pytest.approx(2)


def test_prefill_computes_what_no_cache_held(watched: Watched) -> None:
    watched.look(0, report(0, 0))
    watched.look(10, report(10, 10, cached_tokens=600))
    assert watched.of().uncached_rate == pytest.approx(40)


def test_several_replicas_add_up(watched: Watched) -> None:
    watched.look(0, report(0, 10), report(100, 5, run="b1"))
    watched.look(10, report(10, 20, queue_oldest_s=1.5), report(110, 25, run="b1", queue_oldest_s=0.5, running=3))
    traffic = watched.of()
    assert (traffic.arrived, traffic.replicas, traffic.running) == (30, 2, 3)
    assert traffic.queue_oldest_s == 1.5


def test_a_replica_that_started_again_counts_from_zero(watched: Watched) -> None:
    watched.look(0, report(0, 1000))
    watched.look(4, report(4, 1008))
    watched.look(10, report(10, 6, run="a2", started=7.0))
    assert watched.of().arrived == 8 + 6


def test_a_replica_that_is_gone_counts_for_as_long_as_it_was_there(watched: Watched) -> None:
    watched.look(0, report(0, 0), report(0, 0, run="b1"))
    watched.look(5, report(5, 10), report(5, 30, run="b1", queue_length=9))
    watched.look(11, report(11, 20))
    traffic = watched.of(11)
    assert (traffic.arrived, traffic.queue_length, traffic.replicas) == (50, 0, 1)
    watched.look(30, report(30, 40))
    assert watched.of(10).arrived == 20


def test_a_replica_that_was_cut_off_from_the_store_is_not_taken_for_a_new_one(watched: Watched) -> None:
    watched.look(0, report(0, 0))
    watched.look(8, report(8, 0), report(8, 100_000, run="b1"))
    watched.look(10, report(10, 0), report(10, 100_006, run="b1"))
    assert watched.of().arrived == 6


def test_counters_that_fall_are_no_negative_traffic(watched: Watched) -> None:
    watched.look(0, report(0, 100))
    watched.look(10, report(10, 40))
    assert watched.of().arrived == 0


def test_percentiles_are_those_of_the_window_alone(watched: Watched) -> None:
    watched.look(0, report(0, 0, ttft=histogram(*[9.0] * 50)))
    watched.look(10, report(10, 10, ttft=histogram(*[9.0] * 50, *[0.3] * 10)))
    assert watched.of().ttft_s(0.95) == pytest.approx(0.3, rel=0.1)
    assert watched.of().ttft_within(0.5) == 1


def test_a_histogram_with_other_buckets_is_left_out(watched: Watched) -> None:
    watched.look(0, report(0, 0), report(0, 0, run="b1"))
    watched.look(10, report(10, 1, itl=histogram(0.02)), report(10, 1, run="b1", itl=(1, 2, 3)))
    assert sum(watched.of().itl) == 1


def test_too_short_a_look_gives_no_window(watched: Watched) -> None:
    watched.look(0, report(0, 0))
    assert watched.window() is None
    watched.look(4, report(4, 0))
    assert watched.window() is None
    watched.look(6, report(6, 12))
    assert watched.of().arrival_rate == pytest.approx(2)
    assert watched.window(60) is None


def test_reports_that_do_not_change_any_more_tell_nothing(watched: Watched) -> None:
    watched.look(0, report(0, 0))
    watched.look(10, report(10, 20))
    watched.look(14, report(10, 20))
    assert watched.of().arrived == 20
    watched.look(16, report(10, 20))
    assert watched.window() is None


def test_without_any_replica_there_is_no_window(watched: Watched) -> None:
    for now in (0, 5, 10):
        watched.look(now)
    assert watched.window() is None


def test_a_reader_that_was_away_for_long_begins_again(watched: Watched) -> None:
    watched.look(0, report(0, 0))
    watched.look(100, report(100, 1000))
    assert watched.window() is None


def test_the_fast_and_the_slow_window_look_back_differently_far(watched: Watched) -> None:
    arrived = 0
    for now in range(0, 62, 2):
        arrived += 2 if now <= 50 else 20
        watched.look(now, report(now, arrived))
    assert watched.of(10).arrival_rate == pytest.approx(10)
    assert watched.of(60).arrival_rate == pytest.approx((50 + 100) / 60, rel=0.05)


def test_who_waits_for_a_group_is_told_by_role_and_idle_means_nothing_at_all(watched: Watched) -> None:
    watched.look(0, report(0, 7))
    watched.look(10, report(10, 7))
    assert watched.of().idle
    watched.look(11, report(11, 7, running=1, waiting_decode=1))
    traffic = watched.of()
    assert (traffic.idle, traffic.waiting(Role.DECODE), traffic.waiting(Role.PREFILL)) == (False, 1, 0)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3), st.booleans()), max_size=60))
def test_whatever_replicas_do_what_a_window_counts_is_what_was_added(steps: list[tuple[str, int, bool]]) -> None:
    """Replicas work, start again and are looked at in any order: over the whole time nothing is lost or made up."""
    history, now, total = TrafficHistory(1000.0), 0.0, 0
    counts = dict.fromkeys("abc", 0)
    runs = dict.fromkeys("abc", 0)
    begun = dict.fromkeys("abc", 0.0)

    def look() -> None:
        history.add([report(now, counts[name], run=f"{name}{runs[name]}", started=begun[name]) for name in "abc"], now)

    look()
    for name, more, again in steps:
        now += 1.0
        counts[name] += more
        total += more
        look()
        if again:
            counts[name], runs[name], begun[name] = 0, runs[name] + 1, now
    now += 1.0
    look()
    traffic = history.window(now, now)
    assert traffic is not None
    assert traffic.arrived == total
