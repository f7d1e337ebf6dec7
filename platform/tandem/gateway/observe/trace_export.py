"""Spans on their way out: OpenTelemetry's batches, with an account of what is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult


class BoundedProcessor(BatchSpanProcessor):
    """OpenTelemetry's own, which counts what it loses."""

    def __init__(self, exporter: SpanExporter, queue: int, on_drop: Callable[[int], None]) -> None:
        self._taken = 0
        self._limit = queue
        self._on_drop = on_drop
        self._counting = _CountingExporter(exporter, on_drop)
        super().__init__(self._counting, max_queue_size=queue, max_export_batch_size=min(512, queue))

    def on_end(self, span: ReadableSpan) -> None:
        if self._taken - self._counting.handed >= self._limit:
            self._on_drop(1)
            return
        self._taken += 1
        super().on_end(span)


class _CountingExporter(SpanExporter):
    """Lives in the processor's thread."""

    def __init__(self, inner: SpanExporter, on_drop: Callable[[int], None]) -> None:
        self._inner = inner
        self._on_drop = on_drop
        self.handed = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.handed += len(spans)
        result = SpanExportResult.FAILURE
        try:
            result = self._inner.export(spans)
        finally:
            if result is not SpanExportResult.SUCCESS:
                self._on_drop(len(spans))
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._inner.force_flush(timeout_millis)
