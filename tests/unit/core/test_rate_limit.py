"""Limits per minute are kept, in every minute, and what is said about the wait is true."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.rate_limit import SLOT_S, SPAN_S, Account, Budget, Quota, Shortage, Window

limits = st.integers(1, 1000)
gaps = st.one_of(st.just(0.0), st.floats(0, 1), st.floats(0, 90))
asks = st.lists(st.tuples(gaps, st.integers(1, 300)), max_size=60)
starts = st.floats(0, 1e9)


def test_a_whole_minute_may_be_used_at_once_and_then_nothing() -> None:
    window = Window(100)
    assert window.take(100, 0.0) == 0
    assert window.take(1, 0.0) == SPAN_S + SLOT_S
    assert window.take(1, 60.0) == SLOT_S
    assert window.take(100, 60.25) == 0


def test_ten_times_the_limit_gets_the_limit_within_a_percent() -> None:
    window = Window(600)
    granted = sum(window.take(1, second / 100) == 0 for second in range(60_000))
    assert granted == pytest.approx(6000, rel=0.01)
    assert granted <= 6000


@given(limit=limits, start=starts, asked=asks)
def test_no_minute_gets_more_than_the_limit(limit: int, start: float, asked: list[tuple[float, int]]) -> None:
    window, now, granted = Window(limit), start, []
    for gap, cost in asked:
        now += gap
        if cost <= limit and window.take(cost, now) == 0:
            granted.append((now, cost))
    for end, _ in granted:
        assert sum(cost for when, cost in granted if end - SPAN_S < when <= end) <= limit


@given(limit=limits, start=starts, asked=asks, debits=asks, cost=st.integers(1, 300))
def test_whoever_comes_back_when_told_is_let_in_and_not_before(
    limit: int, start: float, asked: list[tuple[float, int]], debits: list[tuple[float, int]], cost: int
) -> None:
    window, now = Window(limit), start
    for (gap, taken), (_, debit) in itertools.zip_longest(asked, debits, fillvalue=(0.0, 0)):
        now += gap
        window.take(taken, now)
        window.debit(debit, now)
    wait = window.wait(cost, now)
    assert math.isfinite(wait)
    early = now + wait - SLOT_S / 2
    if wait > 2 * SLOT_S:
        copy = Window(limit)
        copy.used, copy.debt, copy._slots = window.used, window.debt, window._slots.copy()
        assert copy.wait(cost, early) > 0
    assert window.take(cost, now + wait) == 0


@given(limit=limits, asked=st.lists(st.tuples(gaps, st.integers(1, 3000)), min_size=1, max_size=30))
def test_debts_are_paid_from_the_minutes_that_follow(limit: int, asked: list[tuple[float, int]]) -> None:
    window, now, used = Window(limit), 0.0, 0
    for gap, cost in asked:
        now += gap
        if window.wait(1, now) == 0:
            window.debit(cost, now)
            used += cost
    # Of what was used, all but the last debt and one window must have been paid by time that has passed.
    window.advance(now)
    assert used <= limit * (now / SPAN_S) + window.used + window.debt + 1e-6
    free_again = now + window.reset(now)
    assert used <= limit * (math.floor(free_again / SPAN_S) + 1) + 1e-6
    assert window.wait(limit, free_again) == 0


@given(limit=limits, asked=asks, back=st.integers(1, 300))
def test_what_is_given_back_at_once_was_never_taken(limit: int, asked: list[tuple[float, int]], back: int) -> None:
    window, untouched, now = Window(limit), Window(limit), 0.0
    for gap, cost in asked:
        now += gap
        if window.wait(back, now) == 0 and back <= limit:
            window.debit(back, now)
            window.debit(-back, now)
        assert window.take(cost, now) == untouched.take(cost, now)


def test_a_share_smaller_than_one_request_still_lets_it_through_now_and_then() -> None:
    window = Window(0.5)
    granted = sum(window.take(1, second) == 0 for second in range(1200))
    assert granted == 10


def test_of_output_only_that_some_is_left_is_asked_for() -> None:
    account, quota = Account(), Quota(output_tokens=1000)
    account.spend(quota, (1, 50, 999), 0.0)
    assert account.shortage(quota, 10**6, 0.0) is None
    account.spend(quota, (0, 0, 1), 0.0)
    assert account.shortage(quota, 1, 0.0) == Shortage(Budget.OUTPUT, SPAN_S + SLOT_S)


def test_of_running_requests_the_usual_output_is_held_and_not_the_greatest_possible() -> None:
    account, quota = Account(), Quota(output_tokens=1000)
    assert account.expected_output(32_000) < 32_000
    for _ in range(30):
        account.learn(100)
    started = 0
    while account.shortage(quota, 1, 0.0) is None:
        account.held += account.expected_output(32_000)
        started += 1
    assert started == 10


def test_an_answer_that_failed_says_nothing_of_the_next() -> None:
    account = Account()
    account.learn(100)
    account.learn(0)
    assert account.expected_output(1000) == 100


def test_the_limit_that_is_short_for_longest_is_named() -> None:
    account, quota = Account(), Quota(requests=1, input_tokens=100)
    account.spend(quota, (0, 100, 0), 0.0)
    account.spend(quota, (1, 0, 0), 30.0)
    shortage = account.shortage(quota, 1, 30.0)
    assert shortage is not None
    assert shortage.budget is Budget.REQUESTS


def test_a_limit_of_nothing_lets_nothing_through() -> None:
    assert Account().shortage(Quota(requests=0), 1, 0.0) == Shortage(Budget.REQUESTS, math.inf)


def test_entries_rebuild_an_account() -> None:
    account, quota = Account(), Quota(requests=10, output_tokens=100)
    account.spend(quota, (3, 0, 0), 0.0)
    account.spend(quota, (0, 0, 130), 10.0)
    assert account.entries(20.0) == [(1, 80, 3), (3, 40, 100), (3, -1, 30)]
