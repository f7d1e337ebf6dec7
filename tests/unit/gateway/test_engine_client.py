"""The engine client against a stand-in on a real socket, and against bytes of our own choosing."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from engine_standin import Engine, Script, engine

from tandem.core.pair_events import FailureKind
from tandem.core.types import DpLoad
from tandem.engine.client import Ended, EngineClient, EngineError, Logprob, TokenChunk


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    made = EngineClient(connect_s=2)
    yield made
    await made.close()


@pytest.fixture
async def decode() -> AsyncIterator[Engine]:
    async with engine("decode") as made:
        yield made


def body(rid: str = "r") -> bytes:
    return json.dumps({"rid": rid, "input_ids": [1, 2, 3], "stream": True}).encode()


async def read(client: EngineClient, url: str, **waits: Any) -> tuple[list[int], Ended | None]:
    stream = await client.generate(url, body(), **{"first_byte_s": 2, "stall_s": 2, **waits})
    ids: list[int] = []
    ended = None
    async for chunk in stream:
        ids += chunk.ids
        ended = chunk.ended
    await stream.drain(1)
    return ids, ended


async def failure(client: EngineClient, url: str, **waits: Any) -> EngineError:
    with pytest.raises(EngineError) as caught:
        await read(client, url, **waits)
    return caught.value


@pytest.mark.parametrize("cumulative", [False, True])
async def test_a_stream_is_its_tokens_each_once(client: EngineClient, decode: Engine, cumulative: bool) -> None:
    decode.scripts.append(Script(ids=[5, 6, 7, 5], cumulative=cumulative))
    ids, ended = await read(client, decode.url)
    assert ids == [5, 6, 7, 5]
    assert ended == Ended(reason="length", prompt_tokens=3, cached_tokens=2, weight_version="v1")


async def test_connections_are_used_again(client: EngineClient, decode: Engine) -> None:
    for _ in range(3):
        await read(client, decode.url)
        await client.abort(decode.url, "other")
    assert decode.connections == 1


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        (Script(status=500), FailureKind.REFUSED),
        (Script(status=503), FailureKind.REFUSED),
        (Script(status=400), FailureKind.BAD_REQUEST),
        (Script(finish={"type": "abort", "message": "KV lost", "status_code": 500}), FailureKind.ABORTED),
        (Script(finish={"type": "abort", "message": "Aborted"}), FailureKind.ABORTED),
        (Script(finish={"type": "abort", "message": "long", "status_code": 400}), FailureKind.BAD_REQUEST),
        (Script(error={"message": "no", "code": 400}), FailureKind.BAD_REQUEST),
        (Script(error={"message": "no", "code": 503}), FailureKind.REFUSED),
        (Script(cut=True), FailureKind.BROKEN),
    ],
)
async def test_every_way_to_fail_has_its_name(
    client: EngineClient, decode: Engine, script: Script, kind: FailureKind
) -> None:
    decode.scripts.append(script)
    assert (await failure(client, decode.url)).failure.kind is kind


async def test_a_server_that_is_not_there_is_unreachable(client: EngineClient) -> None:
    async with engine("decode") as gone:
        url = gone.url
    assert (await failure(client, url)).failure.kind is FailureKind.UNREACHABLE
    assert not await client.ready(url)


async def test_a_stream_that_stalls_is_given_up(client: EngineClient, decode: Engine) -> None:
    decode.scripts.append(Script(finish=None))
    assert (await failure(client, decode.url, stall_s=0.05)).failure.kind is FailureKind.STALLED
    await decode.idle()


async def test_an_abort_ends_the_stream(client: EngineClient, decode: Engine) -> None:
    decode.scripts.append(Script(finish=None))
    reading = asyncio.create_task(failure(client, decode.url))
    await decode.until(lambda: "r" in decode.running)
    await client.abort(decode.url, "r")
    assert (await reading).failure.kind is FailureKind.ABORTED


async def test_loads_are_told_per_dp_rank(client: EngineClient, decode: Engine) -> None:
    assert await client.loads(decode.url) == [DpLoad(dp_rank=1, running=2, waiting=3, token_usage=0.5)]
    assert await client.ready(decode.url)


# Bytes of our own choosing


@contextlib.asynccontextmanager
async def server_of(*pieces: bytes, close: bool = False) -> AsyncIterator[str]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        if close:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def event(ids: list[int], total: int, finish: str = "null") -> bytes:
    meta = b'"meta_info":{"completion_tokens":%d,"finish_reason":%s}' % (total, finish.encode())
    return b'data: {"output_ids":%s,%s}\n\n' % (json.dumps(ids).encode(), meta)


GOOD = event([5], 1) + event([6, 7], 3) + event([8], 4, '{"type":"stop","matched":8}') + b"data: [DONE]\n\n"
HEAD = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n"


async def test_an_answer_that_comes_byte_by_byte_is_understood(client: EngineClient) -> None:
    whole = HEAD % len(GOOD) + GOOD
    async with server_of(*[bytes([byte]) for byte in whole]) as url:
        ids, ended = await read(client, url)
    assert ids == [5, 6, 7, 8]
    assert ended is not None
    assert (ended.reason, ended.matched) == ("stop", 8)


@pytest.mark.parametrize(
    "answer",
    [
        event([5], 1) + event([7], 3),
        b'data: {"output_ids": [1]}\n\n',
        b"data: no json\n\n",
        b'data: {"output_ids": "x", "meta_info": {}}\n\n',
        event([5], 1) + b"data: [DONE]\n\n",
        event([5], 1),
    ],
)
async def test_a_stream_that_makes_no_sense_is_broken(client: EngineClient, answer: bytes) -> None:
    async with server_of(HEAD % len(answer) + answer) as url:
        assert (await failure(client, url)).failure.kind is FailureKind.BROKEN


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"", FailureKind.UNREACHABLE),
        (b"SSH-2.0-OpenSSH\r\n", FailureKind.UNREACHABLE),
        (HEAD % 1000 + event([5], 1), FailureKind.BROKEN),
    ],
)
async def test_a_connection_that_breaks_off_is_noticed(client: EngineClient, answer: bytes, kind: FailureKind) -> None:
    async with server_of(answer, close=True) as url:
        assert (await failure(client, url)).failure.kind in (kind, FailureKind.BROKEN)


def scored(ids: list[int], total: int, tops: str = "null", finish: str = "null") -> bytes:
    values = json.dumps([[-0.5, token, None] for token in ids])
    meta = f'{{"completion_tokens":{total},"finish_reason":{finish},"output_token_logprobs":{values}'
    return f'data: {{"output_ids":{json.dumps(ids)},"meta_info":{meta},"output_top_logprobs":{tops}}}}}\n\n'.encode()


DONE = '{"type":"length"}'


async def chunks(client: EngineClient, answer: bytes) -> list[TokenChunk]:
    async with server_of(HEAD % len(answer) + answer) as url:
        stream = await client.generate(url, body(), first_byte_s=2, stall_s=2)
        found = [chunk async for chunk in stream]
        stream.close()
        return found


async def test_logprobs_come_with_their_tokens(client: EngineClient) -> None:
    top = "[[[-0.25, 9, null], [null, 5, null]], null]"
    answer = scored([5, 6], 2, top) + scored([7], 3, "[[[-0.5, 7, null]]]", DONE)
    found = [one for chunk in await chunks(client, answer) for one in chunk.logprobs or []]
    assert found == [
        Logprob(-0.5, 5, [(-0.25, 9), (float("-inf"), 5)]),
        Logprob(-0.5, 6, []),
        Logprob(-0.5, 7, [(-0.5, 7)]),
    ]


async def test_logprobs_that_are_told_again_count_once(client: EngineClient) -> None:
    answer = scored([5], 1) + scored([5, 6], 2, finish=DONE)
    found = [one.token for chunk in await chunks(client, answer) for one in chunk.logprobs or []]
    assert found == [5, 6]


async def test_without_logprobs_there_are_none(client: EngineClient) -> None:
    assert [chunk.logprobs for chunk in await chunks(client, GOOD)] == [None]


@pytest.mark.parametrize(
    "answer",
    [
        scored([5], 1).replace(b"[-0.5, 5,", b"[-0.5, 6,") + scored([6], 2, finish=DONE),
        scored([5, 6], 2, "[[]]", DONE),
        scored([5], 1) + event([6], 2, DONE),
    ],
)
async def test_logprobs_that_fit_no_token_are_refused(client: EngineClient, answer: bytes) -> None:
    async with server_of(HEAD % len(answer) + answer) as url:
        assert (await failure(client, url)).failure.kind is FailureKind.BROKEN


async def test_a_server_that_never_answers_is_given_up(client: EngineClient) -> None:
    async with server_of() as url:
        assert (await failure(client, url, first_byte_s=0.05)).failure.kind is FailureKind.STALLED
