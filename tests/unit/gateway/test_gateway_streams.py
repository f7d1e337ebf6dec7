"""Streams of all four endpoints: signs of life, errors within them, tools, stop strings, and what they add up to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from engine_standin import LENGTH, Script, logprob_of
from gateway_model import ids_of
from gateway_world import Answer, Call, World, saying, world

from tandem.gateway.api.tools import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEP
from tandem.gateway.http import app
from tandem.models.tokenizer import EOS_ID

USER = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": USER},
    "/v1/completions": {"prompt": [5, 6]},
    "/v1/messages": {"messages": USER, "max_tokens": 100},
    "/v1/responses": {"input": "hi"},
}
SAID = "hmm, a 😀\n</think>\n\nHello, wörld 😀!"
BROKEN = {"type": "abort", "message": "gone", "status_code": 500}
EMPTY = {"type": "object", "properties": {}}

every = pytest.mark.parametrize("path", BODIES)


def ask(w: World, path: str, **fields: Any) -> Call:
    return w.call(path, {"model": "tiny", **BODIES[path], **fields})


def hold(w: World) -> asyncio.Event:
    """Nothing comes from any engine before this is set."""
    go = asyncio.Event()
    for one in w.engines.values():
        one.default = Script(ids=[70], go=go)
    return go


def the_error(path: str, answer: Answer) -> dict[str, Any]:
    """The error that ends a stream, in the form of each API."""
    events = answer.events()
    if path == "/v1/responses":
        error, failed = events[-2:]
        assert (error["type"], failed["type"], failed["response"]["status"]) == ("error", "response.failed", "failed")
        assert failed["response"]["error"]["message"] == error["message"] == error["error"]["message"]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        return dict(error["error"])
    if path == "/v1/messages":
        assert set(events[-1]) == {"type", "error", "request_id"}
        assert (events[-1]["type"], events[-1]["request_id"]) == ("error", answer.headers["x-request-id"])
        return dict(events[-1]["error"])
    assert set(events[-1]) == {"error"}
    return dict(events[-1]["error"])


def opening(answer: Answer) -> str | None:
    """The type of the first event that is more than a sign of life."""
    first = next(event for event in answer.events() if event.get("type") != "ping")
    kind: str | None = first.get("type")
    return kind


OPENS = {"/v1/messages": "message_start", "/v1/responses": "response.created"}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "KEEP_ALIVE_S", 0.01)


SIGN = {path: b'event: ping\ndata: {"type":"ping"}' if path == "/v1/messages" else b": keep-alive" for path in BODIES}


@every
@pytest.mark.usefixtures("impatient")
async def test_a_long_prefill_sends_signs_of_life_before_the_stream_opens(path: str) -> None:
    async with world("p0", "d0") as w:
        go = hold(w)
        call = ask(w, path, stream=True)
        running = asyncio.create_task(call.run())
        await call.until_body(SIGN[path] + b"\n\n" + SIGN[path])
        assert call.answer.body.replace(SIGN[path], b"").strip() == b""
        go.set()
        answer = await running
    assert (answer.status, answer.complete) == (200, True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.body.startswith(SIGN[path])
    assert opening(answer) == OPENS.get(path)


@every
@pytest.mark.usefixtures("impatient")
async def test_an_error_after_a_sign_of_life_is_an_event_of_the_stream(path: str) -> None:
    async with world("p0", "d0") as w:
        go = hold(w)
        w.engines["d0"].default = Script(ids=[], finish={**BROKEN, "status_code": 400}, go=go)
        call = ask(w, path, stream=True)
        running = asyncio.create_task(call.run())
        await call.until_body(SIGN[path])
        go.set()
        answer = await running
    assert (answer.status, answer.complete) == (200, True)
    assert the_error(path, answer)["type"] == "invalid_request_error"
    assert opening(answer) == OPENS.get(path)
    assert "[DONE]" not in answer.events()


@every
async def test_an_error_before_anything_was_sent_has_its_own_status(path: str) -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].default = Script(status=500)
        answer = await ask(w, path, stream=True).run()
    assert (answer.status, answer.headers["content-type"], answer.headers["retry-after"]) == (
        503,
        "application/json",
        "1",
    )
    error = answer.json()["error"]
    assert error["type"] == ("api_error" if path == "/v1/messages" else "server_error")


@every
async def test_an_error_in_mid_stream_ends_it_as_its_api_says(path: str) -> None:
    async with world("p0", "d0") as w:
        go = asyncio.Event()
        w.engines["d0"].scripts.append(Script(ids=ids_of("hm</think>hello you"), finish=BROKEN, go=go))
        w.engines["d0"].default = Script(ids=[], finish=BROKEN)
        call = ask(w, path, stream=True)
        running = asyncio.create_task(call.run())
        await call.until_body(b"hello")
        go.set()
        answer = await running
    assert (answer.status, answer.complete) == (200, True)
    error = the_error(path, answer)
    assert "gone" in error["message"]
    assert error["type"] == ("api_error" if path == "/v1/messages" else "server_error")


@every
async def test_a_fault_of_ours_in_mid_stream_is_told_without_its_words(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world("p0", "d0") as w:
        go = asyncio.Event()
        w.engines["d0"].scripts.append(Script(ids=ids_of("hm</think>hello you"), go=go))
        call = ask(w, path, stream=True)
        running = asyncio.create_task(call.run())
        await call.until_body(b"hello")

        def broken(*_: object) -> None:
            raise RuntimeError("secret")

        monkeypatch.setattr("tandem.gateway.text.answer.Answer.feed", broken)
        go.set()
        answer = await running
        await w.quiet()
        assert [record.outcome for record in w.records] == ["internal_error"]
    assert answer.complete
    assert the_error(path, answer)["message"] == "The server had an error while processing your request."
    assert b"secret" not in answer.body


@every
@pytest.mark.usefixtures("impatient")
async def test_a_stall_in_mid_stream_sends_signs_of_life_too(path: str) -> None:
    async with world("p0", "d0") as w:
        go = asyncio.Event()
        w.engines["d0"].scripts.append(saying("hm</think>hello", go=go))
        call = ask(w, path, stream=True)
        running = asyncio.create_task(call.run())
        await call.until_body(b"hello")
        said = len(call.answer.body)
        await w.until(lambda: SIGN[path] in call.answer.body[said:])
        go.set()
        answer = await running
    assert "error" not in {event.get("type", "") for event in answer.events() if event != "[DONE]"}


async def test_a_stream_whose_tokens_come_steadily_needs_no_signs_of_life() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].scripts.append(saying(SAID))
        answer = await w.chat(stream=True)
    assert answer.comments() == 0


@every
async def test_only_openais_older_streams_end_with_done(path: str) -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].scripts.append(saying(SAID))
        answer = await ask(w, path, stream=True).run()
    last = answer.events()[-1]
    assert answer.complete
    assert last == "[DONE]" if "completions" in path else last["type"] in ("message_stop", "response.completed")


# What a stream adds up to is what the same answer is as a whole.


def of_choices(events: list[Any]) -> dict[str, Any]:
    """A stream of OpenAI's, put together."""
    *chunks, usage, done = events
    assert (done, usage["choices"]) == ("[DONE]", [])
    found: dict[str, Any] = {"usage": usage["usage"], "text": "", "reasoning": "", "calls": {}, "reason": None}
    for choice in [choice for chunk in chunks for choice in chunk["choices"]]:
        delta = choice.get("delta", {"content": choice.get("text")})
        found["text"] += delta.get("content") or ""
        found["reasoning"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls", []):
            known = found["calls"].setdefault(call["index"], {"arguments": ""})
            known["name"] = call["function"].get("name", known.get("name"))
            known["arguments"] += call["function"]["arguments"]
        found["reason"] = choice["finish_reason"] or found["reason"]
    return found


def of_whole_choices(body: dict[str, Any]) -> dict[str, Any]:
    choice = body["choices"][0]
    message = choice.get("message", {"content": choice.get("text")})
    calls = {n: call["function"] for n, call in enumerate(message.get("tool_calls") or [])}
    return {
        "usage": body["usage"],
        "text": message["content"] or "",
        "reasoning": message.get("reasoning_content", ""),
        "calls": calls,
        "reason": choice["finish_reason"],
    }


def of_messages(events: list[Any]) -> dict[str, Any]:
    """Anthropic's stream, put together."""
    start, *rest = [event for event in events if event["type"] != "ping"]
    blocks: list[dict[str, Any]] = []
    for event in rest:
        if event["type"] == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append({**event["content_block"], "json": ""})
        elif event["type"] == "content_block_delta":
            delta, block = event["delta"], blocks[event["index"]]
            for name, field in (("thinking", "thinking"), ("text", "text"), ("partial_json", "json")):
                block[field] = block.get(field, "") + delta.get(name, "")
            block["signature"] = delta.get("signature", block.get("signature"))
    end = next(event for event in rest if event["type"] == "message_delta")
    return {**start["message"], **end["delta"], "usage": end["usage"], "content": [_block(block) for block in blocks]}


def _block(block: dict[str, Any]) -> dict[str, Any]:
    kind = block["type"]
    if kind == "tool_use":
        return {"type": kind, "name": block["name"], "input": json.loads(block["json"])}
    fields = ("thinking",) if kind == "thinking" else ("text",)
    return {"type": kind, **{field: block[field] for field in fields}}


def of_whole_messages(body: dict[str, Any]) -> dict[str, Any]:
    kept = ("type", "name", "input", "text", "thinking")
    return {**body, "content": [{name: block[name] for name in kept if name in block} for block in body["content"]]}


def of_responses(events: list[Any]) -> dict[str, Any]:
    return dict(events[-1]["response"])


PUT_TOGETHER: dict[str, tuple[Callable[[list[Any]], dict[str, Any]], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "/v1/chat/completions": (of_choices, of_whole_choices),
    "/v1/completions": (of_choices, of_whole_choices),
    "/v1/messages": (of_messages, of_whole_messages),
    "/v1/responses": (of_responses, dict),
}
CALL = f'{CALL_BEGIN}function{SEP}look\n```json\n{{"at": "wörld"}}\n```{CALL_END}'
TOOLS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"type": "function", "function": {"name": "look", "parameters": EMPTY}},
    "/v1/messages": {"name": "look", "input_schema": EMPTY},
    "/v1/responses": {"type": "function", "name": "look", "parameters": EMPTY},
}


async def both(path: str, script: Callable[[], Script], **fields: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same answer streamed, put together, and whole; without what each request has of its own."""
    streamed, whole = PUT_TOGETHER[path]
    usage = {"stream_options": {"include_usage": True}} if "completions" in path else {}
    async with world("p0", "d0") as w:
        w.engines["d0"].scripts.extend([script(), script()])
        answers = [streamed((await ask(w, path, **fields, stream=True, **usage).run()).events())]
        # Whether prefill told in time what it had in its cache is not what is looked at here.
        answers.append(whole((await ask(w, path, **fields).run()).json()))
    return without(answers[0]), without(answers[1])


def without(found: Any) -> Any:
    """Without ids, times and what the cache had."""
    names = {"id", "call_id", "created_at", "completed_at", "input_tokens_details", "prompt_tokens_details"}
    names |= {"input_tokens", "cache_read_input_tokens", "prompt_cache_hit_tokens", "prompt_cache_miss_tokens"}
    if isinstance(found, dict):
        return {name: without(value) for name, value in found.items() if name not in names}
    return [without(value) for value in found] if isinstance(found, list) else found


@every
@pytest.mark.parametrize("end", [{"type": "stop", "matched": EOS_ID}, LENGTH], ids=["stop", "length"])
async def test_a_stream_adds_up_to_the_whole_answer(path: str, end: dict[str, Any]) -> None:
    ids = [*ids_of(SAID), EOS_ID] if end["type"] == "stop" else ids_of(SAID)
    streamed, whole = await both(path, lambda: Script(ids=ids, finish=end))
    assert streamed == whole
    assert "Hello, wörld 😀!" in json.dumps(whole, ensure_ascii=False)


@pytest.mark.parametrize("path", TOOLS)
async def test_streamed_tool_calls_add_up_to_whole_ones(path: str) -> None:
    said = f"hm</think>See:{CALLS_BEGIN}{CALL}\n{CALL}{CALLS_END}"
    streamed, whole = await both(path, lambda: saying(said), tools=[TOOLS[path]])
    assert streamed == whole
    assert json.dumps(whole).count('"look"') >= 2


async def test_a_streamed_tool_call_ends_with_its_reason() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].scripts.append(saying(f"hm</think>{CALLS_BEGIN}{CALL}{CALLS_END}"))
        events = (await w.chat(stream=True, tools=[TOOLS["/v1/chat/completions"]])).events()
    deltas = [delta for event in events[:-1] for delta in event["choices"][0]["delta"].get("tool_calls", [])]
    assert (deltas[0]["function"]["name"], deltas[0]["id"][:5]) == ("look", "call_")
    assert len(deltas) > 2
    assert json.loads("".join(delta["function"]["arguments"] for delta in deltas)) == {"at": "wörld"}
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"


async def test_the_one_call_that_was_wanted_ends_the_answer_and_both_legs() -> None:
    async with world("p0", "d0") as w:
        said = f"hm</think>{CALLS_BEGIN}{CALL}\n{CALL}{CALLS_END}"
        w.engines["d0"].scripts.append(Script(ids=ids_of(said), finish=None))
        found = (await w.chat(tools=[TOOLS["/v1/chat/completions"]], parallel_tool_calls=False)).json()
        await w.engines["d0"].idle()
        assert len(w.engines["d0"].aborted) == 1
    assert len(found["choices"][0]["message"]["tool_calls"]) == 1
    assert found["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/chat/completions", "stop"),
        ("/v1/completions", "stop"),
        ("/v1/messages", "stop_sequences"),
    ],
)
async def test_a_stop_string_over_chunk_borders_is_never_seen(path: str, field: str) -> None:
    said = "hm</think>one two three four"
    streamed, whole = await both(path, lambda: Script(ids=ids_of(said), finish=None), **{field: ["wo thr"]})
    texts = [json.dumps(found) for found in (streamed, whole)]
    for text in texts:
        assert "one t" in text
        assert "wo" not in text.replace("wo thr", "")
    usages = [found.pop("usage") for found in (streamed, whole)]
    assert streamed == whole
    assert usages[0].keys() == usages[1].keys()


async def test_anthropics_answer_tells_the_stop_sequence_it_ended_with() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].scripts.append(Script(ids=ids_of("hm</think>one two"), finish=None))
        found = (await w.messages(stop_sequences=["two", "x"])).json()
    assert (found["stop_reason"], found["stop_sequence"]) == ("stop_sequence", "two")
    assert found["content"][-1] == {"type": "text", "text": "one "}


# Logprobs


async def test_logprobs_of_a_chat_are_the_engines_and_beside_their_text() -> None:
    said = "hmm\n</think>\n\nHi 😀!"
    async with world("p0", "d0") as w:
        w.engines["d0"].scripts.extend([saying(said), saying(said)])
        whole = (await w.chat(logprobs=True, top_logprobs=2)).json()["choices"][0]
        events = (await w.chat(logprobs=True, top_logprobs=2, stream=True)).events()
        assert {(body["return_logprob"], body["top_logprobs_num"]) for body in w.engines["d0"].bodies} == {(True, 2)}
    content = whole["logprobs"]["content"]
    assert b"".join(bytes(one["bytes"]) for one in content).decode() == whole["message"]["content"] == "Hi 😀!"
    ids = [token for token in ids_of(said) if logprob_of(token) in {one["logprob"] for one in content}]
    assert [one["logprob"] for one in content] == [logprob_of(token) for token in ids[-len(content) :]]
    assert all(len(one["top_logprobs"]) == 2 and one["top_logprobs"][0]["logprob"] == one["logprob"] for one in content)
    streamed = [event["choices"][0]["logprobs"] for event in events[:-1] if event["choices"][0]["logprobs"]]
    assert [one for logprobs in streamed for one in logprobs["content"]] == content
    assert [one for logprobs in streamed for one in logprobs.get("reasoning_content", [])] == (
        whole["logprobs"]["reasoning_content"]
    )


async def test_logprobs_of_a_completion_have_openais_older_form() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].scripts.extend([saying("Hi you"), saying("Hi you")])
        whole = (await w.complete(logprobs=1)).json()["choices"][0]["logprobs"]
        events = (await w.complete(logprobs=1, stream=True)).events()
    ids = ids_of("Hi you")
    assert whole["token_logprobs"] == [logprob_of(token) for token in ids]
    assert "".join(whole["tokens"]) == "Hi you"
    assert [len(top) for top in whole["top_logprobs"]] == [1] * len(ids)
    for field in ("tokens", "token_logprobs", "text_offset"):
        found = [one for e in events[:-1] if e["choices"][0]["logprobs"] for one in e["choices"][0]["logprobs"][field]]
        assert found == whole[field]


async def test_logprobs_are_in_a_response_that_includes_them() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].scripts.append(saying("hm</think>Hi"))
        found = (await w.responses(include=["message.output_text.logprobs"], top_logprobs=1)).json()
    part = found["output"][-1]["content"][0]
    assert [one["logprob"] for one in part["logprobs"]] == [logprob_of(token) for token in ids_of("Hi")]


async def test_without_being_asked_for_there_are_no_logprobs() -> None:
    async with world("p0", "d0") as w:
        found = (await w.chat()).json()["choices"][0]
        assert found["logprobs"] is None
        assert "return_logprob" not in w.engines["d0"].bodies[0]
