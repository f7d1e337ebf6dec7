"""Many clients at once, good ones and bad ones, on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from hostile_stage import MODEL, Stage

Address = tuple[str, int]
Ask = Callable[[], Awaitable[None]]
NEIGHBOURS = 4
WORST_S = 2.0
"""A neighbour's request takes a third of a second; what is above this is not the machine's noise."""


def request(path: str = "/v1/completions", **fields: Any) -> bytes:
    """The bytes of a request for a short completion."""
    body = json.dumps({"model": MODEL, "prompt": "hi", "max_tokens": 4, **fields}).encode()
    return b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%s" % (path.encode(), len(body), body)


def allow_files() -> None:
    """As many as may be."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def status_of(address: Address, data: bytes, within: float) -> int:
    """Of one request; its answer is read to its end."""
    async with asyncio.timeout(within):
        reader, writer = await asyncio.open_connection(*address)
        try:
            writer.write(data)
            status = int((await reader.readline()).split()[1])
            length = 0
            while (line := (await reader.readline()).lower()) != b"\r\n":
                assert line, "the answer was cut"
                length = int(line[15:]) if line.startswith(b"content-length:") else length
            if length:
                await reader.readexactly(length)
            else:
                while size := int(await reader.readline(), 16):
                    await reader.readexactly(size + 2)
            return status
        finally:
            writer.transport.abort()


class Neighbours:
    """Ordinary clients: how long each of their requests took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def ask(self, once: Ask) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await once()
            self.seconds.append(loop.time() - began)
            await asyncio.sleep(0.02)

    @property
    def worst(self) -> float:
        return max(self.seconds)

    @property
    def median(self) -> float:
        return sorted(self.seconds)[len(self.seconds) // 2]


@contextlib.asynccontextmanager
async def neighbours(address: Address, once: Ask | None = None) -> AsyncIterator[Neighbours]:
    """A few ordinary clients for as long as the block lasts; every request of theirs must be answered well.

    `once` is what they do again and again, if it is not a request over HTTP; it raises if that is not answered so.
    """
    found = Neighbours()

    async def over_http() -> None:
        assert await status_of(address, request(), 10) == 200

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(found.ask(once or over_http)) for _ in range(NEIGHBOURS)]
        yield found
        while len(found.seconds) < NEIGHBOURS:
            await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()


async def connections(address: Address, number: int, *, at_once: int = 500, window: int = 0) -> list[socket.socket]:
    """Connected sockets, from several addresses of this machine, so that ports do not run out.

    `window`: bytes that the kernel takes for a client that does not read; 0 = as usual.
    """
    loop = asyncio.get_running_loop()
    found: list[socket.socket] = []

    async def connect(source: str) -> None:
        made = socket.socket()
        made.setblocking(False)
        if window:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        made.bind((source, 0))
        found.append(made)
        await loop.sock_connect(made, address)

    for first in range(0, number, at_once):
        async with asyncio.timeout(20):
            count = min(at_once, number - first)
            await asyncio.gather(*(connect(f"127.0.0.{2 + (first + n) % 8}") for n in range(count)))
    return found


async def until_quiet(stage: Stage, within: float = 15.0) -> None:
    await asyncio.to_thread(stage.quiet, within)


class Peak:
    """The most memory that the gateway takes while the block lasts, in MiB above what it had."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._before = stage.memory()
        self.above = 0.0

    async def watch(self) -> None:
        while True:
            self.above = max(self.above, self._stage.memory() - self._before)
            await asyncio.sleep(0.02)

    async def __aenter__(self) -> Peak:
        self._task = asyncio.create_task(self.watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        self.above = max(self.above, self._stage.memory() - self._before)
        self._task.cancel()
