"""A gRPC call through the whole gateway, beside the same request over HTTP; engines stand in on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from engine_standin import Script
from gateway_world import World, saying, world

from tandem.client import AsyncClient, InvalidRequest, NotFound, RateLimited, Unauthenticated
from tandem.gateway.errors import ApiError
from tandem.gateway.rpc.front import ServiceAnswers
from tandem.gateway.rpc.incoming import Incoming
from tandem.gateway.rpc.peer import Peer
from tandem.gateway.rpc.server import GrpcServer

WITHIN_S = 20.0


@contextlib.asynccontextmanager
async def both(tenant: str = "", **fleet: Any) -> AsyncIterator[tuple[World, AsyncClient]]:
    """A gateway that listens for HTTP and for gRPC, and a client that has a key if it is of a `tenant`."""
    async with world("p0", "d0", fleet=fleet) as http:
        key = (await http.key(tenant))["authorization"].removeprefix("Bearer ") if tenant else None
        answers = ServiceAnswers(http.service, lambda: "7")
        server = GrpcServer(answers, shortage=lambda: None, longest_s=60, max_request_bytes=2**20)
        port = await server.start("127.0.0.1", 0)
        try:
            async with AsyncClient(f"127.0.0.1:{port}", api_key=key, model="tiny", timeout=WITHIN_S) as client:
                yield http, client
        finally:
            await server.stop(grace=0)


class Sent:
    """A request that is there."""

    async def receive(self) -> int:
        return 10

    def body(self) -> dict[str, object]:
        return {"model": "tiny", "prompt": [5]}


async def test_a_continuation_is_the_one_that_http_gives() -> None:
    async with both() as (http, client):
        wanted = (await http.complete(max_tokens=6, return_token_ids=True)).json()
        whole = await client.generate([5, 6], max_tokens=6, return_token_ids=True)
        stream = client.generate_stream([5, 6], max_tokens=6, return_token_ids=True)
        pieces = [piece async for piece in stream]
    assert whole.text == wanted["choices"][0]["text"] == "".join(piece.text for piece in pieces) != ""
    assert list(whole.token_ids) == wanted["choices"][0]["token_ids"]
    assert whole.finish_reason == wanted["choices"][0]["finish_reason"]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (2, wanted["usage"]["completion_tokens"])
    assert stream.answer is not None
    assert (stream.answer.usage, stream.answer.choices) == (whole.usage, whole.choices)
    assert (whole.weight_version, whole.prompt_token_ids, whole.id[:5]) == ("v1", (5, 6), "cmpl-")


async def test_a_chat_is_the_one_that_http_gives() -> None:
    async with both() as (http, client):
        message = (await http.chat(max_tokens=12)).json()["choices"][0]["message"]
        whole = await client.chat([{"role": "user", "content": "hi"}], max_tokens=12)
        stream = client.chat_stream([{"role": "user", "content": "hi"}], max_tokens=12)
        pieces = [piece async for piece in stream]
    assert whole.text == (message["content"] or "") == "".join(piece.text for piece in pieces)
    assert whole.reasoning == message.get("reasoning_content", "") == "".join(piece.reasoning for piece in pieces)
    assert whole.text + whole.reasoning != ""


async def test_a_large_prompt_is_answered_as_a_small_one() -> None:
    async with both() as (_, client):
        assert (await client.generate("word " * 1500, max_tokens=2)).usage.prompt_tokens > 1000


async def test_what_is_large_is_parsed_in_its_tenants_lane_and_not_on_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parsed: list[bool] = []
    body = Incoming.body

    def noted(incoming: Incoming) -> Any:
        parsed.append(threading.current_thread() is threading.main_thread())
        return body(incoming)

    monkeypatch.setattr(Incoming, "body", noted)
    async with both() as (_, client):
        for size in (10, 40_000):
            assert (await client.generate([5, 6], user="u" * size, max_tokens=2)).usage.prompt_tokens == 2
    assert parsed == [True, False]


async def test_a_wrong_field_is_refused_in_the_words_of_http() -> None:
    async with both() as (http, client):
        wanted = (await http.complete(temperature=2.5)).json()["error"]
        with pytest.raises(InvalidRequest) as caught:
            await client.generate([5, 6], temperature=2.5)
        with pytest.raises(NotFound):
            await client.generate("a", model="other")
        assert (caught.value.message, caught.value.param) == (wanted["message"], wanted["param"])
        assert http.metric("tandem_requests_in_flight") == 0


async def test_a_client_that_leaves_ends_both_legs() -> None:
    async with both() as (http, client):
        http.engines["d0"].default = Script(finish=None)
        stream = client.generate_stream([5, 6], max_tokens=1000, return_token_ids=True)
        await anext(stream)
        assert http.engines["d0"].running
        stream.close()
        await http.quiet()
        assert http.engines["d0"].aborted


async def test_choices_are_told_apart() -> None:
    async with both() as (http, client):
        http.engines["d0"].choose = lambda body: saying(
            "one" if body["sampling_params"]["sampling_seed"] == 7 else "two"
        )
        whole = await client.generate([5, 6], n=2, seed=7)
        stream = client.generate_stream([5, 6], n=2, seed=7)
        async for _ in stream:
            pass
    assert [choice.text for choice in whole.choices] == ["one", "two"]
    assert stream.answer is not None
    assert stream.answer.choices == whole.choices
    assert stream.answer.usage == whole.usage


async def test_without_a_key_nobody_is_let_in() -> None:
    async with both(gateway={"auth": "required"}) as (http, client):
        with pytest.raises(Unauthenticated):
            await client.generate([5, 6])
        assert http.metric("tandem_requests_total", endpoint="completions", outcome="invalid_api_key") == 1
        assert not http.engines["p0"].bodies


async def test_a_call_is_recorded_as_its_tenants() -> None:
    async with both("acme", tenants={"acme": {"priority": "high"}}, gateway={"auth": "required"}) as (http, client):
        whole = await client.generate([5, 6], max_tokens=6)
        await http.until(lambda: bool(http.records))
    (record,) = http.records
    assert (record.tenant, record.priority, record.outcome, record.attempts) == ("acme", "high", "ok", 1)
    assert (record.prompt_tokens, record.completion_tokens) == (2, whole.usage.completion_tokens)


async def test_a_limit_is_told_with_the_time_to_wait() -> None:
    async with both("acme", tenants={"acme": {"requests_per_minute": 1}}) as (_, client):
        await client.generate([5, 6])
        with pytest.raises(RateLimited) as caught:
            await client.generate([5, 6])
    assert caught.value.retry_after is not None
    assert 50 < caught.value.retry_after <= 61


async def test_a_deadline_ends_both_legs_and_is_recorded() -> None:
    async with world("p0", "d0") as http:
        http.engines["d0"].default = Script(ids=[], finish=None)
        answers = ServiceAnswers(http.service, lambda: "7")
        peer = Peer(headers={}, certificate=None, request_id="r")
        deadline = asyncio.get_running_loop().time() + 0.02
        reply = await answers.begin("completions", cast(Incoming, Sent()), peer, deadline)
        with pytest.raises(ApiError) as caught:
            await reply.next()
        reply.close(caught.value)
        await http.quiet()
        assert (caught.value.status, http.records[0].outcome) == (504, "timeout")
