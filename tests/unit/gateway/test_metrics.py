"""Metrics have few series, cost little per token, and are what Prometheus reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from tandem.gateway.observe.metric_types import Bounded, Histogram, Registry
from tandem.gateway.observe.metrics import Metrics

UNITS = ("_seconds", "_bytes", "_total", "_info")
COUNTED = {
    "tandem_requests_in_flight",
    "tandem_queue_length",
    "tandem_open_rooms",
    "tandem_requests_without_pair",
    "tandem_groups",
    "tandem_planning_wanted_groups",
    "tandem_group_open_rooms",
    "tandem_group_open_tokens",
    "tandem_usage_records_pending",
}
"""Gauges of things: their name says what is counted."""


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(tenants=2)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def exercise(metrics: Metrics) -> None:
    """Give every family at least one series."""
    for name in ("a", "b", "c", 'quo"ted\\\n'):
        tenant = metrics.tenant(name)
        tenant.queued(0.2, "high")
        tenant.refused("rate_limited")
        tenant.prompt(100)
        tenant.first_token(0.3, 2)
        tenant.tokens_between(0.08, 4)
        tenant.usage(cached=10, completion=6, reasoning=3)
        tenant.done("chat", "ok", 1.5)
    metrics.model("deepseek-r1", "1")
    metrics.kv_transferred(0.004, 10**6)
    metrics.prefix(predicted=64, found=48)
    metrics.leg_ended("prefill", "prefill-0", "ok", 0.2)
    metrics.migrated("group_lost")
    metrics.group_loads([("prefill", "prefill-0", 3, 900), ("prefill", "prefill-0", 1, 100)])


def test_what_a_tenant_tells_counts_for_it_and_for_the_gateway(metrics: Metrics) -> None:
    tenant = metrics.tenant("a")
    tenant.first_token(0.3, 2)
    tenant.tokens_between(0.08, 4)
    tenant.usage(cached=10, completion=6, reasoning=3)
    assert value(metrics, "tandem_delivered_tokens_total") == 6
    for prefix, labels in (("tandem_", {}), ("tandem_tenant_", {"tenant": "a"})):
        assert value(metrics, f"{prefix}time_to_first_token_seconds_count", **labels) == 1
        assert value(metrics, f"{prefix}inter_token_latency_seconds_count", **labels) == 4
        assert value(metrics, f"{prefix}inter_token_latency_seconds_sum", **labels) == pytest.approx(0.08)
        assert value(metrics, f"{prefix}inter_token_latency_seconds_bucket", le="0.02", **labels) == 4
        assert value(metrics, f"{prefix}inter_token_latency_seconds_bucket", le="0.01", **labels) == 0
    assert value(metrics, "tandem_reasoning_tokens_total") == 3
    assert value(metrics, "tandem_tenant_tokens_total", tenant="a", kind="reasoning") == 3


def test_tenants_beyond_the_limit_share_one_series(metrics: Metrics) -> None:
    for number in range(1000):
        metrics.tenant(f"tenant-{number}").prompt(1)
    found = {
        sample.labels["tenant"]
        for family in metrics.registry.collect()
        for sample in family.samples
        if "tenant" in sample.labels
    }
    assert found == {"tenant-0", "tenant-1", "other"}
    assert value(metrics, "tandem_tenant_tokens_total", tenant="other", kind="prompt") == 998
    assert value(metrics, "tandem_prompt_tokens_total") == 1000


def test_no_outcome_however_strange_makes_series_without_end(metrics: Metrics) -> None:
    for number in range(1000):
        metrics.tenant("a").done("chat", f"code-{number}", 1.0)
        metrics.tenant("a").refused(f"reason-{number}")
        metrics.leg_ended("decode", f"group-{number}", f"kind-{number}", 1.0)
    assert metrics.exposition().count(b"\n") < 3000
    assert (value(metrics, "tandem_requests_total", endpoint="chat", outcome="other") or 0) > 900


def test_the_first_values_keep_their_names() -> None:
    label = Bounded(2)
    assert [label.of(one) for one in ("a", "b", "c", "a", "d")] == ["a", "b", "other", "a", "other"]


def test_the_load_of_a_group_that_has_gone_is_not_shown_any_more(metrics: Metrics) -> None:
    metrics.group_loads([("prefill", "prefill-0", 3, 900), ("prefill", "prefill-0", 1, 100)])
    assert value(metrics, "tandem_group_open_tokens", role="prefill", group="prefill-0") == 1000
    metrics.group_loads([])
    assert value(metrics, "tandem_group_open_tokens", role="prefill", group="prefill-0") is None


def test_the_text_says_what_the_registry_holds(metrics: Metrics) -> None:
    exercise(metrics)
    shown = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(metrics.exposition().decode())
        for sample in family.samples
        if sample.name.startswith("tandem_")
    }
    held = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name.startswith("tandem_")
    }
    assert shown == held
    assert len(shown) > 200


def test_names_follow_the_conventions_of_prometheus(metrics: Metrics) -> None:
    exercise(metrics)
    for family in metrics.registry.collect():
        if not family.name.startswith("tandem_"):
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert re.fullmatch(r"tandem_[a-z]+(_[a-z]+)*", name)
        assert name.endswith(UNITS) or name in COUNTED, name
        assert family.documentation.endswith("."), family.name


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), max_size=30))
def test_a_value_counted_many_times_at_once_is_the_same_as_one_by_one(values: list[tuple[float, int]]) -> None:
    registry = Registry()
    at_once = Histogram("once", "", buckets=(0.5, 1, 5), registry=registry)
    single = Histogram("single", "", buckets=(0.5, 1, 5), registry=registry)
    for number, count in values:
        at_once.observe(number, count)
        for _ in range(count):
            single.observe(number)
    for le in ("0.5", "1.0", "5.0", "+Inf"):
        labels = {"le": le}
        assert registry.get_sample_value("once_bucket", labels) == registry.get_sample_value("single_bucket", labels)
    assert registry.get_sample_value("once_sum") == pytest.approx(registry.get_sample_value("single_sum") or 0)


def test_a_value_on_a_bound_belongs_below_it() -> None:
    registry = Registry()
    Histogram("h", "", buckets=(0.5, 1), registry=registry).observe(0.5)
    assert registry.get_sample_value("h_bucket", {"le": "0.5"}) == 1


def test_a_series_needs_all_labels() -> None:
    with pytest.raises(ValueError, match="has the labels"):
        Histogram("h", "", ["a", "b"], buckets=(1,), registry=Registry()).labels("one")


def test_the_documentation_lists_every_metric_and_no_other(metrics: Metrics) -> None:
    text = (Path(__file__).parents[3] / "docs" / "observability.md").read_text()
    own = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in metrics.registry.collect()
        if family.name.startswith("tandem_")
    }
    assert set(re.findall(r"`(tandem_[a-z_]+)`", text)) == own
