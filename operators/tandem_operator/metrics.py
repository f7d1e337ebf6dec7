"""What the operator counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

LEADER = Gauge("tandem_operator_leader", "Whether this replica is the one that acts.")
CLAIMED = Gauge("tandem_operator_namespace_claimed", "1: this release acts there; 0: another one does.", ("namespace",))
RECONCILES = Counter("tandem_operator_reconciles", "Looks at an object.", ("kind", "result"))
SECONDS = Histogram("tandem_operator_reconcile_seconds", "Duration of a look at an object.", ("kind",))
WRITES = Counter("tandem_operator_writes", "Changes of objects.", ("kind",))
DECISIONS = Counter(
    "tandem_operator_planning_decisions",
    "Changes of the number of groups.",
    ("namespace", "fleet", "role", "direction"),
)
WANTED = Gauge("tandem_operator_pool_groups_wanted", "Groups that planning wants.", ("namespace", "fleet", "role"))
READY = Gauge("tandem_operator_pool_groups_ready", "Groups that are ready.", ("namespace", "fleet", "role"))
STOPPED = Gauge(
    "tandem_operator_pool_change_stopped",
    "1 while the last change of a pool is stopped or was taken back, else 0.",
    ("namespace", "fleet", "role"),
)
ATTAINMENT = Gauge(
    "tandem_operator_slo_attainment",
    "Share of requests that kept both aims over the slow window, 0 to 1.",
    ("namespace", "fleet"),
)
CONTROL = Gauge(
    "tandem_operator_control_reachable", "Whether a fleet's control service answers.", ("namespace", "fleet")
)
WAITING = Gauge("tandem_operator_queue_length", "Objects that wait to be looked at.")
