"""The HTTP edge: pages, limits, request ids, and errors in OpenAI's form."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_model import CONTEXT
from gateway_world import Answer, world


def error(answer: Answer) -> dict[str, Any]:
    found = answer.json()
    assert set(found) == {"error"}
    assert set(found["error"]) == {"message", "type", "param", "code"}
    return dict(found["error"])


async def test_models_are_listed_and_found_by_name() -> None:
    async with world("p0", "d0") as w:
        listed = (await w.get("/v1/models")).json()
        assert [model["id"] for model in listed["data"]] == ["tiny"]
        assert (await w.get("/v1/models/tiny")).json() == listed["data"][0]
        missing = await w.get("/v1/models/gpt")
        assert (missing.status, error(missing)["code"]) == (404, "model_not_found")


async def test_the_fleet_page_tells_what_is_open() -> None:
    async with world("p0", "d0") as w:
        found = (await w.get("/fleet")).json()
    assert found["name"] == "test"
    known = {name: found["gateway"][name] for name in ("replica", "open_requests", "open_rooms", "loads")}
    assert known == {"replica": "g1", "open_requests": 0, "open_rooms": 0, "loads": []}
    assert {rank["group"] for rank in found["gateway"]["ranks"]} == {"p0", "d0"}


async def test_metrics_have_their_names() -> None:
    async with world("p0", "d0") as w:
        await w.complete(stream=True)
        text = (await w.get("/metrics")).body.decode()
    for name in ("tandem_requests_total", "tandem_time_to_first_token_seconds_count", "tandem_completion_tokens_total"):
        assert f'\n{name}{{replica="g1"' in text


async def test_unknown_paths_and_methods_are_told_so() -> None:
    async with world("p0", "d0") as w:
        assert error(await w.get("/v1/nothing"))["message"] == "Invalid URL (GET /v1/nothing)"
        assert (await w.call("/v1/completions", method="GET").run()).status == 405
        assert (await w.call("/health", {}).run()).status == 405


async def test_a_request_id_is_given_back_or_made() -> None:
    async with world("p0", "d0") as w:
        asked = await w.call("/health", headers={"x-request-id": "abc-1"}).run()
        assert asked.headers["x-request-id"] == "abc-1"
        forged = await w.call("/health", headers={"x-request-id": "a b"}).run()
        assert len(forged.headers["x-request-id"]) == 32


async def test_a_body_that_is_too_large_is_not_read() -> None:
    async with world("p0", "d0", max_body_bytes=1024) as w:
        for headers in ({}, {"content-length": "2000"}):
            answer = await w.call("/v1/completions", b"x" * 2000, headers).run()
            assert (answer.status, answer.headers["connection"]) == (413, "close")


async def test_a_compressed_body_is_refused() -> None:
    async with world("p0", "d0") as w:
        answer = await w.call("/v1/completions", b"x", {"content-encoding": "gzip"}).run()
    assert answer.status == 415


async def test_a_prompt_that_is_too_long_is_refused_also_when_it_is_large() -> None:
    async with world("p0", "d0") as w:
        for prompt in ("word " * CONTEXT, [5] * CONTEXT):
            answer = await w.complete(prompt=prompt)
            assert (answer.status, error(answer)["code"]) == (400, "context_length_exceeded")


async def test_what_the_template_refuses_is_a_400() -> None:
    async with world("p0", "d0") as w:
        answer = await w.chat(messages=[{"role": "user", "content": "x"}], temperature="hot")
        assert (answer.status, error(answer)["param"]) == (400, "temperature")


async def test_a_fault_of_ours_is_a_500_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world("p0", "d0") as w:

        def broken(*_: object) -> None:
            raise RuntimeError("secret")

        monkeypatch.setattr(w.service, "_prepare", broken)
        answer = await w.complete()
        assert (answer.status, error(answer)["code"]) == (500, "internal_error")
        assert b"secret" not in answer.body


async def test_refused_requests_never_reach_an_engine() -> None:
    async with world("p0", "d0") as w:
        for body in (b"{", json.dumps({"model": "tiny"}).encode(), b"[]"):
            assert (await w.call("/v1/chat/completions", body).run()).status == 400
        assert not w.engines["p0"].bodies
