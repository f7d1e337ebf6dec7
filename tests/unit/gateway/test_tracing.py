"""Traces: W3C context in and out, spans as they should be, and no request that suffers from its exporter."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from opentelemetry.trace import SpanKind

from tandem.core.route_cost import Choice
from tandem.core.route_types import Pair, Target
from tandem.core.types import Role
from tandem.gateway.observe.tracing import Tracing

TRACE = "0af7651916cd43dd8448eb211c80319c"
SPAN = "b7ad6b7169203331"
PARENT = {b"traceparent": f"00-{TRACE}-{SPAN}-01".encode()}
LEG = {"group": "prefill-0", "epoch": 2, "dp_rank": 1, "room": 2**62, "attempt": 1}


@pytest.fixture
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
async def tracing(exported: InMemorySpanExporter) -> AsyncIterator[Tracing]:
    one = Tracing(None, exporter=exported, fleet="laptop", replica="g1")
    yield one
    await one.close()


async def spans(tracing: Tracing, exported: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    await tracing.close()
    return {span.name: span for span in exported.get_finished_spans()}


class Refusing(SpanExporter):
    """A collector that is not there."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        raise OSError("connection refused")

    def shutdown(self) -> None: ...


class Hanging(SpanExporter):
    """A collector that takes a connection and never answers."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.release.wait(30)
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None: ...


def test_off_it_makes_nothing_for_a_request_without_a_context() -> None:
    tracing = Tracing(None)
    trace = tracing.request({b"host": b"x"})
    assert trace is tracing.request({})
    with trace.phase("tokenize"):
        pass
    leg = trace.leg("prefill", **LEG)
    leg.event("first_byte")
    leg.end()
    trace.end("ok")
    assert (trace.traceparent, trace.trace_id, list(trace.headers), list(leg.headers)) == (None, "", [], [])


def test_off_it_passes_a_clients_context_on() -> None:
    trace = Tracing(None).request({**PARENT, b"tracestate": b"a=1", b"baggage": b"k=v"})
    assert trace.trace_id == TRACE
    expected = [(b"traceparent", PARENT[b"traceparent"]), (b"tracestate", b"a=1"), (b"baggage", b"k=v")]
    assert list(trace.headers) == list(trace.leg("decode", **LEG).headers) == expected


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"00-" + b"0" * 32 + b"-b7ad6b7169203331-01",
        b"00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        b"ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        b"00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        b"\xff\xfe",
        b"x" * 100_000,
    ],
)
async def test_a_context_that_is_none_is_not_passed_on(garbage: bytes, tracing: Tracing) -> None:
    headers = {b"traceparent": garbage, b"tracestate": b"=,=", b"baggage": b"x" * 100_000}
    assert list(Tracing(None).request(headers).headers) == []
    trace = tracing.request(headers)
    assert len(trace.trace_id) == 32
    assert [name for name, _ in trace.headers] == [b"traceparent"]
    assert garbage not in dict(trace.headers).values()
    trace.end("ok")


async def test_a_request_continues_its_clients_trace(tracing: Tracing, exported: InMemorySpanExporter) -> None:
    trace = tracing.request({**PARENT, b"tracestate": b"a=1"})
    assert trace.trace_id == TRACE
    trace.end("ok")
    span = (await spans(tracing, exported))["request"]
    assert span.parent is not None
    assert f"{span.parent.span_id:016x}" == SPAN
    assert span.kind is SpanKind.SERVER


async def test_a_choice_of_a_pair_is_told_with_its_reasons(tracing: Tracing, exported: InMemorySpanExporter) -> None:
    def target(group: str, role: Role, dp_rank: int) -> Target:
        return Target(group=group, epoch=1, role=role, url="http://x", dp_rank=dp_rank, dp_size=2)

    pair = Pair(
        prefill=target("prefill-0", Role.PREFILL, 1),
        decode=target("decode-0", Role.DECODE, 0),
        bootstrap_host="x",
        bootstrap_port=1,
        choice=Choice(prompt_tokens=100, cached_tokens=64, ttft_s=0.25, by="session"),
    )
    Tracing(None).request({}).routed(pair, 1)
    trace = tracing.request({})
    trace.routed(pair, 2)
    trace.end("ok")
    (event,) = (await spans(tracing, exported))["request"].events
    told = dict(event.attributes or {})
    assert (event.name, told["tandem.attempt"], told["tandem.route.by"]) == ("route", 2, "session")
    assert (told["tandem.prefill.group"], told["tandem.prefill.dp_rank"]) == ("prefill-0", 1)
    assert (told["tandem.decode.group"], told["tandem.decode.dp_rank"]) == ("decode-0", 0)
    assert (told["tandem.route.cached_tokens"], told["tandem.route.ttft_seconds"]) == (64, 0.25)


async def test_each_engine_is_told_its_own_leg_as_the_parent(tracing: Tracing, exported: InMemorySpanExporter) -> None:
    trace = tracing.request({**PARENT, b"tracestate": b"a=1", b"baggage": b"k=v"})
    sent = {}
    for role in ("prefill", "decode"):
        leg = trace.leg(role, **LEG)
        sent[role] = dict(leg.headers)
        leg.end()
    trace.end("ok")
    found = await spans(tracing, exported)
    for role in ("prefill", "decode"):
        span = found[f"leg {role}"]
        assert span.context is not None
        assert sent[role][b"traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01".encode()
        assert (sent[role][b"tracestate"], sent[role][b"baggage"]) == (b"a=1", b"k=v")
        assert span.kind is SpanKind.CLIENT
        assert span.attributes is not None
        assert {name: span.attributes[f"tandem.{name}"] for name in LEG} == LEG
    root = found["request"]
    assert root.context is not None
    assert all(
        one.parent is None or one is root or one.parent.span_id == root.context.span_id for one in found.values()
    )


async def test_phases_are_spans_and_one_that_raised_is_an_error(
    tracing: Tracing, exported: InMemorySpanExporter
) -> None:
    trace = tracing.request({})
    with trace.phase("parse"):
        pass
    with pytest.raises(RuntimeError), trace.phase("admission"):
        raise RuntimeError
    stream = trace.phase("stream")
    stream.end()
    stream.end("late")
    trace.end("ok")
    found = await spans(tracing, exported)
    assert {name: span.status.is_ok for name, span in found.items()} == {
        "parse": True,
        "admission": False,
        "stream": True,
        "request": True,
    }


async def test_the_end_says_what_was_asked_and_used_in_the_words_of_the_conventions(
    tracing: Tracing, exported: InMemorySpanExporter
) -> None:
    trace = tracing.request({})
    trace.describe("chat", "deepseek-r1", gen_ai__request__max_tokens=64, tandem__tenant="a")
    trace.event("first_token")
    trace.end("ok", prompt_tokens=9, cached_tokens=4, completion_tokens=5, reasoning_tokens=3, finish_reasons=["stop"])
    trace.end("timeout")
    span = (await spans(tracing, exported))["chat deepseek-r1"]
    assert span.attributes is not None
    known = {getattr(gen_ai_attributes, name) for name in dir(gen_ai_attributes) if name.startswith("GEN_AI_")}
    assert {name for name in span.attributes if name.startswith("gen_ai.")} <= known
    assert span.attributes["gen_ai.usage.input_tokens"] == 9
    assert span.attributes["gen_ai.request.max_tokens"] == 64
    assert span.attributes["gen_ai.response.finish_reasons"] == ("stop",)
    assert span.attributes["tandem.outcome"] == "ok"
    assert span.status.is_ok


@pytest.mark.parametrize(("outcome", "error"), [("timeout", "timeout"), ("client_gone", None), ("ok", None)])
async def test_only_what_failed_is_an_error(
    tracing: Tracing, exported: InMemorySpanExporter, outcome: str, error: str | None
) -> None:
    tracing.request({}).end(outcome)
    span = (await spans(tracing, exported))["request"]
    assert span.attributes is not None
    assert span.attributes.get("error.type") == error
    assert span.status.is_ok == (error is None)


async def test_a_request_that_is_not_sampled_makes_no_span_and_tells_the_engines(
    exported: InMemorySpanExporter,
) -> None:
    tracing = Tracing(None, exporter=exported, sample_ratio=0.0)
    trace = tracing.request({})
    with trace.phase("parse"):
        pass
    leg = trace.leg("prefill", **LEG)
    flags = int(dict(leg.headers)[b"traceparent"].rpartition(b"-")[2], 16)
    assert not flags & 1
    leg.end()
    trace.end("ok")
    assert await spans(tracing, exported) == {}


@pytest.mark.parametrize(("follow", "recorded"), [(True, True), (False, False)])
async def test_a_clients_decision_comes_first_unless_it_is_not_trusted(
    exported: InMemorySpanExporter, follow: bool, recorded: bool
) -> None:
    tracing = Tracing(None, exporter=exported, sample_ratio=0.0, follow_client=follow)
    tracing.request(PARENT).end("ok")
    assert bool(await spans(tracing, exported)) == recorded


async def test_a_collector_that_is_not_there_costs_only_its_spans(caplog: pytest.LogCaptureFixture) -> None:
    dropped: list[int] = []
    tracing = Tracing(None, exporter=Refusing(), on_drop=dropped.append)
    for _ in range(10):
        tracing.request({}).end("ok")
    await tracing.close()
    assert sum(dropped) == 10


async def test_a_collector_that_hangs_holds_neither_requests_nor_the_end() -> None:
    dropped: list[int] = []
    hanging = Hanging()
    tracing = Tracing(None, exporter=hanging, queue=16, on_drop=dropped.append)
    for _ in range(1000):
        tracing.request({}).end("ok")
    # A batch of 16 may be on its way while 16 wait.
    assert sum(dropped) >= 1000 - 2 * 16
    async with asyncio.timeout(10):
        await tracing.close(within=0.05)
    hanging.release.set()


async def test_after_its_end_tracing_is_off(tracing: Tracing) -> None:
    await tracing.close()
    assert tracing.request({}).traceparent is None
