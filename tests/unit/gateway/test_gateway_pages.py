"""The pages that ask no engine: tokens counted and shown, the description, health, and who may see them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from engine_standin import Script
from gateway_model import CONTEXT, ids_of
from gateway_world import Answer, World, world

from tandem.core.types import GroupState
from tandem.gateway.http.pages import COUNT_TOKENS

USER = [{"role": "user", "content": "hi"}]
TOOLS: dict[str, dict[str, Any]] = {
    "/tokenize": {"model": "tiny", "prompt": "Hello, wörld 😀!"},
    "/detokenize": {"model": "tiny", "tokens": [70, 71]},
    COUNT_TOKENS: {"model": "tiny", "messages": USER},
}
GETS = ["/health", "/ready", "/fleet", "/metrics", "/openapi.json", "/v1/models", "/v1/models/tiny"]


async def post(w: World, path: str, body: object, **headers: str) -> Answer:
    return await w.call(path, body, headers).run()


async def test_a_text_has_the_tokens_that_a_completion_sends() -> None:
    async with world("p0", "d0") as w:
        found = (await post(w, "/tokenize", TOOLS["/tokenize"])).json()
        await w.complete(prompt=TOOLS["/tokenize"]["prompt"])
        assert found["tokens"] == w.engines["p0"].bodies[0]["input_ids"]
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), CONTEXT)


async def test_a_conversation_has_the_tokens_that_a_chat_sends() -> None:
    async with world("p0", "d0") as w:
        found = (await post(w, "/tokenize", {"messages": USER, "return_token_strs": True})).json()
        await w.chat()
        assert found["tokens"] == w.engines["p0"].bodies[0]["input_ids"]
    assert len(found["token_strs"]) == found["count"]


async def test_anthropics_count_is_what_its_endpoint_sends_and_charges() -> None:
    tools = [{"name": "look", "input_schema": {"type": "object"}}]
    async with world("p0", "d0") as w:
        fields: dict[str, Any] = {"messages": USER, "system": "Be brief.", "tools": tools}
        counted = (await post(w, COUNT_TOKENS, {"model": "tiny", **fields})).json()
        usage = (await w.messages(**fields)).json()["usage"]
        sent = len(w.engines["p0"].bodies[0]["input_ids"])
    assert counted == {"input_tokens": sent}
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == sent


async def test_tokens_have_their_text() -> None:
    async with world("p0", "d0") as w:
        said = "<think>Hello, wörld 😀!</think>"
        found = await post(w, "/detokenize", {"tokens": ids_of(said)})
    assert found.json() == {"prompt": said}


@pytest.mark.parametrize("path", TOOLS)
async def test_they_ask_no_engine_and_need_none(path: str) -> None:
    async with world() as w:
        answer = await post(w, path, TOOLS[path])
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")


@pytest.mark.parametrize("path", TOOLS)
async def test_a_large_body_is_worked_on_beside_the_loop(path: str) -> None:
    big: dict[str, dict[str, Any]] = {
        "/tokenize": {"prompt": "word " * 20_000},
        "/detokenize": {"tokens": [70] * 20_000},
        COUNT_TOKENS: {"model": "tiny", "messages": [{"role": "user", "content": "word " * 20_000}]},
    }
    async with world() as w:
        found = (await post(w, path, big[path])).json()
    assert found.get("count", found.get("input_tokens", len(found.get("prompt", "")))) >= 20_000


@pytest.mark.parametrize("path", TOOLS)
async def test_wrong_bodies_are_told_in_the_form_of_each_api(path: str) -> None:
    async with world() as w:
        for body in (b"{", b"[]", {**TOOLS[path], "nonsense": 1}, {**TOOLS[path], "model": 5}):
            answer = await post(w, path, body)
            found = answer.json()
            assert answer.status == 400
            if path == COUNT_TOKENS:
                assert (found["type"], found["error"]["type"]) == ("error", "invalid_request_error")
            else:
                assert set(found["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", TOOLS)
async def test_a_body_too_large_for_them_is_refused(path: str) -> None:
    async with world(max_body_bytes=1024) as w:
        assert (await post(w, path, b"x" * 2000)).status == 413


@pytest.mark.parametrize("path", [*TOOLS, "/v1/messages", "/v1/responses", "/v1/chat/completions", "/v1/completions"])
async def test_what_takes_a_body_is_posted(path: str) -> None:
    async with world("p0", "d0") as w:
        answer = await w.call(path, method="GET").run()
        assert (answer.status, "use POST" in answer.body.decode()) == (405, True)
        if "messages" in path:
            assert answer.json()["error"]["type"] == "invalid_request_error"
            assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("path", GETS)
async def test_pages_are_got(path: str) -> None:
    async with world("p0", "d0") as w:
        assert (await w.get(path)).status == 200
        answer = await post(w, path, {})
        assert (answer.status, "use GET" in answer.body.decode()) == (405, True)


@pytest.mark.parametrize("path", GETS)
async def test_a_head_has_the_length_of_the_page_and_nothing_more(path: str) -> None:
    async with world("p0", "d0") as w:
        length = (await w.get(path)).headers["content-length"]
        answer = await w.call(path, method="HEAD").run()
    assert (answer.status, answer.body) == (200, b"")
    # What is measured changes from one look to the next.
    assert path == "/metrics" or answer.headers["content-length"] == length


async def test_the_description_is_of_this_model_and_has_every_path() -> None:
    async with world("p0", "d0") as w:
        answer = await w.get("/openapi.json")
        document = answer.json()
        for path, methods in document["paths"].items():
            for method in methods:
                found = await w.call(path.replace("{model}", "tiny"), method=method.upper()).run()
                assert found.status not in (404, 405), (path, method)
    assert answer.headers["content-type"] == "application/json"
    assert {*TOOLS, *GETS[:-1], "/v1/messages", "/v1/responses"} <= set(document["paths"])
    assert "tiny" in json.dumps(document)


async def test_readiness_follows_the_groups() -> None:
    async with world("p0", "d0") as w:
        assert (await w.get("/ready")).json() == {"status": "ready"}
        w.group("d0", state=GroupState.CORDONED)
        answer = await w.get("/ready")
        assert (answer.status, answer.json()["status"]) == (503, "not ready")
        assert "decode" in answer.json()["reason"]
        w.group("d0")
        assert (await w.get("/ready")).status == 200


async def test_metrics_have_prometheus_content_type_and_what_is_open() -> None:
    async with world("p0", "d0") as w:
        w.engines["d0"].default = Script(finish=None)
        call = w.call("/v1/completions", {"model": "tiny", "prompt": [5], "stream": True})
        running = asyncio.create_task(call.run())
        await call.until_body()
        answer = await w.get("/metrics")
        call.leave()
        await running
    assert answer.headers["content-type"].startswith("text/plain")
    assert '\ntandem_requests_in_flight{replica="g1"} 1.0' in answer.body.decode()
    assert "\ntandem_group_open_rooms{" in answer.body.decode()
