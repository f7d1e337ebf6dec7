"""Streams that wait in the admission queue: signs of life before their turn, and refusals after those."""

from __future__ import annotations

import asyncio

import pytest
from engine_standin import Script
from gateway_world import Answer, Call, World, saying, world
from test_gateway_streams import OPENS, SIGN, ask, every, opening, the_error

from tandem.gateway.http import app


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "KEEP_ALIVE_S", 0.01)


async def full(w: World) -> tuple[Call, asyncio.Task[Answer]]:
    """A request that keeps the only place until its client leaves."""
    w.service.admission.set_capacity(1)
    for one in w.engines.values():
        one.scripts.append(Script(finish=None))
    call = w.call("/v1/completions", {"model": "tiny", "prompt": [5], "stream": True})
    running = asyncio.create_task(call.run())
    await call.until_body(b"data:")
    return call, running


@every
async def test_a_stream_that_waits_for_its_turn_says_that_it_lives(path: str) -> None:
    async with world("p0", "d0") as w:
        before, running = await full(w)
        for one in w.engines.values():
            one.default = saying("hm</think>hello")
        call = ask(w, path, stream=True)
        answered = asyncio.create_task(call.run())
        await call.until_body(SIGN[path] + b"\n\n" + SIGN[path])
        assert call.answer.body.replace(SIGN[path], b"").strip() == b""
        before.leave()
        answer = await answered
        await running
    assert (answer.status, answer.complete) == (200, True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert b"hello" in answer.body
    assert opening(answer) == OPENS.get(path)


@every
async def test_a_refusal_after_a_sign_of_life_is_an_event_of_the_stream(path: str) -> None:
    async with world("p0", "d0") as w:
        before, running = await full(w)
        call = ask(w, path, stream=True)
        answered = asyncio.create_task(call.run())
        await call.until_body(SIGN[path])
        await w.service.admission.close()
        answer = await answered
        assert (answer.status, answer.complete) == (200, True)
        assert "goes down" in the_error(path, answer)["message"]
        assert opening(answer) == OPENS.get(path)
        assert "[DONE]" not in answer.events()
        before.leave()
        await running
        assert w.records[0].outcome == "stopping"


async def test_who_wants_no_stream_still_gets_the_status_of_a_refusal() -> None:
    async with world("p0", "d0") as w:
        before, running = await full(w)
        w.service.queue_s = 0.05
        answer = await w.complete()
        before.leave()
        await running
    assert (answer.status, answer.json()["error"]["code"]) == (429, "overloaded")


async def test_a_client_that_leaves_after_a_sign_of_life_gives_its_place_up() -> None:
    async with world("p0", "d0") as w:
        before, running = await full(w)
        call = ask(w, "/v1/completions", stream=True)
        answered = asyncio.create_task(call.run())
        await call.until_body()
        call.leave()
        await answered
        await w.until(lambda: len(w.records) == 1)
        assert w.records[0].outcome == "client_gone"
        before.leave()
        await running
        await w.until(lambda: not w.service.admission.running)
