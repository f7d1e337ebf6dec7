"""The gateway's Prometheus metrics. Each replica has its own registry. Times are in seconds.

Everything that a request tells goes through the `TenantMetrics` of its tenant, which knows its series already: a token
costs about a microsecond. Label values come from closed sets or are bounded (`Bounded`). All of it belongs to the
event loop's thread.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, ProcessCollector, disable_created_metrics

from tandem.core.answer_times import AnswerTimes
from tandem.core.traffic import BOUNDS
from tandem.gateway.observe.metric_types import Bounded, Histogram, Registry

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 80, 160)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 5)
_WHOLE = (0.1, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
_QUEUE = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60)
_TRANSFER = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
# Per tenant there are many series, so each has few buckets.
_TENANT_FIRST = (0.1, 0.25, 0.5, 1, 2, 5, 20, 80)
_TENANT_BETWEEN = (0.01, 0.02, 0.04, 0.08, 0.16, 0.64)
_TENANT_WHOLE = (1, 5, 20, 80, 320)
_TENANT_QUEUE = (0.01, 0.1, 0.5, 2, 10, 60)

# Twice as many series, and nothing reads them.
disable_created_metrics()

TENANTS = 200
"""Tenants with series of their own; all others together are "other"."""
_OUTCOMES = 64
_GROUPS = 512


class TenantMetrics:
    """What the requests of one tenant tell; counts for the tenant and for the whole gateway."""

    __slots__ = (
        "_between",
        "_cached",
        "_completion",
        "_first",
        "_metrics",
        "_prompt",
        "_queue",
        "_reasoning",
        "_refused",
        "_whole",
        "label",
    )

    def __init__(self, metrics: Metrics, label: str) -> None:
        self.label = label
        self._metrics = metrics
        self._first = metrics.tenant_first_token.labels(label)
        self._between = metrics.tenant_between.labels(label)
        self._queue = metrics.tenant_queue.labels(label)
        self._whole = metrics.tenant_duration.labels(label)
        self._refused = metrics.tenant_refusals.labels(label)
        self._prompt = metrics.tenant_tokens.labels(label, "prompt")
        self._cached = metrics.tenant_tokens.labels(label, "cached")
        self._completion = metrics.tenant_tokens.labels(label, "completion")
        self._reasoning = metrics.tenant_tokens.labels(label, "reasoning")

    def queued(self, seconds: float, priority: str) -> None:
        """A request was admitted after this time in the queue."""
        self._metrics.queue.labels(priority).observe(seconds)
        self._queue.observe(seconds)

    def refused(self, reason: str) -> None:
        """A request was refused before any engine saw it; `reason` is the error's code."""
        self._metrics.refusals.labels(self._metrics.outcome(reason)).inc()
        self._refused.inc()

    def first_token(self, seconds: float, tokens: int = 1) -> None:
        """The first tokens are there, `seconds` after the request came."""
        self._metrics.first_token.observe(seconds)
        self._first.observe(seconds)
        self._metrics.delivered_tokens.inc(tokens)

    def tokens_between(self, seconds: float, tokens: int) -> None:
        """`tokens` more came together, `seconds` after the ones before: each took its share of the time."""
        each = seconds / tokens
        self._metrics.between.observe(each, tokens)
        self._between.observe(each, tokens)
        self._metrics.delivered_tokens.inc(tokens)

    def answered(self, first_s: float, between_s: float) -> None:
        """An answer is over, whose first token came after `first_s`, and the others `between_s` apart on average."""
        self._metrics.answer_times.observe(first_s, between_s)

    def delivered(self, tokens: int) -> None:
        """The first tokens of a further choice are there, beside those of the request's first."""
        self._metrics.delivered_tokens.inc(tokens)

    def prompt(self, tokens: int) -> None:
        """A request is sent to the engines with a prompt of so many tokens."""
        self._metrics.prompt_tokens.inc(tokens)
        self._prompt.inc(tokens)

    def usage(self, *, cached: int, completion: int, reasoning: int) -> None:
        """What a request used beside its prompt: once, when it is over, however it ended."""
        metrics = self._metrics
        metrics.cached_tokens.inc(cached)
        metrics.completion_tokens.inc(completion)
        metrics.reasoning_tokens.inc(reasoning)
        self._cached.inc(cached)
        self._completion.inc(completion)
        self._reasoning.inc(reasoning)

    def done(self, endpoint: str, outcome: str, seconds: float) -> None:
        """A request is over: once for each."""
        outcome = self._metrics.outcome(outcome)
        self._metrics.requests.labels(endpoint, outcome).inc()
        self._metrics.duration.labels(endpoint).observe(seconds)
        self._metrics.tenant_requests.labels(self.label, outcome).inc()
        self._whole.observe(seconds)


class Metrics:
    """What the gateway counts."""

    def __init__(self, *, tenants: int = TENANTS) -> None:
        """`tenants`: how many have series of their own."""
        self.registry = registry = Registry()
        self._outcomes = Bounded(_OUTCOMES)
        self._groups = Bounded(_GROUPS)
        self._tenant_limit = tenants
        self._tenants: dict[str, TenantMetrics] = {}
        self.answer_times = AnswerTimes()
        """For the fleet alone: Prometheus cannot tell one request's two times from two requests' ones."""
        ProcessCollector(registry=registry)
        self._make_requests(registry)
        self._make_tokens(registry)
        self._make_pairs(registry)
        self._make_tenants(registry)
        self._make_own(registry)
        self._other = TenantMetrics(self, Bounded.OTHER)

    def tenant(self, name: str) -> TenantMetrics:
        """What the tenant's requests tell their times and tokens to."""
        found = self._tenants.get(name)
        if found is None:
            if len(self._tenants) >= self._tenant_limit:
                return self._other
            found = self._tenants[name] = TenantMetrics(self, name)
        return found

    def outcome(self, name: str) -> str:
        """An outcome or a reason as a label value."""
        return self._outcomes.of(name)

    def model(self, name: str, version: str) -> None:
        """Which model is served."""
        self.model_info.clear()
        self.model_info.labels(name, version).set(1)

    def kv_transferred(self, seconds: float, size: int = 0) -> None:
        """A prompt's KV cache went from prefill to decode; `size` in bytes, 0 = unknown."""
        self.kv_transfer.observe(seconds)
        self.kv_bytes.inc(size)

    def prefix(self, *, predicted: int, found: int) -> None:
        """Tokens of a prompt that the router expected in the cache, and that were there."""
        self._prefix_predicted.inc(predicted)
        self._prefix_found.inc(found)

    def leg_ended(self, role: str, group: str, outcome: str, seconds: float) -> None:
        """A leg is over: "ok", "aborted" or the kind of its failure."""
        self.legs.labels(role, self._groups.of(group), self.outcome(outcome)).inc()
        self.leg_duration.labels(role).observe(seconds)

    def migrated(self, reason: str) -> None:
        """A stream that had begun goes on with a new pair."""
        self.migrations.labels(self.outcome(reason)).inc()

    def group_loads(self, loads: Iterable[tuple[str, str, int, int]]) -> None:
        """(role, group, rooms, tokens) of all groups, as this gateway has them open now."""
        self.group_rooms.clear()
        self.group_tokens.clear()
        for role, group, rooms, tokens in loads:
            self.group_rooms.labels(role, self._groups.of(group)).inc(rooms)
            self.group_tokens.labels(role, self._groups.of(group)).inc(tokens)

    def between_tokens(self, seconds: float, tokens: int) -> None:
        """`tokens` came together, `seconds` after the ones before. (Without a tenant; see `TenantMetrics`.)"""
        self.between.observe(seconds / tokens, tokens)
        self.delivered_tokens.inc(tokens)

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return self.registry.render()

    def _make_requests(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "tandem_requests",
            "Requests by endpoint and outcome: ok, client_gone, or the error's code.",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self.in_flight = Gauge("tandem_requests_in_flight", "Requests that wait for their answer.", registry=registry)
        self.first_token = Histogram(
            "tandem_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            buckets=_FIRST,
            fine=BOUNDS,
            registry=registry,
        )
        self.between = Histogram(
            "tandem_inter_token_latency_seconds",
            "Between tokens of a stream; tokens that arrive together share the time.",
            buckets=_BETWEEN,
            fine=BOUNDS,
            registry=registry,
        )
        self.duration = Histogram(
            "tandem_request_duration_seconds",
            "From the request's arrival to its end.",
            ["endpoint"],
            buckets=_WHOLE,
            registry=registry,
        )
        self.queue = Histogram(
            "tandem_queue_seconds",
            "Time that requests waited for admission.",
            ["priority"],
            buckets=_QUEUE,
            registry=registry,
        )
        self.queue_length = Gauge(
            "tandem_queue_length", "Requests that wait for admission.", ["priority"], registry=registry
        )
        self.refusals = Counter(
            "tandem_refusals", "Requests refused before any engine saw them.", ["reason"], registry=registry
        )

    def _make_tokens(self, registry: CollectorRegistry) -> None:
        self.prompt_tokens = Counter("tandem_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.cached_tokens = Counter(
            "tandem_prompt_cached_tokens", "Tokens of prompts that the prefix cache held.", registry=registry
        )
        self.completion_tokens = Counter(
            "tandem_completion_tokens", "Tokens of answers, counted when the request is over.", registry=registry
        )
        self.reasoning_tokens = Counter(
            "tandem_reasoning_tokens", "Tokens of answers that were reasoning.", registry=registry
        )
        self.delivered_tokens = Counter(
            "tandem_delivered_tokens", "Tokens of answers, counted as they come.", registry=registry
        )
        self.prefix_tokens = Counter(
            "tandem_prefix_tokens",
            "Tokens of prompts that the router expected in the cache (predicted), and that were there (found).",
            ["kind"],
            registry=registry,
        )
        self._prefix_predicted = self.prefix_tokens.labels("predicted")
        self._prefix_found = self.prefix_tokens.labels("found")

    def _make_pairs(self, registry: CollectorRegistry) -> None:
        self.rooms_opened = Counter("tandem_rooms_opened", "Rooms opened on a pair.", registry=registry)
        self.open_rooms = Gauge("tandem_open_rooms", "Rooms (leases) open on some side.", registry=registry)
        self.parked = Gauge(
            "tandem_requests_without_pair", "Requests that wait for a group to come up.", registry=registry
        )
        self.aborts = Counter(
            "tandem_leg_aborts", "Legs ended by the gateway, by role and reason.", ["role", "reason"], registry=registry
        )
        self.leg_failures = Counter(
            "tandem_leg_failures",
            "Legs that failed by themselves, by role and kind.",
            ["role", "kind"],
            registry=registry,
        )
        self.legs = Counter(
            "tandem_legs",
            "Legs that are over, by role, group and outcome.",
            ["role", "group", "outcome"],
            registry=registry,
        )
        self.leg_duration = Histogram(
            "tandem_leg_duration_seconds",
            "From a leg's sending to its end.",
            ["role"],
            buckets=_WHOLE,
            registry=registry,
        )
        self.retries = Counter("tandem_retries", "Attempts beyond a request's first.", registry=registry)
        self.migrations = Counter(
            "tandem_migrations", "Streams that went on with a new pair, by reason.", ["reason"], registry=registry
        )
        self.kv_transfer = Histogram(
            "tandem_kv_transfer_seconds",
            "From prefill's end to decode's first token: the KV cache's way, as the gateway sees it.",
            buckets=_TRANSFER,
            registry=registry,
        )
        self.kv_bytes = Counter(
            "tandem_kv_transfer_bytes", "KV cache handed from prefill to decode, where known.", registry=registry
        )
        self.groups = Gauge(
            "tandem_groups", "Groups that the gateway knows, by role and state.", ["role", "state"], registry=registry
        )
        self.planned = Gauge(
            "tandem_planning_wanted_groups",
            "Groups that autoscaling wants, by role; where Kubernetes' operator decides, it has metrics of its own.",
            ["role"],
            registry=registry,
        )
        self.group_rooms = Gauge(
            "tandem_group_open_rooms",
            "Rooms that this gateway has open on a group.",
            ["role", "group"],
            registry=registry,
        )
        self.group_tokens = Gauge(
            "tandem_group_open_tokens",
            "Tokens of this gateway's open rooms on a group.",
            ["role", "group"],
            registry=registry,
        )

    def _make_tenants(self, registry: CollectorRegistry) -> None:
        self.tenant_requests = Counter(
            "tandem_tenant_requests", "Requests by tenant and outcome.", ["tenant", "outcome"], registry=registry
        )
        self.tenant_refusals = Counter(
            "tandem_tenant_refusals", "Requests refused, by tenant.", ["tenant"], registry=registry
        )
        self.tenant_tokens = Counter(
            "tandem_tenant_tokens",
            "Tokens by tenant and kind: prompt (cached ones too), cached, completion (reasoning too), reasoning.",
            ["tenant", "kind"],
            registry=registry,
        )
        self.tenant_first_token = Histogram(
            "tandem_tenant_time_to_first_token_seconds",
            "From a request's arrival to its first token, by tenant.",
            ["tenant"],
            buckets=_TENANT_FIRST,
            registry=registry,
        )
        self.tenant_between = Histogram(
            "tandem_tenant_inter_token_latency_seconds",
            "Between tokens of a stream, by tenant.",
            ["tenant"],
            buckets=_TENANT_BETWEEN,
            registry=registry,
        )
        self.tenant_duration = Histogram(
            "tandem_tenant_request_duration_seconds",
            "From a request's arrival to its end, by tenant.",
            ["tenant"],
            buckets=_TENANT_WHOLE,
            registry=registry,
        )
        self.tenant_queue = Histogram(
            "tandem_tenant_queue_seconds",
            "Time that requests waited for admission, by tenant.",
            ["tenant"],
            buckets=_TENANT_QUEUE,
            registry=registry,
        )

    def _make_own(self, registry: CollectorRegistry) -> None:
        self.model_info = Gauge(
            "tandem_model_info", "The model that is served.", ["model", "version"], registry=registry
        )
        self.prefix_index_bytes = Gauge(
            "tandem_prefix_index_bytes", "Memory of the router's prefix index.", registry=registry
        )
        self.usage_records = Counter("tandem_usage_records", "Usage records written.", registry=registry)
        self.usage_dropped = Counter(
            "tandem_usage_records_dropped", "Usage records lost: the sink could not take them.", registry=registry
        )
        self.usage_pending = Gauge(
            "tandem_usage_records_pending", "Usage records in memory, not yet written.", registry=registry
        )
        self.usage_spool = Gauge(
            "tandem_usage_spool_bytes", "Usage records on disk that Redis does not have yet.", registry=registry
        )
        self.log_lines_dropped = Counter(
            "tandem_log_lines_dropped", "Lines of the log that were lost: nobody reads it.", registry=registry
        )
        self.spans_dropped = Counter(
            "tandem_trace_spans_dropped", "Spans that could not be exported.", registry=registry
        )
