"""The HTTP server at its edges: what strangers send, how slowly, and when they leave."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.gateway.errors import ApiError
from tandem.gateway.http import exchange as exchanges
from tandem.gateway.http.exchange import ClientLeft, Exchange
from tandem.gateway.http.server import HttpServer, Limits

Handler = Callable[[Exchange], Awaitable[None]]

POST = b"POST /echo HTTP/1.1\r\nhost: x\r\n"
QUICK = {"header_s": 0.05, "idle_s": 0.05, "linger_s": 0.2, "close_s": 0.05, "sweep_s": 0.02}


async def echo(exchange: Exchange) -> None:
    """Answers with method, path and body."""
    try:
        body = await exchange.read(1000)
    except ApiError as error:
        exchange.reply(error.status, error.body(), [], close=True)
        return
    exchange.reply(200, b"%s %s %s" % (exchange.method.encode(), exchange.path.encode(), body), [])


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def answer(self) -> tuple[int, bytes]:
        """Status and body of the next answer."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ")[1])
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length: "):
                return status, await self.reader.readexactly(int(line[16:]))
        return status, b""

    async def rest(self) -> bytes:
        """Everything until the server closes."""
        async with asyncio.timeout(5):
            return await self.reader.read()


@dataclass
class Site:
    server: HttpServer
    address: tuple[str, int]

    async def client(self) -> Client:
        return Client(*await asyncio.open_connection(*self.address))

    async def ask(self, data: bytes) -> bytes:
        """Send, and read until the server closes."""
        client = await self.client()
        client.send(data)
        found = await client.rest()
        client.writer.close()
        return found

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(5):
            while not true():
                await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def site(handler: Handler = echo, **limits: float) -> AsyncIterator[Site]:
    made = Limits()
    for name, value in limits.items():
        setattr(made, name, value)
    server = HttpServer(handler, limits=made)
    listener = socket.create_server(("127.0.0.1", 0))
    await server.start(listener)
    yield Site(server, listener.getsockname())
    await server.stop(grace=2)
    server.abort()


async def test_a_server_that_leaves_answers_and_asks_for_another_connection() -> None:
    async with site() as s:
        s.server.leaving = True
        answer = await s.ask(POST + b"content-length: 3\r\n\r\none")
    assert b"connection: close\r\n" in answer
    assert answer.endswith(b"POST /echo one")


async def test_a_connection_serves_one_request_after_another() -> None:
    async with site() as s:
        client = await s.client()
        for body in (b"one", b"two"):
            client.send(POST + b"content-length: 3\r\n\r\n" + body)
            assert await client.answer() == (200, b"POST /echo " + body)


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with site() as s:
        client = await s.client()
        client.send(b"".join(POST + b"content-length: 1\r\n\r\n%d" % n for n in range(9)))
        assert [await client.answer() for _ in range(9)] == [(200, b"POST /echo %d" % n) for n in range(9)]


async def test_a_chunked_body_is_read_whole() -> None:
    async with site() as s:
        client = await s.client()
        client.send(POST + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n")
        assert await client.answer() == (200, b"POST /echo abcde")


async def test_a_client_that_asks_first_is_told_to_go_on() -> None:
    async with site() as s:
        client = await s.client()
        client.send(POST + b"content-length: 2\r\nexpect: 100-continue\r\n\r\n")
        assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(b"ok")
        assert await client.answer() == (200, b"POST /echo ok")


async def test_a_head_request_gets_no_body() -> None:
    async with site() as s:
        answer = await s.ask(b"HEAD /x HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert b"content-length: 8\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


async def stream(exchange: Exchange) -> None:
    exchange.start(200, [])
    await exchange.write(b"ab")
    exchange.end(b"cd")


async def test_a_stream_is_chunked_and_for_http_1_0_ends_with_the_connection() -> None:
    async with site(stream) as s:
        modern = await s.ask(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        old = await s.ask(b"GET / HTTP/1.0\r\n\r\n")
    assert modern.endswith(b"\r\n\r\n2\r\nab\r\n2\r\ncd\r\n0\r\n\r\n")
    assert old.endswith(b"\r\n\r\nabcd")
    assert b"transfer-encoding" not in old


async def test_an_upgrade_is_not_taken_up() -> None:
    async with site() as s:
        answer = await s.ask(b"GET /chat HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert answer.endswith(b"GET /chat ")


@pytest.mark.parametrize(
    ("data", "status"),
    [
        pytest.param(b"\x16\x03\x01\x02\x00", 400, id="TLS on the plain port"),
        pytest.param(b"GET / HTTP/9.9\r\n\r\n", 400, id="a version that there is not"),
        pytest.param(POST + b"content-length: 3\r\ncontent-length: 4\r\n\r\n", 400, id="two lengths"),
        pytest.param(POST + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\n", 400, id="smuggled"),
        pytest.param(b"GET / HTTP/1.1\r\nx: " + b"a" * 40_000, 431, id="headers without end"),
    ],
)
async def test_what_is_no_request_is_refused_and_the_connection_closed(data: bytes, status: int) -> None:
    async with site() as s:
        assert (await s.ask(data)).startswith(b"HTTP/1.1 %d " % status)


async def test_headers_that_do_not_come_are_not_waited_for() -> None:
    async with site(**QUICK) as s:
        assert (await s.ask(b"GET / HTTP/1.1\r\nhost")).startswith(b"HTTP/1.1 408 ")


async def test_an_idle_connection_is_closed() -> None:
    async with site(**QUICK) as s:
        assert await s.ask(b"") == b""


async def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchanges, "BODY_TIMEOUT_S", 0.05)
    async with site() as s:
        assert (await s.ask(POST + b"content-length: 9\r\n\r\nabc")).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("framing", [b"content-length: 8000000", b"transfer-encoding: chunked"])
async def test_a_client_that_sends_too_much_still_gets_its_answer(framing: bytes) -> None:
    async with site() as s:
        client = await s.client()
        client.send(POST + framing + b"\r\n\r\n" + (b"" if b"length" in framing else b"7A1200\r\n"))
        client.send(b"x" * 8_000_000)
        assert (await client.rest()).startswith(b"HTTP/1.1 413 ")


async def test_who_goes_on_sending_for_ever_is_cut_off() -> None:
    async with site(**QUICK) as s:
        client = await s.client()
        client.send(POST + b"content-length: 8000000\r\n\r\n")
        assert (await client.rest()).startswith(b"HTTP/1.1 413 ")
        await s.until(lambda: not s.server.connections)


async def test_the_handler_learns_that_the_client_has_left() -> None:
    left = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        exchange.when_left(left.set)
        await left.wait()

    async with site(handler) as s:
        client = await s.client()
        client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await s.until(lambda: bool(s.server.tasks))
        client.writer.transport.abort()
        async with asyncio.timeout(5):
            await left.wait()


async def test_a_client_that_reads_nothing_holds_up_only_its_own_answer() -> None:
    written = 0
    over = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        nonlocal written
        if exchange.path == "/quick":
            await echo(exchange)
            return
        exchange.start(200, [])
        try:
            while written < 10_000:
                await exchange.write(b"x" * 10_000)
                written += 1
        except ClientLeft:
            over.set()

    async with site(handler) as s:
        slow = await s.client()
        slow.reader._transport.pause_reading()  # type: ignore[attr-defined]
        slow.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await s.until(lambda: written > 0)
        quick = await s.client()
        quick.send(b"GET /quick HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await quick.answer())[0] == 200
        assert written < 10_000
        slow.writer.transport.abort()
        async with asyncio.timeout(5):
            await over.wait()


async def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one() -> None:
    async def handler(exchange: Exchange) -> None:
        exchange.start(200, [])
        await exchange.write(b"half")
        raise RuntimeError("broken")

    async with site(handler) as s:
        answer = await s.ask(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert answer.endswith(b"4\r\nhalf\r\n")


async def test_a_connection_too_many_is_closed_and_the_others_live_on() -> None:
    async with site(connections=2) as s:
        first, second = await s.client(), await s.client()
        await s.until(lambda: len(s.server.connections) == 2)
        assert await (await s.client()).rest() == b""
        for client in (first, second):
            client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await client.answer())[0] == 200


async def test_a_stop_lets_running_answers_end_and_closes_idle_connections() -> None:
    go = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await go.wait()
        await echo(exchange)

    async with site(handler) as s:
        idle, busy = await s.client(), await s.client()
        busy.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await s.until(lambda: len(s.server.tasks) == 1 and len(s.server.connections) == 2)
        assert not await s.server.stop(grace=0.01)
        assert await idle.rest() == b""
        go.set()
        assert (await busy.answer())[0] == 200
        assert await s.server.stop(grace=5)


REQUESTS = POST + b"content-length: 5\r\n\r\nhello" + b"GET /next?x=1 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, len(REQUESTS) - 1), max_size=8))
async def test_it_does_not_matter_how_a_request_is_cut(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(REQUESTS)]
    async with site() as s:
        client = await s.client()
        for start, end in itertools.pairwise(edges):
            client.send(REQUESTS[start:end])
            await client.writer.drain()
            await asyncio.sleep(0)
        assert await client.answer() == (200, b"POST /echo hello")
        assert await client.answer() == (200, b"GET /next ")


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400), st.booleans())
async def test_garbage_neither_breaks_nor_blocks_the_server(garbage: bytes, begun: bool) -> None:
    async with site(**QUICK) as s:
        client = await s.client()
        client.send((POST if begun else b"") + garbage)
        client.writer.write_eof()
        with contextlib.suppress(ConnectionError):
            await client.rest()
        assert (await s.ask(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")).startswith(b"HTTP/1.1 200")


async def test_a_client_that_reads_no_answer_gets_no_further_one() -> None:
    answered = 0

    async def handler(exchange: Exchange) -> None:
        nonlocal answered
        answered += 1
        exchange.reply(200, b"x" * 1_000_000, [])

    async with site(handler) as s:
        client = await s.client()
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(60):
            client.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await s.until(lambda: answered > 0)
        other = await s.client()
        other.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await other.answer())[0] == 200
        assert answered < 20
        client.reader._transport.resume_reading()  # type: ignore[attr-defined]
        for _ in range(60):
            assert (await client.answer())[0] == 200
