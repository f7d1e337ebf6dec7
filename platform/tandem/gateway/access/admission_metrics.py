"""What admission tells, as metrics."""

from __future__ import annotations

from tandem.core.tenants import Priority
from tandem.gateway.observe.metrics import Metrics


class AdmissionMetrics:
    """An `AdmissionObserver`."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def queued(self, priority: Priority, length: int) -> None:
        self._metrics.queue_length.labels(priority.value).set(length)

    def admitted(self, tenant: str, priority: Priority, waited: float) -> None:
        self._metrics.tenant(tenant).queued(waited, priority.value)

    def refused(self, tenant: str, priority: Priority, reason: str) -> None:
        self._metrics.tenant(tenant).refused(reason)
