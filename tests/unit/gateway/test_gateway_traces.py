"""Each request is one trace, from its arrival to both of its legs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from engine_standin import Script
from gateway_world import World, world
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01"}


async def spans(w: World, exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    """All spans by name, once everything is over."""
    await w.until(lambda: bool(w.records))
    await w.quiet()
    await w.service.tracing.close()
    return {span.name: span for span in exporter.get_finished_spans()}


def ids_in(traceparent: str) -> tuple[int, int]:
    """(trace, span)"""
    _, trace, span, flags = traceparent.split("-")
    assert int(flags, 16) & 1, "sampled"
    return int(trace, 16), int(span, 16)


async def test_a_request_is_one_trace_from_its_arrival_to_both_legs() -> None:
    exporter = InMemorySpanExporter()
    async with world("p0", "d0", exporter=exporter) as w:
        await w.chat()
        found = await spans(w, exporter)
        sent = {name: ids_in(w.engines[name].traces[0]) for name in ("p0", "d0")}
        record = w.records[0]
    top = found.pop("chat tiny")
    assert set(found) == {"tokenize", "admission", "leg prefill", "leg decode", "stream"}
    assert top.parent is None
    assert top.kind is SpanKind.SERVER
    assert top.context is not None
    for span in found.values():
        assert span.parent is not None
        assert (span.parent.span_id, span.parent.trace_id) == (top.context.span_id, top.context.trace_id)
        assert span.end_time is not None
    for role, name in (("prefill", "p0"), ("decode", "d0")):
        leg = found[f"leg {role}"]
        assert leg.context is not None
        assert leg.attributes is not None
        assert sent[name] == (leg.context.trace_id, leg.context.span_id)
        assert (leg.attributes["tandem.group"], leg.attributes["tandem.attempt"]) == (name, 1)
        assert leg.kind is SpanKind.CLIENT
    assert top.attributes is not None
    assert (top.attributes["tandem.tenant"], top.attributes["tandem.outcome"]) == ("anonymous", "ok")
    assert top.attributes["gen_ai.usage.input_tokens"] == record.prompt_tokens
    assert top.attributes["gen_ai.usage.output_tokens"] == record.completion_tokens
    assert top.attributes["gen_ai.operation.name"] == "chat"
    assert top.attributes["gen_ai.response.finish_reasons"] == ("length",)


async def test_a_clients_trace_goes_on_through_the_gateway_to_both_engines() -> None:
    exporter = InMemorySpanExporter()
    async with world("p0", "d0", exporter=exporter) as w:
        await w.call("/v1/completions", {"model": "tiny", "prompt": [5]}, PARENT).run()
        found = await spans(w, exporter)
        traces = [one.traces[0] for one in w.engines.values()]
    assert {ids_in(trace)[0] for trace in traces} == {int(TRACE, 16)}
    top = found["text_completion tiny"]
    assert top.parent is not None
    assert (top.parent.trace_id, top.parent.span_id) == (int(TRACE, 16), int(SPAN, 16))


async def test_without_traces_a_clients_context_still_reaches_both_engines() -> None:
    async with world("p0", "d0") as w:
        await w.call("/v1/completions", {"model": "tiny", "prompt": [5]}, PARENT).run()
        await w.complete()
        assert [one.traces for one in w.engines.values()] == [[PARENT["traceparent"], ""]] * 2


async def test_each_choice_has_its_legs_in_the_one_trace() -> None:
    exporter = InMemorySpanExporter()
    async with world("p0", "d0", exporter=exporter) as w:
        await w.complete(n=3)
        await spans(w, exporter)
    finished = exporter.get_finished_spans()
    assert sorted(span.name for span in finished if span.name.startswith("leg")) == (
        ["leg decode"] * 3 + ["leg prefill"] * 3
    )
    assert len({span.context.trace_id for span in finished if span.context is not None}) == 1


async def test_a_failed_attempt_and_the_next_are_told_apart() -> None:
    exporter = InMemorySpanExporter()
    async with world("p0", "d0", exporter=exporter) as w:
        w.engines["p0"].scripts.append(Script(ids=[], finish=None))
        w.engines["d0"].scripts.append(Script(status=500))
        await w.complete()
        await spans(w, exporter)
    legs = {
        (span.name, span.attributes["tandem.attempt"]): span.attributes["tandem.outcome"]
        for span in exporter.get_finished_spans()
        if span.attributes and "tandem.attempt" in span.attributes
    }
    assert legs["leg decode", 1] == "refused"
    assert legs["leg prefill", 1] == "aborted"
    assert legs["leg decode", 2] == legs["leg prefill", 2] == "ok"


@pytest.mark.parametrize(("fields", "failed"), [({"temperature": 9}, "tokenize"), ({"model": "nowhere"}, "tokenize")])
async def test_a_refused_requests_trace_ends_where_it_was_refused(fields: dict[str, Any], failed: str) -> None:
    exporter = InMemorySpanExporter()
    async with world("p0", "d0", exporter=exporter) as w:
        await w.complete(**fields)
        found = await spans(w, exporter)
    assert set(found) == {"request", failed}
    assert {span.status.status_code for span in found.values()} == {StatusCode.ERROR}


async def test_a_client_that_leaves_is_no_error_of_the_trace() -> None:
    exporter = InMemorySpanExporter()
    async with world("p0", "d0", exporter=exporter) as w:
        w.engines["d0"].default = Script(finish=None)
        call = w.call("/v1/completions", {"model": "tiny", "prompt": [5, 6], "stream": True})
        running = asyncio.create_task(call.run())
        await call.until_body()
        call.leave()
        await running
        found = await spans(w, exporter)
    assert {span.status.status_code for span in found.values()} == {StatusCode.UNSET}
    assert "stream" in found
    assert found["text_completion tiny"].attributes is not None
    assert found["text_completion tiny"].attributes["tandem.outcome"] == "client_gone"
