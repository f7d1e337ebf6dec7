"""Sums of usage and their price are exact, whatever the order and the grouping."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.usage import (
    Aggregation,
    By,
    PriceError,
    Prices,
    Totals,
    UsageRecord,
    gpu_cost,
    price,
    utc_day,
)

NAMES = st.sampled_from(["a", "b", "c", ""])
TOKENS = st.integers(0, 10**7)
RECORDS = st.lists(
    st.builds(
        UsageRecord,
        id=st.uuids().map(lambda one: one.hex),
        at=st.floats(0, 4e9, allow_nan=False),
        model=NAMES,
        tenant=NAMES,
        user=NAMES,
        outcome=st.sampled_from(["ok", "client_gone", "timeout"]),
        prompt_tokens=TOKENS,
        cached_tokens=TOKENS,
        completion_tokens=TOKENS,
        reasoning_tokens=TOKENS,
        seconds=st.floats(0, 1e4, allow_nan=False),
    ),
    max_size=30,
)
PRICES = st.builds(price, *[st.decimals(0, 1000, places=6, allow_nan=False, allow_infinity=False) for _ in range(3)])


def record(**fields: object) -> UsageRecord:
    return UsageRecord(**{"id": "r1", "at": 0.0, "model": "deepseek-r1", **fields})  # type: ignore[arg-type]


def aggregate(records: list[UsageRecord], by: list[By], prices: Prices | None = None) -> Aggregation:
    found = Aggregation(by, prices=prices)
    found.extend(records)
    return found


@settings(max_examples=50)
@given(RECORDS, st.lists(st.sampled_from(list(By)), max_size=3), PRICES)
def test_the_sum_of_the_parts_is_the_total(records: list[UsageRecord], by: list[By], prices: object) -> None:
    table = Prices(default=prices)  # type: ignore[arg-type]
    grouped, whole = aggregate(records, by, table), aggregate(records, [], table)
    assert grouped.total() == whole.total() == whole.groups.get((), Totals())
    assert sum((totals.money for _, totals in grouped.rows()), Decimal(0)) == whole.total().money


@given(RECORDS, st.randoms(use_true_random=False))
def test_the_order_of_records_does_not_matter(records: list[UsageRecord], order: random.Random) -> None:
    shuffled = list(records)
    order.shuffle(shuffled)
    assert aggregate(records, [By.TENANT, By.DAY]).rows() == aggregate(shuffled, [By.TENANT, By.DAY]).rows()


@given(RECORDS, st.data())
def test_a_record_that_comes_twice_counts_once(records: list[UsageRecord], data: st.DataObject) -> None:
    again = data.draw(st.lists(st.sampled_from(records), max_size=10)) if records else []
    twice = aggregate(records + again, [By.USER])
    assert twice.rows() == aggregate(records, [By.USER]).rows()
    assert twice.duplicates == len(again)


@given(st.floats(0, 4e9, allow_nan=False))
def test_days_are_those_of_the_calendar(at: float) -> None:
    assert utc_day(at) == datetime.fromtimestamp(int(at), UTC).strftime("%Y-%m-%d")


def test_the_default_price_is_that_of_r1() -> None:
    one = record(prompt_tokens=3_000_000, cached_tokens=1_000_000, completion_tokens=1_000_000)
    assert aggregate([one], []).total().money == Decimal("0.14") + 2 * Decimal("0.55") + Decimal("2.19")


def test_a_single_token_costs_what_a_millionth_of_the_price_is() -> None:
    assert aggregate([record(completion_tokens=1)], []).total().money == Decimal("0.00000219")


def test_reasoning_is_paid_as_part_of_the_answer_and_not_again() -> None:
    with_reasoning = aggregate([record(completion_tokens=10, reasoning_tokens=9)], []).total()
    assert with_reasoning.money == aggregate([record(completion_tokens=10)], []).total().money


def test_more_cached_tokens_than_the_prompt_has_never_cost_less_than_nothing() -> None:
    assert aggregate([record(prompt_tokens=5, cached_tokens=9)], []).total().money == 5 * Decimal("0.14") / 10**6


def test_a_model_with_a_price_of_its_own_is_counted_by_it() -> None:
    prices = Prices(models={"small": price("0", "1", "2")})
    records = [record(id="1", model="small", prompt_tokens=10**6), record(id="2", prompt_tokens=10**6)]
    rows = dict(aggregate(records, [By.MODEL], prices).rows())
    assert (rows["small",].money, rows["deepseek-r1",].money) == (Decimal(1), Decimal("0.55"))


@pytest.mark.parametrize("wrong", ["0.1234567", "-1", "cheap", "NaN", "Infinity"])
def test_a_price_that_cannot_be_counted_exactly_is_refused(wrong: str) -> None:
    with pytest.raises(PriceError):
        price(wrong, "0", "0")


def test_only_records_of_the_wanted_time_and_tenant_count() -> None:
    found = Aggregation([], since=10, until=20, tenant="a")
    found.extend(
        [record(id=f"{tenant}{at}", at=float(at), tenant=tenant) for tenant in ("a", "b") for at in (9, 10, 19, 20)]
    )
    assert found.total().requests == 2
    assert (found.from_at, found.to_at) == (10, 19)


def test_a_client_that_left_is_not_a_failure() -> None:
    records = [record(id=outcome, outcome=outcome) for outcome in ("ok", "client_gone", "timeout")]
    assert aggregate(records, []).total().failed == 1


def test_hours_of_a_day_are_groups_of_their_own() -> None:
    records = [record(id="1", at=3599.0), record(id="2", at=3600.0)]
    assert [labels for labels, _ in aggregate(records, [By.HOUR]).rows()] == [("1970-01-01T00",), ("1970-01-01T01",)]


def test_gpus_cost_their_hours_whoever_used_them() -> None:
    cost = gpu_cost(Totals(prompt_tokens=3_000_000, completion_tokens=1_000_000), gpus=8, seconds=1800, hour_price="2")
    assert (cost.hours, cost.money) == (Decimal(4), Decimal(8))
    assert (cost.per_million_tokens, cost.per_million_completion_tokens) == (Decimal(2), Decimal(8))


def test_without_tokens_there_is_no_cost_per_token() -> None:
    assert gpu_cost(Totals(), gpus=1, seconds=3600, hour_price="2").per_million_tokens is None
