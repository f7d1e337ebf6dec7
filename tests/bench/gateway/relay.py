"""The floor: a relay that hands bytes from one worker to the client and does nothing else.

What a gateway in Python (uvloop, httptools) costs at the least; what Tandem's costs above it is what it does. It reads
each request whole, sends it on over a kept connection, and passes on each answer as it comes.
"""

from __future__ import annotations

import asyncio
import json
import sys
from urllib.parse import urlsplit

import httptools
import uvloop

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Upstream(asyncio.Protocol):
    """One connection to the worker."""

    def __init__(self) -> None:
        self.client: Client | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def ask(self, client: Client, request: bytes) -> None:
        self.client = client
        self.parser = httptools.HttpResponseParser(self)
        self.out = [HEAD]
        self.transport.write(request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)
        if self.out and self.client is not None:
            self.client.transport.write(b"".join(self.out))  # type: ignore[attr-defined]
            self.out.clear()
        if self.client is None:
            IDLE.append(self)

    def on_body(self, piece: bytes) -> None:
        self.out.append(b"%x\r\n%b\r\n" % (len(piece), piece))

    def on_message_complete(self) -> None:
        self.out.append(b"0\r\n\r\n")
        if self.client is not None:
            self.client.transport.write(b"".join(self.out))  # type: ignore[attr-defined]
        self.out.clear()
        self.client = None


IDLE: list[Upstream] = []


class Client(asyncio.Protocol):
    """One connection of a client."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._loop = asyncio.get_running_loop()
        self._asking: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self._parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._body: list[bytes] = []

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_body(self, piece: bytes) -> None:
        self._body.append(piece)

    def on_message_complete(self) -> None:
        body = b"".join(self._body)
        head = b"POST %b HTTP/1.1\r\nhost: worker\r\ncontent-length: %d\r\n\r\n" % (self._url, len(body))
        if IDLE:
            IDLE.pop().ask(self, head + body)
        else:
            self._asking = self._loop.create_task(self._connect(head + body))

    async def _connect(self, request: bytes) -> None:
        _, upstream = await self._loop.create_connection(Upstream, self._host, self._port)
        upstream.ask(self, request)


async def main() -> None:
    address = urlsplit(sys.argv[1])
    assert address.hostname is not None
    assert address.port is not None
    host, port = address.hostname, address.port
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Client(host, port), "127.0.0.1", 0, backlog=4096)
    print(json.dumps(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(main())
