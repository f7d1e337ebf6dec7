"""Reads counters from Prometheus' text format, for `tandem status --json`, the demo and the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client.parser import text_string_to_metric_families

Counters = dict[str, list[dict[str, object]]]
"""Metric name → samples, each `{"labels": {…}, "value": …}`."""


def read_counters(text: str) -> Counters:
    """Every `tandem_*` counter and gauge in `text`; buckets of histograms are left out."""
    found: Counters = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("tandem_") and not sample.name.endswith(("_bucket", "_created")):
                found.setdefault(sample.name, []).append({"labels": dict(sample.labels), "value": sample.value})
    return found


def total(counters: Counters, name: str, **labels: str) -> float:
    """Sum of the samples of `name` whose labels include `labels`."""
    return sum(_value(sample) for sample in counters.get(name, []) if _matches(sample["labels"], labels))


def _value(sample: Mapping[str, object]) -> float:
    value = sample["value"]
    assert isinstance(value, float)
    return value


def _matches(have: object, wanted: Mapping[str, str]) -> bool:
    return isinstance(have, dict) and all(have.get(name) == value for name, value in wanted.items())
