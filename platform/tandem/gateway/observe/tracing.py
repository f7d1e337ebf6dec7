"""OpenTelemetry traces: one span a request, under it one for each phase and each leg. Off unless an endpoint is given.

Names follow OpenTelemetry's conventions for generative AI where these have one (`gen_ai.*`), else they are `tandem.*`.
Context travels as W3C has it: taken from the client, given to both engines; with tracing off it is passed on as it
came. Spans are exported by a thread of their own from a bounded queue; what does not fit or cannot be sent is counted,
and no request ever waits or fails for it.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanContext, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from tandem.core.route_types import Pair
from tandem.gateway.observe.trace_export import BoundedProcessor

Headers = Mapping[bytes, bytes]

QUEUE = 4096
"""Spans that wait for export; a sampled request has about eight."""
EXPORT_TIMEOUT_S = 5.0
_TRACEPARENT = re.compile(rb"00-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_LONGEST = 8192
"""Bytes of baggage (W3C's limit) and of tracestate that are passed on; longer ones are left out."""
_FINE = frozenset({"ok", "client_gone"})


class Phase(Protocol):
    """A part of a request's way: `with trace.phase("tokenize"):`, or `end` where that does not fit."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def end(self, error: str = "") -> None:
        """It is over; `error` is its code, if it failed. Idempotent."""


class LegTrace(Protocol):
    """One leg of a pair."""

    @property
    def headers(self) -> Sequence[tuple[bytes, bytes]]:
        """What the engine is to be sent."""

    def event(self, name: str) -> None: ...
    def end(self, outcome: str = "ok") -> None:
        """The leg is over: "ok", "aborted" or the kind of its failure. Idempotent."""


class RequestTrace(Protocol):
    """One request. Nothing here raises."""

    @property
    def trace_id(self) -> str:
        """32 hex digits, also when the request is not sampled; "" when there is no trace."""

    @property
    def traceparent(self) -> bytes | None:
        """What goes on to others."""

    @property
    def headers(self) -> Sequence[tuple[bytes, bytes]]:
        """`traceparent`, and `tracestate` and `baggage` if the client sent them."""

    def describe(self, operation: str, model: str, **attributes: AttributeValue) -> None:
        """What is asked: "chat" or "text_completion", of which model; attributes by their full names, `__` for `.`"""

    def phase(self, name: str) -> Phase:
        """A phase begins: tokenize, admission, stream."""

    def routed(self, pair: Pair, attempt: int) -> None:
        """A pair was chosen for the attempt: the event "route" tells which, why, and what was expected of it."""

    def leg(self, role: str, *, group: str, epoch: int, dp_rank: int, room: int, attempt: int) -> LegTrace:
        """A leg is sent to an engine."""

    def event(self, name: str, **attributes: AttributeValue) -> None:
        """Something happened, such as a further attempt ("retry")."""

    def end(
        self,
        outcome: str,
        *,
        prompt_tokens: int = 0,
        cached_tokens: int = 0,
        completion_tokens: int = 0,
        reasoning_tokens: int = 0,
        finish_reasons: Sequence[str] = (),
    ) -> None:
        """It is over. Idempotent."""


class Tracing:
    """What makes the traces of one gateway replica."""

    def __init__(
        self,
        endpoint: str | None,
        *,
        sample_ratio: float = 1.0,
        follow_client: bool = True,
        fleet: str = "",
        replica: str = "",
        queue: int = QUEUE,
        exporter: SpanExporter | None = None,
        on_drop: Callable[[int], None] = lambda spans: None,
    ) -> None:
        """`endpoint`: URL that takes OTLP over HTTP, such as http://collector:4318/v1/traces; None = off.

        `sample_ratio`: share of the requests that are traced, 0 to 1; with `follow_client` a client's own decision
        comes first. `on_drop` hears of spans that are lost, from any thread.
        """
        self._provider: TracerProvider | None = None
        if endpoint is None and exporter is None:
            return
        inner = exporter or OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_TIMEOUT_S)
        resource = Resource.create(
            {"service.name": "tandem-gateway", "service.namespace": fleet, "service.instance.id": replica}
        )
        ratio = TraceIdRatioBased(sample_ratio)
        # Without an exit hook: `close` has a deadline, the hook has none.
        self._provider = TracerProvider(
            sampler=ParentBased(ratio) if follow_client else ratio, resource=resource, shutdown_on_exit=False
        )
        self._provider.add_span_processor(BoundedProcessor(inner, queue, on_drop))
        self._tracer = self._provider.get_tracer("tandem.gateway")
        self._propagator = TraceContextTextMapPropagator()

    def request(self, headers: Headers, name: str = "request") -> RequestTrace:
        """A request has come. `headers` by their names in small letters."""
        if self._provider is None:
            return _OFF if b"traceparent" not in headers else _passed_on(headers)
        parent = self._parent(headers)
        span = self._tracer.start_span(name, context=parent, kind=SpanKind.SERVER)
        passed = _baggage(headers)
        if not span.is_recording():
            return _Unsampled(span.get_span_context(), passed)
        return _Recorded(self._provider, span, passed)

    async def close(self, within: float = 5.0) -> None:
        """Export what waits, in at most `within` seconds."""
        provider, self._provider = self._provider, None
        if provider is not None:
            # A daemon, so that an exporter that hangs does not hold the process.
            work = threading.Thread(target=provider.shutdown, name="tandem-traces-end", daemon=True)
            work.start()
            await asyncio.to_thread(work.join, within)

    def _parent(self, headers: Headers) -> Context:
        found = headers.get(b"traceparent")
        if found is None:
            return Context()
        carrier = {"traceparent": found.decode("latin-1")}
        if state := headers.get(b"tracestate"):
            carrier["tracestate"] = state[:_LONGEST].decode("latin-1")
        return self._propagator.extract(carrier, Context())


# Off, or not sampled


class _Nothing:
    """A phase or a leg that nobody looks at."""

    __slots__ = ("headers",)

    def __init__(self, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        self.headers = headers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def event(self, name: str) -> None:
        return None

    def end(self, outcome: str = "") -> None:
        return None


class _Unrecorded:
    """A request of which only the context matters."""

    __slots__ = ("_nothing", "headers", "trace_id", "traceparent")

    def __init__(self, trace_id: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self.trace_id = trace_id
        self.traceparent = headers[0][1] if headers else None
        self.headers = headers
        self._nothing = _Nothing(headers)

    def describe(self, operation: str, model: str, **attributes: AttributeValue) -> None:
        return None

    def phase(self, name: str) -> Phase:
        return self._nothing

    def routed(self, pair: Pair, attempt: int) -> None:
        return None

    def leg(self, role: str, *, group: str, epoch: int, dp_rank: int, room: int, attempt: int) -> LegTrace:
        return self._nothing

    def event(self, name: str, **attributes: AttributeValue) -> None:
        return None

    def end(self, outcome: str, **usage: object) -> None:
        return None


_OFF = _Unrecorded("", ())


def _passed_on(headers: Headers) -> RequestTrace:
    """Tracing is off here; a client's context still goes on to the engines and into the log."""
    parent = headers[b"traceparent"]
    valid = _TRACEPARENT.fullmatch(parent)
    if valid is None:
        return _OFF
    passed = [(b"traceparent", parent)]
    if (state := headers.get(b"tracestate")) and len(state) <= _LONGEST:
        passed.append((b"tracestate", state))
    return _Unrecorded(valid[1].decode(), [*passed, *_baggage(headers)])


def _baggage(headers: Headers) -> list[tuple[bytes, bytes]]:
    found = headers.get(b"baggage")
    return [(b"baggage", found)] if found and len(found) <= _LONGEST else []


class _Unsampled(_Unrecorded):
    """On, but this request is not traced: engines hear that too."""

    __slots__ = ()

    def __init__(self, context: SpanContext, passed: Sequence[tuple[bytes, bytes]]) -> None:
        super().__init__(f"{context.trace_id:032x}", [*_context_headers(context), *passed])


# On


class _Recorded:
    """A request that is traced."""

    __slots__ = ("_passed", "_span", "_tracer", "_under", "headers", "trace_id")

    def __init__(self, provider: TracerProvider, span: Span, passed: Sequence[tuple[bytes, bytes]]) -> None:
        context = span.get_span_context()
        self._span = span
        self._tracer = provider.get_tracer("tandem.gateway")
        self._under = set_span_in_context(span, Context())
        self._passed = passed
        self.trace_id = f"{context.trace_id:032x}"
        self.headers: Sequence[tuple[bytes, bytes]] = [*_context_headers(context), *passed]

    @property
    def traceparent(self) -> bytes | None:
        return self.headers[0][1]

    def describe(self, operation: str, model: str, **attributes: AttributeValue) -> None:
        self._span.update_name(f"{operation} {model}")
        self._span.set_attributes(
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "tandem",
                "gen_ai.request.model": model,
                **{name.replace("__", "."): value for name, value in attributes.items()},
            }
        )

    def phase(self, name: str) -> Phase:
        return _Recording(self._tracer.start_span(name, context=self._under), ())

    def routed(self, pair: Pair, attempt: int) -> None:
        # An event: the choice itself takes microseconds.
        choice = pair.choice
        self._span.add_event(
            "route",
            {
                "tandem.attempt": attempt,
                "tandem.prefill.group": pair.prefill.group,
                "tandem.prefill.dp_rank": pair.prefill.dp_rank,
                "tandem.decode.group": pair.decode.group,
                "tandem.decode.dp_rank": pair.decode.dp_rank,
                "tandem.route.by": choice.by,
                "tandem.route.prompt_tokens": choice.prompt_tokens,
                "tandem.route.cached_tokens": choice.cached_tokens,
                "tandem.route.confirmed": choice.confirmed,
                "tandem.route.ttft_seconds": choice.ttft_s,
                "tandem.route.itl_seconds": choice.itl_s,
                "tandem.route.keeps_slo": choice.keeps_slo,
            },
        )

    def leg(self, role: str, *, group: str, epoch: int, dp_rank: int, room: int, attempt: int) -> LegTrace:
        span = self._tracer.start_span(
            f"leg {role}",
            context=self._under,
            kind=SpanKind.CLIENT,
            attributes={
                "tandem.role": role,
                "tandem.group": group,
                "tandem.epoch": epoch,
                "tandem.dp_rank": dp_rank,
                "tandem.room": room,
                "tandem.attempt": attempt,
            },
        )
        return _Recording(span, [*_context_headers(span.get_span_context()), *self._passed])

    def event(self, name: str, **attributes: AttributeValue) -> None:
        self._span.add_event(name, {key.replace("__", "."): value for key, value in attributes.items()})

    def end(
        self,
        outcome: str,
        *,
        prompt_tokens: int = 0,
        cached_tokens: int = 0,
        completion_tokens: int = 0,
        reasoning_tokens: int = 0,
        finish_reasons: Sequence[str] = (),
    ) -> None:
        if not self._span.is_recording():
            return
        self._span.set_attributes(
            {
                "tandem.outcome": outcome,
                "gen_ai.usage.input_tokens": prompt_tokens,
                "gen_ai.usage.cache_read.input_tokens": cached_tokens,
                "gen_ai.usage.output_tokens": completion_tokens,
                "gen_ai.usage.reasoning.output_tokens": reasoning_tokens,
            }
        )
        if finish_reasons:
            self._span.set_attribute("gen_ai.response.finish_reasons", list(finish_reasons))
        _close(self._span, "" if outcome in _FINE else outcome)


class _Recording:
    """A phase or a leg that is traced."""

    __slots__ = ("_span", "headers")

    def __init__(self, span: Span, headers: Sequence[tuple[bytes, bytes]]) -> None:
        self._span = span
        self.headers = headers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end("" if kind is None else str(getattr(error, "code", None) or kind.__name__))

    def event(self, name: str) -> None:
        self._span.add_event(name)

    def end(self, outcome: str = "ok") -> None:
        if self._span.is_recording():
            # A leg that is not wanted any more has not failed.
            self._span.set_attribute("tandem.outcome", outcome or "ok")
            _close(self._span, "" if outcome in ("", "aborted", *_FINE) else outcome)


def _close(span: Span, error: str) -> None:
    if error:
        span.set_attribute("error.type", error)
        span.set_status(Status(StatusCode.ERROR, error))
    span.end()


def _context_headers(context: SpanContext) -> list[tuple[bytes, bytes]]:
    text = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    found = [(b"traceparent", text.encode())]
    if context.trace_state:
        found.append((b"tracestate", context.trace_state.to_header().encode("latin-1", "replace")))
    return found
