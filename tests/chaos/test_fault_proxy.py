"""The fault proxy does what it says: without that, the faults on connections would show nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from chaos.fault_proxy import FaultProxy


@pytest.fixture
async def proxy() -> AsyncIterator[FaultProxy]:
    """In front of a server that sends back what it is sent."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    proxy = FaultProxy()
    await proxy.start()
    proxy.aim(*server.sockets[0].getsockname()[:2])
    yield proxy
    await proxy.close()
    server.close()


async def connected(proxy: FaultProxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, _, port = proxy.url.removeprefix("http://").partition(":")
    return await asyncio.open_connection(host, int(port))


async def echoed(ends: tuple[asyncio.StreamReader, asyncio.StreamWriter], data: bytes) -> bytes:
    ends[1].write(data)
    async with asyncio.timeout(5):
        return await ends[0].readexactly(len(data))


async def test_it_passes_everything_on(proxy: FaultProxy) -> None:
    ends = await connected(proxy)
    assert await echoed(ends, b"x" * 100_000) == b"x" * 100_000
    ends[1].write_eof()
    assert await ends[0].read() == b""


async def test_a_cut_resets_both_sides(proxy: FaultProxy) -> None:
    ends = await connected(proxy)
    await echoed(ends, b"before")
    assert proxy.cut() == 1
    with pytest.raises(ConnectionResetError):
        await ends[0].read()


async def until_broken(reader: asyncio.StreamReader, got: bytearray) -> None:
    while data := await reader.read(1):
        got += data


async def test_a_cut_after_some_bytes_lets_no_more_than_these_pass(proxy: FaultProxy) -> None:
    ends = await connected(proxy)
    await echoed(ends, b"before")
    proxy.cut_after(4)
    ends[1].write(b"0123456789")
    got = bytearray()
    with pytest.raises(ConnectionResetError):
        await until_broken(ends[0], got)
    assert b"0123".startswith(got)


async def test_who_is_refused_is_reset(proxy: FaultProxy) -> None:
    proxy.refusing = True
    ends = await connected(proxy)
    ends[1].write(b"POST /generate HTTP/1.1")
    with pytest.raises(ConnectionResetError):
        await ends[0].read()
    assert (proxy.legs, proxy.legs_refused) == (0, 1)
    proxy.mend()
    assert await echoed(await connected(proxy), b"again") == b"again"


async def test_it_knows_which_connections_carry_a_leg(proxy: FaultProxy) -> None:
    polled, leg = await connected(proxy), await connected(proxy)
    await echoed(polled, b"GET /v1/loads HTTP/1.1\r\n\r\n")
    found = []
    # What is echoed is an answer, too.
    for data in (b"POST /generate HTTP/1.1\r\ncontent-length: 5\r\n\r\n", b"he", b"llo"):
        await echoed(leg, data)
        found.append((proxy.legs_open, proxy.legs_streaming))
    assert (found, proxy.legs) == ([(1, 0), (1, 1), (0, 0)], 1)


async def test_a_leg_is_refused_on_an_old_connection_too(proxy: FaultProxy) -> None:
    ends = await connected(proxy)
    await echoed(ends, b"before")
    proxy.refusing = True
    ends[1].write(b"POST /generate HTTP/1.1")
    with pytest.raises(ConnectionResetError):
        await ends[0].read()
    assert proxy.legs_refused == 1


async def test_an_answer_in_chunks_is_over_with_the_last(proxy: FaultProxy) -> None:
    leg = await connected(proxy)
    await echoed(leg, b"POST /generate HTTP/1.1\r\n\r\n5\r\nhello\r\n0\r")
    assert proxy.legs_streaming == 1
    await echoed(leg, b"\n\r\n")
    assert proxy.legs_open == 0


async def test_idle_connections_are_cut_and_legs_are_not(proxy: FaultProxy) -> None:
    idle, leg = await connected(proxy), await connected(proxy)
    await echoed(idle, b"GET /v1/loads HTTP/1.1\r\n\r\n")
    await echoed(leg, b"POST /generate HTTP/1.1\r\n\r\n")
    proxy.cut_idle()
    with pytest.raises(ConnectionResetError):
        await idle[0].read()
    assert await echoed(leg, b"5\r\nhello\r\n") == b"5\r\nhello\r\n"


async def test_what_is_stalled_comes_when_it_is_mended(proxy: FaultProxy) -> None:
    ends = await connected(proxy)
    await echoed(ends, b"before")
    proxy.stall()
    ends[1].write(b"later")
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await ends[0].read(1)
    proxy.mend()
    assert await ends[0].readexactly(5) == b"later"


async def test_a_server_that_is_away_looks_like_a_reset(proxy: FaultProxy) -> None:
    proxy.aim("127.0.0.1", 1)
    ends = await connected(proxy)
    with pytest.raises(ConnectionResetError):
        await ends[0].read()
