"""The gateway's Prometheus metrics. Each replica has its own registry. Times are in seconds."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 80, 160)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 5)
_WHOLE = (0.1, 0.5, 1, 2, 5, 10, 20, 40, 80, 160, 320, 640, 1280)


class Metrics:
    """What the gateway counts."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "tandem_requests",
            "Requests by endpoint and outcome: ok, or the error's code.",
            ["endpoint", "outcome"],
            registry=registry,
        )
        self.in_flight = Gauge("tandem_requests_in_flight", "Requests that wait for their answer.", registry=registry)
        self.first_token = Histogram(
            "tandem_time_to_first_token_seconds",
            "From the request's arrival to its first token.",
            buckets=_FIRST,
            registry=registry,
        )
        self.between = Histogram(
            "tandem_inter_token_latency_seconds",
            "Between tokens of a stream; tokens that arrive together share the time.",
            buckets=_BETWEEN,
            registry=registry,
        )
        self.duration = Histogram(
            "tandem_request_duration_seconds",
            "From the request's arrival to its end.",
            ["endpoint"],
            buckets=_WHOLE,
            registry=registry,
        )
        self.prompt_tokens = Counter("tandem_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.cached_tokens = Counter(
            "tandem_prompt_cached_tokens", "Tokens of prompts that the prefix cache held.", registry=registry
        )
        self.completion_tokens = Counter("tandem_completion_tokens", "Tokens of answers.", registry=registry)
        self.reasoning_tokens = Counter(
            "tandem_reasoning_tokens", "Tokens of answers that were reasoning.", registry=registry
        )
        self.rooms_opened = Counter("tandem_rooms_opened", "Rooms opened on a pair.", registry=registry)
        self.open_rooms = Gauge("tandem_open_rooms", "Rooms open on some side.", registry=registry)
        self.aborts = Counter(
            "tandem_leg_aborts", "Legs ended by the gateway, by role and reason.", ["role", "reason"], registry=registry
        )
        self.leg_failures = Counter(
            "tandem_leg_failures",
            "Legs that failed by themselves, by role and kind.",
            ["role", "kind"],
            registry=registry,
        )
        self.retries = Counter("tandem_retries", "Attempts beyond a request's first.", registry=registry)
        self.groups = Gauge(
            "tandem_groups", "Groups that the gateway knows, by role and state.", ["role", "state"], registry=registry
        )

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
