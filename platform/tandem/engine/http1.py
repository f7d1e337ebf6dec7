"""A lean HTTP/1.1 client: one `asyncio.Protocol` per connection, httptools, keep-alive, a deadline on every wait.

It exists because a general client costs several times more per streamed chunk than the rest of the gateway together.
It speaks to our own engines only: plain `http://`, no redirects, no compression, no cookies.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import lru_cache
from typing import cast
from urllib.parse import urlsplit

import httptools

HIGH_WATER = 256 * 1024
"""Bytes of a response that may wait for the reader before the socket is paused."""


_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class HttpFailure(Exception):
    """The exchange did not work. The message is one sentence for a person."""


class Unreachable(HttpFailure):
    """No connection, or it was lost before any byte of an answer."""


class Interrupted(HttpFailure):
    """The connection was lost, or made no sense, in the middle of an answer."""


class TimedOut(HttpFailure):
    """A wait took too long."""


class Response:
    """An answer as it arrives: `head` first, then `chunk` until None, or `read` for all of it."""

    def __init__(self, connection: _Connection) -> None:
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.done = False
        self._connection = connection
        self._pieces: deque[bytes] = deque()
        self._buffered = 0
        self._failure: HttpFailure | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._listener: Callable[[], None] | None = None

    def listen(self, listener: Callable[[], None] | None) -> None:
        """Have `listener` called whenever there is news, in place of awaiting it: then look at `status`, `take`, `done`
        and `failure`. It is called once for all that arrived together. None: nobody listens any more."""
        self._listener = listener

    @property
    def failure(self) -> HttpFailure | None:
        """How the exchange failed, if it did."""
        return self._failure

    def take(self) -> bytes:
        """What of the body has arrived since the last call, at once; may be empty."""
        if not self._pieces:
            return b""
        data = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self._buffered = 0
        self._connection.resume()
        return data

    async def head(self, within: float | None) -> int:
        """The status, as soon as all headers are here. `within` is in seconds; None waits as long as it takes."""
        await self._until(lambda: self.status != 0, within, "no answer")
        return self.status

    async def chunk(self, within: float | None) -> bytes | None:
        """Everything of the body that has arrived since the last call; None at its end."""
        await self._until(lambda: bool(self._pieces) or self.done, within, "nothing more of the answer")
        return self.take() or None

    async def read(self, within: float, limit: int = 16 * 2**20) -> bytes:
        """The whole body; `within` seconds for each piece of it."""
        pieces: list[bytes] = []
        size = 0
        while (piece := await self.chunk(within)) is not None:
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                self.close()
                raise Interrupted(f"{self._connection.peer} answered with more than {limit} bytes")
        return b"".join(pieces)

    def close(self) -> None:
        """Give the answer up: the connection is closed unless the answer is complete. Harmless when repeated."""
        if not self.done:
            self._connection.drop()

    async def _until(self, ready: Callable[[], bool], within: float | None, what: str) -> None:
        if ready():
            return
        loop = asyncio.get_running_loop()
        timer = None if within is None else loop.call_later(within, self._late, within, what)
        try:
            while not ready():
                if self._failure is not None:
                    raise self._failure
                self._waiter = loop.create_future()
                await self._waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _late(self, within: float, what: str) -> None:
        self.fail(TimedOut(f"{what} from {self._connection.peer} within {within:g} s"))
        self._connection.drop()

    # Called by the connection

    def add(self, piece: bytes) -> bool:
        """Take a piece of the body; True = enough for now."""
        self._pieces.append(piece)
        self._buffered += len(piece)
        self.wake()
        return self._buffered > HIGH_WATER

    def fail(self, failure: HttpFailure) -> None:
        if self._failure is None and not self.done:
            self._failure = failure
        self.wake()
        self.tell()

    def tell(self) -> None:
        """All that arrived together has been taken in."""
        if self._listener is not None:
            self._listener()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self, pool: Pool, host: str, port: int) -> None:
        self.peer = f"{host}:{port}"
        self.used = 0
        self.idle_since = 0.0
        self._pool = pool
        self._key = (host, port)
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._paused = False

    @property
    def alive(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes) -> Response:
        assert self._transport is not None, "a connection is used only after it was made"
        self.used += 1
        self._response = Response(self)
        self._parser = httptools.HttpResponseParser(self)
        self._transport.write(request)
        return self._response

    def drop(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def resume(self) -> None:
        if self._paused and self._transport is not None and not self._transport.is_closing():
            self._paused = False
            self._transport.resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # asyncio and uvloop both set TCP_NODELAY on every TCP transport.
        # uvloop's transports are not asyncio.Transport's children.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self._key, self)
        self._transport = None
        response, self._response = self._response, None
        if response is None or response.done:
            return
        cause = f" ({exc})" if exc is not None else ""
        if response.status:
            response.fail(Interrupted(f"{self.peer} closed the connection in the middle of its answer{cause}"))
        else:
            response.fail(Unreachable(f"{self.peer} closed the connection before it answered{cause}"))

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            # Nothing was asked: whatever this is, the connection is of no use.
            self.drop()
            return
        response = self._response
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if response is not None:
                response.fail(Interrupted(f"{self.peer} did not answer in HTTP/1.1: {error}"))
            self.drop()
        else:
            if response is not None:
                response.tell()

    def eof_received(self) -> bool:
        return False

    # httptools

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._response is not None:
            self._response.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        if self._response is not None:
            self._response.status = self._parser.get_status_code()
            self._response.wake()

    def on_body(self, body: bytes) -> None:
        if self._response is not None and self._response.add(body) and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        response, self._response = self._response, None
        assert self._parser is not None
        keep = self._parser.should_keep_alive()
        self._parser = None
        if response is not None:
            response.done = True
            response.wake()
        if keep and self.alive:
            self.resume()
            self._pool.give_back(self._key, self)
        elif self._transport is not None:
            self._transport.close()


class Pool:
    """Keep-alive connections to any number of servers. Belongs to one event loop."""

    def __init__(self, *, idle_s: float = 3.0) -> None:
        """`idle_s`: a connection idle for longer is closed. SGLang closes its own after 5 s."""
        self._idle_s = idle_s
        self._idle: dict[tuple[str, int], dict[_Connection, None]] = {}
        """The one that is idle for longest first."""
        self._sweeper: asyncio.TimerHandle | None = None
        self._closed = False

    async def request(
        self, method: str, url: str, *, body: bytes = b"", connect_s: float = 5.0, fresh: bool = False
    ) -> Response:
        """Send one request; the answer is then awaited on the `Response`.

        Raises Unreachable or TimedOut if no connection comes about within `connect_s` seconds. `fresh` asks for a new
        connection.
        """
        response = self.begin(method, url, body=body, connect_s=connect_s, fresh=fresh)
        return response if isinstance(response, Response) else await response

    def begin(
        self,
        method: str,
        url: str,
        *,
        body: bytes = b"",
        headers: Sequence[tuple[bytes, bytes]] = (),
        connect_s: float = 5.0,
        fresh: bool = False,
    ) -> Response | Awaitable[Response]:
        """`request` that sends at once if a connection is open; if not, what it returns is to be awaited."""
        host, port, path = _split(url)
        name = f"[{host}]" if ":" in host else host
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: {name}:{port}\r\ncontent-length: {len(body)}\r\n"
            "content-type: application/json\r\n"
        )
        # A value with a line end in it would be more than a header.
        lines = b"".join([b"%s: %s\r\n" % header for header in headers if not _CONTROL.search(header[1])])
        request = b"%s%s\r\n%s" % (head.encode("ascii"), lines, body)
        connection = None if fresh else self._take((host, port))
        return self._send_fresh(host, port, connect_s, request) if connection is None else connection.send(request)

    async def _send_fresh(self, host: str, port: int, connect_s: float, request: bytes) -> Response:
        return (await self._connect(host, port, connect_s)).send(request)

    async def fetch(
        self, method: str, url: str, *, body: bytes = b"", connect_s: float = 5.0, within: float = 5.0
    ) -> tuple[int, bytes]:
        """A whole small exchange, (status, body). Only for what may be sent twice: a kept connection that turns out
        to be dead is replaced and the request repeated once."""
        for fresh in (False, True):
            response = await self.request(method, url, body=body, connect_s=connect_s, fresh=fresh)
            reused = response._connection.used > 1
            try:
                status = await response.head(within)
                return status, await response.read(within)
            except Unreachable:
                if fresh or not reused:
                    raise
            finally:
                response.close()
        raise AssertionError("unreachable: the second turn returns or raises")

    async def close(self) -> None:
        """Close what is idle; connections in use close when their answers end or are given up."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connections in self._idle.values():
            for connection in list(connections):
                connection.drop()
        self._idle.clear()

    def _take(self, key: tuple[str, int]) -> _Connection | None:
        now = asyncio.get_running_loop().time()
        idle = self._idle.get(key)
        while idle:
            connection, _ = idle.popitem()
            if connection.alive and now - connection.idle_since < self._idle_s:
                return connection
            connection.drop()
        return None

    async def _connect(self, host: str, port: int, connect_s: float) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(connect_s):
                _, connection = await loop.create_connection(lambda: _Connection(self, host, port), host, port)
        except TimeoutError:
            raise TimedOut(f"no connection to {host}:{port} within {connect_s:g} s") from None
        except OSError as error:
            raise Unreachable(f"no connection to {host}:{port}: {error.strerror or error}") from error
        return connection

    def give_back(self, key: tuple[str, int], connection: _Connection) -> None:
        if self._closed:
            connection.drop()
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.setdefault(key, {})[connection] = None
        if self._sweeper is None:
            self._sweeper = loop.call_later(self._idle_s, self._sweep, loop)

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close what a burst of requests has left."""
        too_old = loop.time() - self._idle_s
        for idle in list(self._idle.values()):
            for connection in [one for one in idle if one.idle_since <= too_old]:
                idle.pop(connection, None)
                connection.drop()
        self._idle = {key: idle for key, idle in self._idle.items() if idle}
        self._sweeper = loop.call_later(self._idle_s, self._sweep, loop) if self._idle else None

    def forget(self, key: tuple[str, int], connection: _Connection) -> None:
        idle = self._idle.get(key)
        if idle:
            idle.pop(connection, None)
        if not idle:
            self._idle.pop(key, None)


@lru_cache(maxsize=4096)
def _split(url: str) -> tuple[str, int, str]:
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{url!r} is not an http:// URL")
    path = parts.path or "/"
    return parts.hostname, parts.port or 80, f"{path}?{parts.query}" if parts.query else path
