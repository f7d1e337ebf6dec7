"""Every expression of the Grafana dashboards and of the alerts asks for metrics and labels that exist."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client import Counter, Gauge
from prometheus_client import Histogram as PrometheusHistogram

from tandem.engine.cpu import counters
from tandem.gateway.observe.metric_types import Histogram
from tandem.gateway.observe.metrics import Metrics
from tandem_operator import metrics as operator

CHART = Path(__file__).parents[2] / "helm" / "tandem"
GATEWAY, FLEETS = CHART / "dashboards" / "gateway.json", CHART / "dashboards" / "fleets.json"
TARGET_LABELS = {"instance", "job", "namespace"}
"""What Prometheus and its operator add to everything that they scrape.

A metric's own label of such a name would be called `exported_…`, and theirs would be in its place (the operator's
`namespace`, a Fleet's; the gateways' `endpoint`), were it not for `honorLabels`: `tests/kube/test_chart.py` holds the
monitors to it.
"""
POD_LABELS = {"tandem_dev_fleet"}
"""What the gateways' monitor adds, by `podTargetLabels`."""
FUNCTIONS = {"histogram_quantile", "sum", "rate", "increase", "max", "max_over_time", "min", "count"}
WORDS = {"by", "and", "or", "unless", "on"}

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_SELECTOR = re.compile(r"([a-zA-Z_:][\w:]*)\s*\{([^}]*)\}")
_MATCHER = re.compile(r"\s*(\w+)\s*(?:=~|!~|!=|=)\s*S\s*,?")
_LABEL_LIST = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")
_RANGE = re.compile(r"\[(?:\$__rate_interval|\d+[smhd])\]")
_NAME = re.compile(r"(?<![\w:.])([a-zA-Z_:][\w:]*)(\s*\()?")


class Asked(NamedTuple):
    """What an expression asks for."""

    metrics: set[str]
    matched: dict[str, set[str]]
    """Labels that are matched, by metric."""
    grouped: set[str]
    """Labels that are grouped by."""
    functions: set[str]


def asked(expression: str) -> Asked:
    bare = _STRING.sub("S", expression)
    matched: dict[str, set[str]] = {}
    for metric, inside in _SELECTOR.findall(bare):
        assert _MATCHER.sub("", inside).strip() == "", f"cannot read the matchers {{{inside}}}"
        matched.setdefault(metric, set()).update(_MATCHER.findall(inside))
    bare = _SELECTOR.sub(r"\1", bare)
    grouped = {label.strip() for labels in _LABEL_LIST.findall(bare) for label in labels.split(",")}
    bare = _RANGE.sub("", _LABEL_LIST.sub("", bare))
    assert not set(bare) & set("{}[]$"), f"cannot read {expression}"
    names = _NAME.findall(bare)
    return Asked(
        {name for name, called in names if not called and name not in WORDS},
        matched,
        grouped,
        {name for name, called in names if called and name not in WORDS},
    )


def offered() -> dict[str, set[str]]:
    """The names of all samples that there can be, and their labels."""
    metrics = Metrics()
    found: dict[str, set[str]] = {}
    for collector in [*vars(metrics).values(), *vars(counters).values(), *vars(operator).values()]:
        if isinstance(collector, Histogram):
            for suffix in ("bucket", "sum", "count"):
                found[f"{collector.name}_{suffix}"] = {*collector._labels, *(["le"] if suffix == "bucket" else [])}
        elif isinstance(collector, PrometheusHistogram):
            for suffix in ("bucket", "sum", "count"):
                found[f"{collector._name}_{suffix}"] = {
                    *collector._labelnames,
                    *(["le"] if suffix == "bucket" else []),
                }
        elif isinstance(collector, Counter):
            found[f"{collector._name}_total"] = set(collector._labelnames)
        elif isinstance(collector, Gauge):
            found[collector._name] = set(collector._labelnames)
    for family in metrics.registry.collect():
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


OFFERED = offered()


def labels_of(metric: str) -> set[str]:
    """Labels of a metric as Prometheus has it."""
    return OFFERED[metric] | TARGET_LABELS | (set() if metric.startswith("tandem_operator_") else POD_LABELS)


def panels(board: Path) -> Iterator[dict[str, Any]]:
    yield from json.loads(board.read_text())["panels"]


def targets(*boards: Path) -> list[tuple[str, str, str]]:
    """(panel, expression, legend)"""
    return [
        (panel["title"], target["expr"], target["legendFormat"])
        for board in boards
        for panel in panels(board)
        for target in panel.get("targets", ())
    ]


def alerts() -> list[tuple[str, str, str]]:
    """(alert, expression, what people read)"""
    groups = yaml.safe_load((CHART / "alerts" / "tandem.yaml").read_text())
    return [
        (rule["alert"], rule["expr"], " ".join(rule["annotations"].values()))
        for group in groups
        for rule in group["rules"]
    ]


def faults(expression: str, legend: str = "") -> list[str]:
    """What the expression asks for in vain."""
    wants = asked(expression)
    found = [f"no metric {name}" for name in wants.metrics - OFFERED.keys()]
    found += [f"no function {name}" for name in wants.functions - FUNCTIONS]
    for metric in wants.metrics & OFFERED.keys():
        labels = labels_of(metric)
        found += [f"{metric} has no {label}" for label in wants.matched.get(metric, set()) - labels]
        found += [f"{metric} has no {label}" for label in wants.grouped - labels]
    shown = set(re.findall(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}", legend))
    kept = wants.grouped if wants.functions & {"sum", "max", "min"} or wants.grouped else TARGET_LABELS
    found += [f"the legend shows {label}, which is not grouped by" for label in shown - kept]
    return found


@pytest.mark.parametrize(("panel", "expression", "legend"), targets(GATEWAY, FLEETS))
def test_every_expression_asks_for_what_exists(panel: str, expression: str, legend: str) -> None:
    assert faults(expression, legend) == []


@pytest.mark.parametrize(
    ("expression", "legend", "fault"),
    [
        ("sum(rate(tandem_request_total[$__rate_interval]))", "", "no metric tandem_request_total"),
        ("sum(up)", "", "no metric up"),
        ('sum(tandem_requests_total{tenant="a"})', "", "tandem_requests_total has no tenant"),
        ("sum by (tenant) (tandem_requests_total)", "", "tandem_requests_total has no tenant"),
        ("sum by (le) (tandem_queue_seconds_count)", "", "tandem_queue_seconds_count has no le"),
        ("sum(tandem_requests_total)", "{{outcome}}", "the legend shows outcome, which is not grouped by"),
        ("sum(tandem_requests_total)", "{{ $labels.outcome }}", "the legend shows outcome, which is not grouped by"),
        ("sum by (tandem_dev_fleet) (tandem_operator_leader)", "", "tandem_operator_leader has no tandem_dev_fleet"),
        ("sum by (fleet) (increase(tandem_requests_total[5m])) > 0", "", "tandem_requests_total has no fleet"),
        ("summ(tandem_requests_total)", "", "no function summ"),
    ],
)
def test_an_expression_that_asks_for_more_is_found(expression: str, legend: str, fault: str) -> None:
    assert fault in faults(expression, legend)


@pytest.mark.parametrize(("alert", "expression", "text"), alerts())
def test_every_alert_asks_for_what_exists_and_tells_what_it_asked_for(alert: str, expression: str, text: str) -> None:
    assert faults(expression, text) == []


@pytest.mark.parametrize(("alert", "expression", "text"), alerts())
def test_no_fleet_that_is_well_hides_one_that_is_not(alert: str, expression: str, text: str) -> None:
    # An operator leads for all fleets of its namespaces.
    whose = {"namespace"} if alert == "TandemNoLeader" else {"namespace", "tandem_dev_fleet"}
    grouped = [set(re.split(r",\s*", labels)) for labels in _LABEL_LIST.findall(expression)]
    assert grouped
    assert all(whose <= {"tandem_dev_fleet" if label == "fleet" else label for label in one} for one in grouped)


@pytest.mark.parametrize(
    ("board", "fleet"),
    [pytest.param(GATEWAY, "tandem_dev_fleet", id="gateway"), pytest.param(FLEETS, "fleet", id="fleets")],
)
def test_a_dashboard_keeps_to_the_fleet_that_is_chosen(board: Path, fleet: str) -> None:
    chosen = f'namespace=~"$namespace",{fleet}=~"$fleet"'
    of_fleets = [
        (panel, metric, matchers)
        for panel, expression, _ in targets(board)
        for metric, matchers in re.findall(r"\b(tandem_\w+)(\{[^}]*\})?", expression)
        if fleet in labels_of(metric)
    ]
    assert of_fleets
    assert [(panel, metric) for panel, metric, matchers in of_fleets if chosen not in matchers] == []


@pytest.mark.parametrize("board", [GATEWAY, FLEETS], ids=["gateway", "fleets"])
def test_variables_ask_for_labels_that_exist(board: Path) -> None:
    variables = json.loads(board.read_text())["templating"]["list"]
    queries = [one["query"]["query"] for one in variables if one["type"] == "query"]
    assert queries
    for query in queries:
        found = re.fullmatch(r"label_values\((\w+), (\w+)\)", query)
        assert found is not None
        assert found[2] in labels_of(found[1])


@pytest.mark.parametrize(
    ("board", "whose"),
    [
        pytest.param(GATEWAY, r"tandem_(?!engine_|operator_)", id="gateway"),
        pytest.param(FLEETS, "tandem_operator_", id="operator"),
    ],
)
def test_every_metric_is_on_a_dashboard(board: Path, whose: str) -> None:
    used = {name for _, expression, _ in targets(board) for name in asked(expression).metrics}
    families = {name.removesuffix("_bucket") for name in used}
    own = {name for name in OFFERED if re.match(whose, name)}
    missing = {name for name in own if re.sub(r"_(bucket|sum|count)$", "", name) not in families}
    assert own
    assert missing == set()


@pytest.mark.parametrize("board", [GATEWAY, FLEETS], ids=["gateway", "fleets"])
def test_panels_have_ids_of_their_own_and_do_not_overlap(board: Path) -> None:
    cells: dict[tuple[int, int], str] = {}
    ids = [panel["id"] for panel in panels(board)]
    assert len(set(ids)) == len(ids)
    for panel in panels(board):
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for x in range(at["x"], at["x"] + at["w"]):
            for y in range(at["y"], at["y"] + at["h"]):
                assert cells.setdefault((x, y), panel["title"]) == panel["title"]


@pytest.mark.parametrize("board", [GATEWAY, FLEETS], ids=["gateway", "fleets"])
def test_a_number_is_there_also_when_it_is_nought(board: Path) -> None:
    # It shows the last value that there was; an expression that compares has none while it is false.
    shown = [target["expr"] for panel in panels(board) if panel["type"] == "stat" for target in panel["targets"]]
    assert shown
    assert [one for one in shown if re.search(r"[=!<>]=|[<>]", _SELECTOR.sub("", one))] == []


def test_the_rows_are_those_that_an_operator_looks_for() -> None:
    rows = [[panel["title"] for panel in panels(board) if panel["type"] == "row"] for board in (FLEETS, GATEWAY)]
    assert rows[0] == ["Overview", "Fleets", "Operator"]
    assert rows[1] == [
        "Overview",
        "Latency",
        "Throughput",
        "Queue and refusals",
        "Tenants",
        "Groups and pools",
        "Retries, migrations, aborts",
        "Prefix cache and KV transfer",
        "Gateway",
    ]
