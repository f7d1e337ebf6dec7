"""Each request is accounted for once, however it ends: a usage record, metrics, a line of the log."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest
from engine_standin import Script
from gateway_model import ids_of
from gateway_world import Answer, Call, World, saying, world

from tandem.core.usage import UsageRecord

BROKEN = {"type": "abort", "message": "gone", "status_code": 500}
SAID = "hmm\n</think>\n\nHello you"
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = {"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}


async def the_record(w: World) -> UsageRecord:
    """The one record of the one request, when it is over; and nothing is open any more."""
    await w.until(lambda: bool(w.records))
    await w.quiet()
    assert len(w.records) == 1
    assert w.metric("tandem_requests_in_flight") == 0
    (record,) = w.records
    outcome = {"endpoint": record.endpoint, "outcome": record.outcome}
    assert w.metric("tandem_requests_total", **outcome) == 1
    assert w.metric("tandem_tenant_requests_total", tenant=record.tenant, outcome=record.outcome) == 1
    assert w.metric("tandem_request_duration_seconds_count", endpoint=record.endpoint) == 1
    return record


async def begun(w: World, **fields: Any) -> tuple[Call, asyncio.Task[Answer]]:
    call = w.call("/v1/completions", {"model": "tiny", "prompt": [5, 6], **fields})
    running = asyncio.create_task(call.run())
    return call, running


def tokens(w: World, kind: str, tenant: str = "anonymous") -> float:
    return w.metric("tandem_tenant_tokens_total", tenant=tenant, kind=kind)


Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """Fields of the lines of requests that are over."""
    caplog.set_level(logging.INFO, "tandem.request")
    return lambda: [one.__dict__["tandem_fields"] for one in caplog.records if one.name == "tandem.request"]


# Records and metrics


@pytest.mark.parametrize("stream", [False, True])
async def test_the_end_of_an_answer_waits_until_its_record_is_safe(stream: bool) -> None:
    async with world("p0", "d0") as w:
        w.meter.disk.clear()
        call, running = await begun(w, stream=stream)
        await w.until(lambda: bool(w.records))
        await asyncio.sleep(0.05)  # the end would have come
        assert (call.answer.complete, b"[DONE]" in call.answer.body) == (False, False)
        assert bool(call.answer.body) == stream  # the tokens do not wait
        w.meter.disk.set()
        assert (await running).complete
        assert (await the_record(w)).outcome == "ok"


async def test_a_client_that_leaves_before_the_end_is_told_is_counted_once_for_all_of_it() -> None:
    async with world("p0", "d0") as w:
        w.meter.disk.clear()
        call, running = await begun(w, stream=True)
        await w.until(lambda: bool(w.records))
        call.leave()
        await asyncio.sleep(0.05)  # it is noticed
        w.meter.disk.set()
        await running
        await w.until(lambda: w.metric("tandem_requests_in_flight") == 0)
        assert (await the_record(w)).outcome == "ok"


async def test_an_answer_that_is_complete_is_recorded_with_all_that_it_used() -> None:
    fleet = {"tenants": {"acme": {"priority": "high"}}}
    async with world("p0", "d0", fleet=fleet) as w:
        key = await w.key("acme")
        go = asyncio.Event()
        w.engines["d0"].scripts.append(saying(SAID, go=go))
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "user": "ann"}
        running = asyncio.create_task(w.call("/v1/chat/completions", body, key).run())
        await w.until(lambda: w.metric("tandem_legs_total", role="prefill", group="p0", outcome="ok") == 1)
        go.set()
        usage = (await running).json()["usage"]
        found = await the_record(w)
        assert (tokens(w, "prompt", "acme"), tokens(w, "cached", "acme")) == (usage["prompt_tokens"], 2)
        assert tokens(w, "completion", "acme") == usage["completion_tokens"]
        assert w.metric("tandem_reasoning_tokens_total") == tokens(w, "reasoning", "acme") == found.reasoning_tokens
        assert w.metric("tandem_refusals_total", reason="ok") == 0
    assert (found.tenant, found.key, found.user) == ("acme", key["authorization"].split(" ")[1][:12], "ann")
    assert (found.model, found.weight_version, found.endpoint, found.stream) == ("tiny", "v1", "chat", False)
    assert (found.prompt_tokens, found.cached_tokens) == (usage["prompt_tokens"], 2)
    assert found.completion_tokens == usage["completion_tokens"] == len(ids_of(SAID)) + 1
    assert found.reasoning_tokens == usage["completion_tokens_details"]["reasoning_tokens"] > 0
    assert (found.outcome, found.attempts, found.choices) == ("ok", 1, 1)
    assert (found.replica, found.priority) == ("g1", "high")
    assert found.ttft_seconds is not None
    assert 0 < found.ttft_seconds <= found.seconds
    assert 0 < found.service_seconds <= 2 * found.seconds


async def test_each_request_has_an_id_of_its_own_whatever_the_client_calls_it() -> None:
    async with world("p0", "d0") as w:
        for _ in range(2):
            await w.call("/v1/completions", {"model": "tiny", "prompt": [5]}, {"x-request-id": "mine"}).run()
        assert len({record.id for record in w.records}) == 2


async def test_several_choices_are_one_record() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].scripts.extend([saying("one"), saying("two")] * 2)
        usage = (await w.complete(prompt=[[5, 6], [7, 8, 9]], n=2)).json()["usage"]
        found = await the_record(w)
        assert (tokens(w, "prompt"), tokens(w, "completion")) == (5, usage["completion_tokens"])
    assert (found.choices, found.attempts, found.prompt_tokens) == (4, 4, 5)
    assert found.completion_tokens == usage["completion_tokens"]


async def test_a_retry_is_an_attempt_more() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].scripts.append(Script(status=500))
        await w.complete()
        found = await the_record(w)
        assert w.metric("tandem_retries_total") == 1
    assert (found.outcome, found.attempts) == ("ok", 2)


@pytest.mark.parametrize(
    ("path", "body", "outcome"),
    [
        ("/v1/completions", {"model": "tiny", "prompt": "x", "temperature": 9}, "decimal_above_max_value"),
        ("/v1/completions", {"model": "nowhere", "prompt": "x"}, "model_not_found"),
        ("/v1/completions", b"{", "invalid_request_error"),
        ("/v1/messages", {"model": "tiny"}, "invalid_value"),
    ],
)
async def test_a_request_that_is_wrong_is_recorded_as_such(path: str, body: object, outcome: str) -> None:
    async with world("p0", "d0") as w:
        await w.call(path, body).run()
        found = await the_record(w)
        assert w.metric("tandem_refusals_total", reason=outcome) == 1
        assert w.metric("tandem_tenant_refusals_total", tenant="anonymous") == 1
        assert tokens(w, "prompt") == 0
    assert (found.outcome, found.attempts, found.prompt_tokens, found.completion_tokens) == (outcome, 0, 0, 0)
    assert (found.ttft_seconds, found.service_seconds) == (None, 0)


async def test_a_stranger_is_counted_but_leaves_no_record(lines: Lines) -> None:
    async with world("p0", "d0", auth="required") as w:
        assert (await w.complete()).status == 401
        await w.quiet()
        assert w.records == []
        assert w.metric("tandem_requests_total", endpoint="completions", outcome="invalid_api_key") == 1
        assert w.metric("tandem_refusals_total", reason="invalid_api_key") == 1
        assert w.metric("tandem_requests_in_flight") == 0
    assert [(line["tenant"], line["status"]) for line in lines()] == [("anonymous", 401)]


async def test_a_refusal_of_a_limit_is_counted_once_and_recorded() -> None:
    async with world("p0", "d0", fleet={"default_tenant": {"input_tokens_per_minute": 1}}) as w:
        assert (await w.complete()).status == 429
        found = await the_record(w)
        assert w.metric("tandem_refusals_total", reason="limit_input_tokens") == 1
        assert w.metric("tandem_tenant_refusals_total", tenant="anonymous") == 1
    assert (found.outcome, found.attempts, found.prompt_tokens) == ("rate_limit_exceeded", 0, 0)


async def test_without_capacity_the_record_says_so() -> None:
    async with world("p0") as w:
        assert (await w.complete()).status == 503
        found = await the_record(w)
    assert (found.outcome, found.completion_tokens, found.ttft_seconds) == ("no_capacity", 0, None)


async def test_a_client_that_leaves_the_queue_is_recorded() -> None:
    async with world("p0", "d0") as w:
        w.service.admission.set_capacity(0)
        call, running = await begun(w)
        await w.until(lambda: w.metric("tandem_queue_length", priority="normal") == 1)
        call.leave()
        await running
        found = await the_record(w)
        assert w.metric("tandem_queue_length", priority="normal") == 0
        assert w.metric("tandem_refusals_total", reason="client_gone") == 0
    assert (found.outcome, found.attempts, found.prompt_tokens, found.priority) == ("client_gone", 0, 0, "")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_in_prefill_is_recorded(stream: bool) -> None:
    async with world("p0", "d0") as w:
        for one in w.engines.values():
            one.default = Script(ids=[], finish=None)
        call, running = await begun(w, stream=stream)
        await w.engines["d0"].until(lambda: w.engines["d0"].running)
        call.leave()
        await running
        found = await the_record(w)
        assert w.metric("tandem_leg_aborts_total", role="decode", reason="client_gone") == 1
    assert (found.outcome, found.prompt_tokens, found.completion_tokens) == ("client_gone", 2, 0)
    assert (found.attempts, found.ttft_seconds) == (1, None)
    assert found.service_seconds > 0


async def test_a_client_that_leaves_in_mid_stream_pays_for_what_it_was_given() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].default = Script(ids=[70, 71, 72], finish=None)
        call, running = await begun(w, stream=True)
        await w.until(lambda: w.metric("tandem_delivered_tokens_total") == 3)
        call.leave()
        await running
        found = await the_record(w)
        assert tokens(w, "completion") == 3
    assert (found.outcome, found.stream, found.completion_tokens) == ("client_gone", True, 3)
    assert found.ttft_seconds is not None


async def test_a_client_that_leaves_while_it_sends_is_recorded() -> None:
    async with world("p0", "d0") as w:
        call = w.call("/v1/completions", b"{", {"content-length": "100"})
        running = asyncio.create_task(call.run())
        await w.until(lambda: w.metric("tandem_requests_in_flight") == 1)
        call.leave()
        await running
        assert (await the_record(w)).outcome == "client_gone"


async def test_an_engine_that_fails_before_the_first_token_is_recorded() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].default = Script(status=500)
        assert (await w.complete()).status == 503
        found = await the_record(w)
        assert w.metric("tandem_leg_failures_total", role="decode", kind="refused") == 3
        assert w.metric("tandem_refusals_total", reason="engine_failure") == 0
    assert (found.outcome, found.attempts, found.completion_tokens) == ("engine_failure", 3, 0)


async def test_an_engine_that_fails_in_mid_stream_is_recorded_with_what_was_given() -> None:
    async with world("p0", "d0") as w:
        go = asyncio.Event()
        w.engines["d0"].scripts.append(Script(finish=BROKEN, go=go))
        w.engines["d0"].default = Script(status=500)
        _, running = await begun(w, stream=True)
        await w.until(lambda: w.metric("tandem_delivered_tokens_total") == 2)
        go.set()
        assert (await running).events()[-1]["error"]["code"] == "engine_failure"
        found = await the_record(w)
    assert (found.outcome, found.completion_tokens, found.attempts) == ("engine_failure", 2, 3)
    assert found.migrations == 2


async def test_a_timeout_is_recorded() -> None:
    async with world("p0", "d0", first_token_timeout_s=0.02) as w:
        w.engines["d0"].default = Script(ids=[], finish=None)
        assert (await w.complete()).status == 504
        assert (await the_record(w)).outcome == "timeout"


async def test_a_fault_of_ours_is_recorded_and_leaves_nothing_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world("p0", "d0") as w:

        def broken(*_: object) -> None:
            raise RuntimeError("secret")

        monkeypatch.setattr("tandem.gateway.api.wire.CompletionWriter.whole", broken)
        assert (await w.complete()).status == 500
        found = await the_record(w)
    assert (found.outcome, found.completion_tokens) == ("internal_error", 3)


async def test_a_client_that_does_not_read_has_left_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    # 20 ms after its arrival, while the pair table has all the time of the request.
    monkeypatch.setattr("tandem.gateway.http.app.SLOW_READER_S", -599.98)

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("tandem.gateway.http.exchange.Exchange.write", never)
    async with world("p0", "d0", request_timeout_s=600) as w:
        w.engines["d0"].default = Script(finish=None)
        _, running = await begun(w, stream=True)
        assert not (await running).complete
        found = await the_record(w)
    assert found.outcome == "client_gone"


async def test_a_stop_string_leaves_what_comes_after_it_unpaid() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].scripts.append(Script(ids=ids_of("one two three four five"), finish=None))
        usage = (await w.complete(stop=["two"])).json()["usage"]
        found = await the_record(w)
    assert found.completion_tokens == usage["completion_tokens"] <= len(ids_of("one two"))


async def test_waiting_is_observed_for_each_class() -> None:
    async with world("p0", "d0") as w:
        await w.complete(priority="low")
        await w.complete()
        assert w.metric("tandem_queue_seconds_count", priority="low") == 1
        assert w.metric("tandem_queue_seconds_count", priority="normal") == 1
        assert w.metric("tandem_tenant_queue_seconds_count", tenant="anonymous") == 2


async def test_pages_are_no_requests() -> None:
    async with world("p0", "d0") as w:
        await w.get("/v1/models")
        await w.call("/tokenize", {"prompt": "hi"}).run()
        assert w.records == []
        assert w.metric("tandem_requests_in_flight") == 0


async def test_prefix_hits_and_the_way_of_the_cache_are_observed() -> None:
    async with world("p0", "d0") as w:
        go = asyncio.Event()
        w.engines["d0"].scripts.append(Script(ids=[70], go=go))
        _, running = await begun(w)
        await w.until(lambda: w.metric("tandem_legs_total", role="prefill", group="p0", outcome="ok") == 1)
        go.set()
        await running
        assert w.metric("tandem_prefix_tokens_total", kind="found") == 2
        assert w.metric("tandem_prompt_cached_tokens_total") == 2
        assert w.metric("tandem_kv_transfer_seconds_count") == 1
        assert w.metric("tandem_rooms_opened_total") == 1


async def test_the_kv_that_went_to_decode_is_counted_in_bytes() -> None:
    async with world("p0", "d0") as w:
        w.driver.kv_bytes_per_token = 70_272
        go = w.engines["d0"].default.go = asyncio.Event()
        call = asyncio.create_task(w.complete(prompt=[5, 6, 7], max_tokens=9))
        await w.engines["p0"].until(lambda: w.engines["p0"].bodies)
        await w.engines["p0"].idle()
        go.set()
        await call
        assert w.metric("tandem_kv_transfer_seconds_count") == 1
        assert w.metric("tandem_kv_transfer_bytes_total") == 3 * 70_272


# The log


async def test_a_request_is_one_line_of_the_log(lines: Lines) -> None:
    async with world("p0", "d0", fleet={"tenants": {"acme": {}}}) as w:
        key = await w.key("acme")
        body = {"model": "tiny", "prompt": "a secret word"}
        await w.call("/v1/completions", body, {**key, "x-request-id": "mine", **PARENT}).run()
        found = await the_record(w)
    (line,) = lines()
    assert (line["request"], line["request_id"], line["trace_id"]) == (found.id, "mine", TRACE)
    assert (line["tenant"], line["key"], line["status"], line["outcome"]) == ("acme", found.key, 200, "ok")
    assert (line["prefill"][:3], line["decode"][:3]) == ("p0/", "d0/")
    assert "prompt" not in line
    assert key["authorization"].rsplit("-", 1)[1] not in str(line)
    assert "secret" not in str(line)


async def test_prompts_are_in_the_log_where_that_is_asked_for(lines: Lines) -> None:
    async with world("p0", "d0", fleet={"observability": {"log_prompts": True}}) as w:
        await w.complete(prompt=["a secret word", "another"])
    (line,) = lines()
    assert "a secret word" in line["prompt"]
    assert "another" in line["prompt"]


@pytest.mark.parametrize(
    ("script", "status"), [(Script(status=500), 503), (Script(ids=[], finish={**BROKEN, "status_code": 400}), 400)]
)
async def test_the_line_of_a_failure_has_its_status_and_its_words(script: Script, status: int, lines: Lines) -> None:
    async with world("p0", "d0") as w:
        w.engines["p0"].default = Script(ids=[], finish=None)
        w.engines["d0"].default = script
        answer = await w.complete()
    (line,) = lines()
    assert line["status"] == answer.status == status
    assert line["error"] == answer.json()["error"]["message"]


async def test_the_line_of_a_client_that_left_has_nginxs_status(lines: Lines) -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].default = Script(finish=None)
        call, running = await begun(w, stream=True)
        await call.until_body()
        call.leave()
        await running
        await the_record(w)
    assert [(line["status"], line["outcome"]) for line in lines()] == [(499, "client_gone")]
