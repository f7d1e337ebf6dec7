"""What a client sees, and what the engines see, when things go well and when they don't."""

from __future__ import annotations

import asyncio

import pytest
from engine_standin import Script
from gateway_model import ids_of
from gateway_world import saying, world

from tandem.core.types import GroupState
from tandem.models.tokenizer import EOS_ID

SAID = "Hello, wörld 😀!"


async def test_a_completion_comes_whole() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].scripts.append(saying(SAID))
        answer = await w.complete(max_tokens=50)
    found = answer.json()
    assert (answer.status, found["object"], found["model"]) == (200, "text_completion", "tiny")
    assert found["choices"] == [{"index": 0, "text": SAID, "logprobs": None, "finish_reason": "stop"}]
    assert found["usage"]["prompt_tokens"] == 2
    assert found["usage"]["completion_tokens"] == len(ids_of(SAID)) + 1


async def test_a_completion_comes_as_a_stream() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].scripts.append(saying(SAID))
        answer = await w.complete(stream=True, stream_options={"include_usage": True})
    *chunks, closing, usage, done = answer.events()
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == SAID
    assert closing["choices"][0]["finish_reason"] == "stop"
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 2 + len(ids_of(SAID)) + 1)
    assert all(chunk["usage"] is None for chunk in [*chunks, closing])
    assert done == "[DONE]"


async def test_a_chat_has_reasoning_and_content() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].scripts.append(saying("hmm\n</think>\n\n" + SAID))
        found = (await w.chat()).json()
    message = found["choices"][0]["message"]
    assert message == {"role": "assistant", "content": SAID, "reasoning_content": "hmm"}
    assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == len(ids_of("hmm\n</think>"))


async def test_a_chat_stream_tells_the_role_first_and_then_deltas() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].scripts.append(saying("hmm\n</think>\n\n" + SAID))
        events = (await w.chat(stream=True)).events()
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hmm"
    assert "".join(delta.get("content", "") for delta in deltas) == SAID
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * (len(deltas) - 1) + ["stop"]


async def test_token_ids_come_along_when_asked_for() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].scripts.extend([saying(SAID), saying(SAID)])
        whole = (await w.complete(return_token_ids=True)).json()
        events = (await w.complete(return_token_ids=True, stream=True)).events()
    expected = [*ids_of(SAID), EOS_ID]
    assert (whole["choices"][0]["token_ids"], whole["prompt_token_ids"]) == (expected, [5, 6])
    assert [i for event in events[:-2] for i in event["choices"][0]["token_ids"]] == expected


async def test_both_legs_get_the_same_body_the_same_room_and_their_own_rank() -> None:
    async with world("p0", "d0") as w:
        await w.complete(temperature=0, max_tokens=9, prompt=[5, 6, 7])
        await w.complete()
    for prefill, decode in zip(w.engines["p0"].bodies, w.engines["d0"].bodies, strict=True):
        own = {"rid", "routed_dp_rank"}
        assert {k: v for k, v in prefill.items() if k not in own} == {k: v for k, v in decode.items() if k not in own}
        assert prefill["rid"] != decode["rid"]
        assert prefill["routed_dp_rank"] == prefill["disagg_prefill_dp_rank"] == prefill["bootstrap_room"] % 2
    first, second = w.engines["d0"].bodies
    assert (first["input_ids"], first["stream"]) == ([5, 6, 7], True)
    assert first["sampling_params"] == {"temperature": 0, "max_new_tokens": 9}
    assert (first["bootstrap_host"], first["bootstrap_port"]) == ("10.0.0.1", 8998)
    assert first["bootstrap_room"] != second["bootstrap_room"]


async def test_prefills_cache_hits_are_in_the_usage() -> None:
    async with world("p0", "d0") as w:
        go = w.engines["d0"].default.go = asyncio.Event()
        call = asyncio.create_task(w.complete())
        await w.engines["p0"].until(lambda: w.engines["p0"].bodies)
        await w.engines["p0"].idle()
        go.set()
        usage = (await call).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 2}
    assert (usage["prompt_cache_hit_tokens"], usage["prompt_cache_miss_tokens"]) == (2, 0)


async def test_a_stop_string_ends_the_answer_and_both_legs() -> None:
    async with world("p0", "d0") as w:
        script = Script(ids=ids_of("one two three"), finish=None)
        w.engines["d0"].scripts.append(script)
        found = (await w.complete(stop=["two"], max_tokens=99)).json()
        await w.engines["d0"].idle()
    assert (found["choices"][0]["text"], found["choices"][0]["finish_reason"]) == ("one ", "stop")
    assert found["usage"]["completion_tokens"] <= len(script.ids)
    assert w.engines["d0"].aborted == [w.engines["d0"].bodies[0]["rid"]]


@pytest.mark.parametrize(
    "trouble",
    [
        Script(status=500),
        Script(ids=[], finish={"type": "abort", "message": "KV transfer failed", "status_code": 500}),
        Script(ids=[], cut=True),
    ],
)
@pytest.mark.parametrize("name", ["p0", "d0"])
async def test_a_leg_that_fails_before_the_first_token_is_retried_with_a_fresh_room(name: str, trouble: Script) -> None:
    other = "d0" if name == "p0" else "p0"
    async with world("p0", "d0") as w:
        w.engines[name].scripts.append(trouble)
        # Were the partner to answer, the room would be lost before the failure is seen.
        w.engines[other].scripts.append(Script(ids=[], finish=None))
        w.engines["d0"].default = saying(SAID)
        answer = await w.complete()
        await w.quiet()
        assert answer.json()["choices"][0]["text"] == SAID
        rooms = [body["bootstrap_room"] for body in w.engines[name].bodies]
        assert len(rooms) == len(set(rooms)) == 2
        assert w.engines[other].bodies[0]["rid"] in w.engines[other].aborted
        assert w.metric("tandem_retries_total") == 1


async def test_a_retry_prefers_other_groups() -> None:
    async with world("p0", "d0", "d1") as w:
        for name in ("d0", "d1"):
            w.engines[name].scripts.append(Script(status=500))
            w.engines[name].default = saying(SAID)
        assert (await w.complete()).status == 200
    assert all(w.engines[name].bodies for name in ("d0", "d1"))


async def test_a_request_that_fails_everywhere_gets_an_error_and_a_time_to_come_back() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].default = Script(status=500)
        answer = await w.complete()
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "engine_failure"
    assert len(w.engines["d0"].bodies) == 3


async def test_what_the_engine_calls_a_bad_request_is_the_clients_error() -> None:
    async with world("p0", "d0") as w:
        w.engines["p0"].default = Script(ids=[], finish={"type": "abort", "message": "too long", "status_code": 400})
        w.engines["d0"].default = Script(ids=[], finish=None)
        answer = await w.complete()
    assert (answer.status, answer.json()["error"]["message"]) == (400, "too long")


async def test_a_stream_that_no_pair_goes_on_with_ends_with_an_error_event_and_no_done() -> None:
    async with world("p0", "d0") as w:
        abort = {"type": "abort", "message": "gone", "status_code": 500}
        go = asyncio.Event()
        w.engines["d0"].default = Script(ids=[], finish=abort)
        w.engines["d0"].scripts.append(Script(ids=ids_of("hello you"), finish=abort, go=go))
        call = w.call("/v1/completions", {"model": "tiny", "prompt": [5], "stream": True})
        running = asyncio.create_task(call.run())
        await call.until_body()
        go.set()
        answer = await running
    *_, last = answer.events()
    assert answer.complete
    # There is no header any more to say when to come back.
    assert (last["error"]["code"], last["error"]["retry_after"]) == ("engine_failure", 1)


async def test_a_client_that_leaves_ends_both_legs_at_once() -> None:
    async with world("p0", "d0") as w:
        for one in w.engines.values():
            one.default = Script(ids=[70, 71], finish=None)
        call = w.call("/v1/completions", {"model": "tiny", "prompt": [5], "stream": True})
        running = asyncio.create_task(call.run())
        await call.until_body()
        call.leave()
        await running
        for one in w.engines.values():
            await one.idle()
            assert one.aborted == [one.bodies[0]["rid"]]


async def test_a_client_that_leaves_while_it_waits_ends_both_legs_too() -> None:
    async with world("p0", "d0") as w:
        for one in w.engines.values():
            one.default = Script(ids=[], finish=None)
        call = w.call("/v1/completions", {"model": "tiny", "prompt": [5]})
        running = asyncio.create_task(call.run())
        await w.engines["d0"].until(lambda: w.engines["d0"].running)
        call.leave()
        assert (await running).status == 0
        for one in w.engines.values():
            await one.idle()


async def test_an_abort_that_overtakes_its_request_is_told_again() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].scripts.append(Script(ids=[], finish=None, deaf=True))
        w.engines["p0"].scripts.append(Script(status=500))
        await w.complete()
        await w.engines["d0"].idle()
        deaf = w.engines["d0"].bodies[0]["rid"]
        assert w.engines["d0"].aborted.count(deaf) == 2


async def test_a_request_without_a_first_token_in_time_gets_504() -> None:
    async with world("p0", "d0", first_token_timeout_s=0.05) as w:
        w.engines["d0"].default = Script(ids=[], finish=None)
        answer = await w.complete()
    assert (answer.status, answer.json()["error"]["code"]) == (504, "timeout")


async def test_a_request_that_outlives_its_deadline_gets_504() -> None:
    async with world("p0", "d0", request_timeout_s=0.05) as w:
        w.engines["d0"].default = Script(finish=None)
        answer = await w.complete()
        assert (answer.status, answer.json()["error"]["code"]) == (504, "timeout")


async def test_a_stream_that_stalls_everywhere_ends_with_an_error_event() -> None:
    async with world("p0", "d0", stall_timeout_s=0.05, first_token_timeout_s=0.05) as w:
        w.engines["d0"].scripts.append(Script(finish=None))
        w.engines["d0"].default = Script(ids=[], finish=None)
        assert (await w.complete(stream=True)).events()[-1]["error"]["code"] == "timeout"


async def test_without_a_ready_group_the_answer_is_503_with_retry_after() -> None:
    async with world("p0", "d0") as w:
        w.group("d0", state=GroupState.CORDONED)
        answer = await w.complete()
        assert (answer.status, answer.headers["retry-after"]) == (503, "2")
        assert answer.json()["error"]["code"] == "no_capacity"
        assert (await w.get("/ready")).status == 503
        assert (await w.get("/health")).status == 200


async def test_a_cordoned_group_finishes_what_it_has_begun() -> None:
    async with world("p0", "d0") as w:
        go = asyncio.Event()
        w.engines["d0"].scripts.append(saying(SAID, go=go))
        running = asyncio.create_task(w.complete())
        await w.engines["d0"].until(lambda: w.engines["d0"].running)
        w.group("d0", state=GroupState.CORDONED)
        go.set()
        assert (await running).json()["choices"][0]["text"] == SAID


@pytest.mark.parametrize("name", ["p0", "d0"])
async def test_requests_of_a_group_that_starts_anew_go_to_its_new_epoch(name: str) -> None:
    async with world("p0", "d0") as w:
        w.engines[name].scripts.append(Script(ids=[], finish=None))
        if name == "p0":
            w.engines["d0"].scripts.append(Script(ids=[], finish=None))
        w.engines["d0"].default = saying(SAID)
        running = asyncio.create_task(w.complete())
        await w.engines[name].until(lambda: w.engines[name].running)
        w.group(name, epoch=2)
        assert (await running).json()["choices"][0]["text"] == SAID


async def test_many_requests_at_once_leave_nothing_behind() -> None:
    async with world("p0", "d0", "d1") as w:
        for name in ("d0", "d1"):
            w.engines[name].default = saying(SAID)
            w.engines[name].scripts.extend([Script(status=500), Script(ids=[], cut=True)])
        answers = await asyncio.gather(*(w.complete(stream=True) for _ in range(40)))
        assert {answer.text() for answer in answers} == {SAID}
        await w.quiet()
        assert w.metric("tandem_requests_total", endpoint="completions", outcome="ok") == 40
        assert w.metric("tandem_open_rooms") == 0
