"""When a draining group counts as empty."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import pytest

from tandem.fleet.rooms import RoomCounter

Script = Callable[["Engine"], tuple[int, bool]]


class Engine:
    """Tells its load and flushes its cache. `script`: requests that it has, and whether it is idle, at each look."""

    def __init__(self, script: Script, silent_rank: bool = False) -> None:
        self.script = script
        self.silent_rank = silent_rank
        self.looks = 0
        self.flushes = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        requests, idle = self.script(self)
        if b"/flush_cache" in head:
            self.flushes += 1
            status, text = (200 if idle else 400), ""
        else:
            self.looks += 1
            stamps = (self.looks, 1 if self.silent_rank and self.flushes < 2 else self.looks)
            loads = [{"num_running_reqs": requests if rank else 0, "timestamp": at} for rank, at in enumerate(stamps)]
            status, text = 200, json.dumps({"loads": loads})
        writer.write(f"HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {len(text)}\r\n\r\n{text}".encode())
        await writer.drain()
        writer.close()


@pytest.fixture
async def counter() -> AsyncIterator[RoomCounter]:
    made = RoomCounter()
    yield made
    await made.close()


async def until_empty(counter: RoomCounter, engine: Engine, quiet: float = 0.0) -> None:
    server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
    try:
        async with asyncio.timeout(5):
            await counter.until_empty(
                f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", quiet=quiet, every=0.001
            )
    finally:
        server.close()


async def test_a_group_without_requests_is_empty_once_it_has_flushed_and_reported_again(counter: RoomCounter) -> None:
    engine = Engine(lambda _: (0, True))
    await until_empty(counter, engine)
    assert (engine.looks, engine.flushes) == (3, 1)


async def test_its_last_request_is_waited_for(counter: RoomCounter) -> None:
    engine = Engine(lambda self: (int(self.looks < 5), True))
    await until_empty(counter, engine)
    assert engine.looks >= 8


async def test_a_request_that_comes_late_is_waited_for_anew(counter: RoomCounter) -> None:
    engine = Engine(lambda self: (int(self.flushes > 0 and self.looks < 9), True))
    await until_empty(counter, engine)
    assert engine.flushes == 2


async def test_an_engine_that_says_it_is_not_idle_is_believed(counter: RoomCounter) -> None:
    engine = Engine(lambda self: (0, self.flushes >= 3))
    await until_empty(counter, engine)
    assert engine.flushes == 4


async def test_every_dp_rank_must_report_once_more(counter: RoomCounter) -> None:
    engine = Engine(lambda _: (0, True), silent_rank=True)
    await until_empty(counter, engine)
    assert engine.flushes >= 2


async def test_it_must_be_quiet_for_a_while(counter: RoomCounter) -> None:
    engine = Engine(lambda _: (0, True))
    before = asyncio.get_running_loop().time()
    await until_empty(counter, engine, quiet=0.1)
    assert asyncio.get_running_loop().time() - before >= 0.1


async def test_an_engine_that_does_not_answer_is_not_empty(counter: RoomCounter) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await counter.until_empty("http://127.0.0.1:1", quiet=0, every=0.001)
