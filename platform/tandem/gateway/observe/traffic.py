"""What this replica tells of its traffic: about every second, its report goes to the store (`core/traffic.py`).

Nothing is counted here: all of it is read from the metrics, once a second, so no request and no token pays for it.
While the store is away the counters go on rising, and only fresh news is lost.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

import msgspec
from prometheus_client import Counter, Gauge

from tandem.core.tenants import Priority
from tandem.core.traffic import TRAFFIC, TrafficReport
from tandem.core.types import FleetSnapshot, Role
from tandem.gateway.access.admission import Admission
from tandem.gateway.observe.metrics import Metrics
from tandem.state import Store, StoreError

log = logging.getLogger(__name__)

EVERY_S = 1.0
LIFE_S = 10.0
"""As long as a replica's registration: a dead one's report goes with it."""

_FAILED = frozenset({"timeout", "engine_failure", "internal_error", "stopping", "no_capacity", "server_error"})
"""Outcomes that are the fleet's fault."""


class TrafficTeller:
    """Belongs to the event loop of its store."""

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        admission: Admission,
        *,
        parked: Callable[[], int],
        fleet: Callable[[], FleetSnapshot],
        replica: str,
        incarnation: str,
    ) -> None:
        """`parked`: how many requests wait for a group to come up now."""
        self._store = store
        self._metrics = metrics
        self._admission = admission
        self._parked = parked
        self._fleet = fleet
        self._replica = replica
        self._incarnation = incarnation
        self._loop = asyncio.get_running_loop()
        self._started = time.time()
        # The wall clock may be set; what is between two reports must not change by that.
        self._offset = self._started - self._loop.time()

    async def keep(self) -> None:
        """Tell it for ever."""
        away = False
        while True:
            try:
                await self._store.put(self._key, msgspec.json.encode(self.report()), ttl=LIFE_S)
                away = False
            except StoreError as error:
                if not away:
                    log.warning("cannot tell the fleet of the traffic: %s", error)
                away = True
            await asyncio.sleep(EVERY_S)

    def report(self) -> TrafficReport:
        """What it tells now."""
        metrics, admission = self._metrics, self._admission
        outcomes, refusals = _by(metrics.requests, "outcome"), _by(metrics.refusals, "reason")
        limited = sum(count for reason, count in refusals.items() if reason.startswith("limit_"))
        limited += refusals.get("concurrency", 0)
        busy = refusals.get("queue_full", 0) + refusals.get("deadline", 0)
        faults = sum(refusals.get(outcome, 0) for outcome in _FAILED)
        waiting = self._waiting()
        return TrafficReport(
            replica=self._replica,
            incarnation=self._incarnation,
            started=self._started,
            at=self._loop.time() + self._offset,
            arrived=sum(outcomes.values()) + _value(metrics.in_flight),
            admitted=metrics.queue.total,
            refused_busy=busy,
            refused_limit=limited,
            refused_other=sum(refusals.values()) - limited - busy - faults,
            no_capacity=outcomes.get("no_capacity", 0),
            finished=outcomes.get("ok", 0),
            failed=sum(outcomes.get(outcome, 0) for outcome in _FAILED),
            client_gone=outcomes.get("client_gone", 0),
            input_tokens=_value(metrics.prompt_tokens),
            cached_tokens=_value(metrics.cached_tokens),
            output_tokens=_value(metrics.delivered_tokens),
            ttft=metrics.first_token.counts,
            itl=metrics.between.counts,
            queue_length=sum(admission.waiting(priority) for priority in Priority),
            queue_oldest_s=admission.oldest_s,
            running=admission.running,
            waiting_prefill=waiting[Role.PREFILL],
            waiting_decode=waiting[Role.DECODE],
            answers=metrics.answer_times.told(),
        )

    @property
    def _key(self) -> str:
        return f"{TRAFFIC}{self._replica}"

    def _waiting(self) -> Mapping[Role, int]:
        """Requests that wait for a group to come up, by the roles that lack one. Where both have some, these cannot
        pair, and either would do."""
        parked = self._parked()
        there = {group.role for group in self._fleet().groups if group.routable}
        missing = set(Role) - there or set(Role)
        return {role: parked if role in missing else 0 for role in Role}


def _value(metric: Counter | Gauge) -> int:
    """Of a metric without labels."""
    return int(next(iter(metric.collect())).samples[0].value)


def _by(counter: Counter, label: str) -> dict[str, int]:
    """A counter's values summed by one of its labels."""
    found: dict[str, int] = {}
    for family in counter.collect():
        for sample in family.samples:
            found[sample.labels[label]] = found.get(sample.labels[label], 0) + int(sample.value)
    return found
