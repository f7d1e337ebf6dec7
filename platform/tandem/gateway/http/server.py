"""A lean HTTP/1.1 server: one `asyncio.Protocol` per connection, httptools, and nothing between a token and its socket.

A general server (an ASGI one) costs more per streamed token than all the rest of the gateway together. This one does
what a gateway needs, and holds what strangers may do to it within bounds: each wait has a deadline, each buffer a
limit, and one client's slowness is that client's alone.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, cast

import httptools

from tandem.gateway.errors import ApiError
from tandem.gateway.http.exchange import Exchange, Request, http_date, status_line

__all__ = ["Exchange", "HttpServer", "Limits"]

log = logging.getLogger(__name__)

Handler = Callable[[Exchange], Awaitable[None]]


class Limits:
    """What one connection may take. Times are in seconds, sizes in bytes."""

    header_bytes = 32 * 1024
    """Request line and headers together; and what may come of a body without there being more of it: trailers, and
    extensions of chunks."""
    header_s = 20.0
    """From the first byte of a request to the end of its headers; also the time of a TLS handshake."""
    idle_s = 75.0
    """Between two requests of one connection."""
    ahead_bytes = 256 * 1024
    """Of a request that is being read, or of the next ones, before the socket is paused."""
    bodies_bytes = 256 * 1024 * 1024
    """Of bodies that are being read, all together. Beyond it, large ones are refused (503)."""
    linger_s = 5.0
    """How long the rest of a body that nobody wants is read and dropped. Closed at once, the connection would be reset,
    and the client might lose the answer that says why (RFC 9112, 9.6)."""
    close_s = 30.0
    """A client must have read the rest of its answer so long after the connection was closed on our side."""
    sweep_s = 1.0
    """How often connections are looked at for the times above."""
    connections = 20_000
    """All together; a further one is closed at once."""


def connections_allowed(most: int) -> int:
    """So many connections, or fewer where this process may not open enough files: some are left for engines, the store
    and logs."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return most if files == resource.RLIM_INFINITY else min(most, max(64, files - 1024))


class HttpServer:
    """Serves a bound socket with `handler`, which gets an `Exchange` per request."""

    def __init__(self, handler: Handler, *, limits: Limits | None = None) -> None:
        self.handler = handler
        self.limits = limits or Limits()
        self.limits.connections = connections_allowed(self.limits.connections)
        self.connections: set[_Connection] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        """One for each request that is being answered; the loop itself keeps no strong reference."""
        self.leaving = False
        """Whether each answer asks its client to come back on another connection: this server is about to stop."""
        self.stopping = False
        self.bodies = 0
        """Bytes of bodies that are being read."""
        self._server: asyncio.Server | None = None
        self._sweeper: asyncio.TimerHandle | None = None

    async def start(self, listener: Any, *, backlog: int = 4096, tls: ssl.SSLContext | None = None) -> None:
        """Listen on the socket `listener`."""
        loop = asyncio.get_running_loop()
        options: dict[str, Any] = {"ssl_handshake_timeout": self.limits.header_s} if tls is not None else {}
        self._server = await loop.create_server(
            lambda: _Connection(self), sock=listener, backlog=backlog, ssl=tls, **options
        )
        self._sweep()

    async def stop(self, grace: float) -> bool:
        """Take no new connection and let requests end for `grace` seconds; False if some had not by then.

        Those still run: end what they wait for, and call it again.
        """
        self.stopping = True
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.close_if_idle()
        if self.tasks:
            await asyncio.wait(self.tasks, timeout=grace)
        return not self.tasks

    def abort(self) -> None:
        """Drop every connection."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in list(self.connections):
            connection.abort()
        for task in list(self.tasks):
            task.cancel()

    def _sweep(self) -> None:
        """Close what has been idle, or slow with its headers, for too long. One timer for all connections: one timer
        each would be set and cancelled with every request."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self.connections):
            connection.close_if_late(now)
        self._sweeper = loop.call_later(self.limits.sweep_s, self._sweep)


class _TooLarge(Exception):
    """The head of a request is."""


class _Connection(asyncio.Protocol):
    """One client's connection: requests in, one after the other."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._limits = server.limits
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._request: Request | None = None
        self._exchange: Exchange | None = None
        """The one that is being answered, or whose body is still being read."""
        self._waiting: list[Exchange] = []
        """Pipelined: read, but not yet begun."""
        self._since = self._loop.time()
        """When the connection became idle, or the request that is being read began."""
        self._head_bytes = 0
        """Of the request line and the headers that were read."""
        self._idle_bytes = 0
        """Received since a head, a part of a body, or a request was complete."""
        self._ahead = 0
        self._read_paused = False
        self._write_paused = False
        self._broken = False
        """What comes is not read any more."""
        self._lingers = False

    # The server's

    def close_if_idle(self) -> None:
        if self._exchange is None and self._request is None and self._transport is not None:
            self._transport.close()

    def close_if_late(self, now: float) -> None:
        if self._exchange is not None or self._transport is None:
            return
        if self._transport.is_closing():
            if now - self._since > self._limits.close_s:
                self._transport.abort()
        elif self._lingers:
            if now - self._since > self._limits.linger_s:
                self._transport.close()
        elif self._request is None:
            if now - self._since > self._limits.idle_s:
                self._since = now
                self._transport.close()
        elif now - self._since > self._limits.header_s:
            self._refuse(408, b"The headers of the request did not arrive in time.")

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    # The exchange's

    @property
    def closing(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    @property
    def write_paused(self) -> bool:
        return self._write_paused

    @property
    def certificate(self) -> dict[str, Any] | None:
        """The client's certificate, as `ssl.SSLSocket.getpeercert` has it; None without one."""
        if self._transport is None:
            return None
        tls = self._transport.get_extra_info("ssl_object")
        return None if tls is None else (tls.getpeercert() or None)

    def send(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def taken(self, exchange: Exchange, size: int) -> None:
        """The exchange has read `size` bytes of its body."""
        self._ahead -= size
        if self._read_paused and self._ahead < self._limits.ahead_bytes and self._transport is not None:
            self._read_paused = False
            self._transport.resume_reading()

    def hold(self, size: int) -> bool:
        """The memory of bodies grows by `size` bytes; False if it is too much."""
        self._server.bodies += size
        return self._server.bodies <= self._limits.bodies_bytes

    def over(self, exchange: Exchange, *, keep: bool) -> None:
        """The answer is complete."""
        if self._exchange is not exchange:
            return
        self._exchange = None
        self._since = self._loop.time()
        if not keep or self._server.stopping or self._broken:
            self._end()
        elif self._waiting and not self._write_paused:
            self._begin(self._waiting.pop(0))

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are not asyncio.Transport's children; both set TCP_NODELAY.
        self._transport = cast(asyncio.Transport, transport)
        if self._server.stopping or len(self._server.connections) >= self._limits.connections:
            self._transport.abort()
            return
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._transport = None
        self._broken = True
        self._waiting.clear()
        # It holds us, and no cycle is to be left for the collector. Nothing is parsed any more.
        self._parser = cast(httptools.HttpRequestParser, None)
        if self._exchange is not None:
            self._exchange.client_left()

    def data_received(self, data: bytes) -> None:
        if self._broken or self._lingers:
            return
        if self._request is None and self._exchange is None and not self._waiting:
            self._since = self._loop.time()
        self._idle_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # `Upgrade: h2c` or a WebSocket: we answer in HTTP/1.1, as one may, and speak no more on this connection.
            self._broken = True
        except httptools.HttpParserError as error:
            if isinstance(error.__context__, _TooLarge):
                self._refuse(431, b"The headers of the request are too large.")
                return
            self._refuse(400, f"This is not an HTTP/1.1 request: {error}".encode())
        else:
            # Counted here, since httptools keeps a header to itself until its end.
            if self._idle_bytes > self._limits.header_bytes:
                if self._in_head():
                    self._refuse(431, b"The headers of the request are too large.")
                else:
                    self._refuse(400, b"The trailers of the request, or what is between its chunks, are too large.")

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        if self._exchange is not None:
            self._exchange.wake()
        elif self._waiting:
            self._begin(self._waiting.pop(0))

    # httptools

    def on_message_begin(self) -> None:
        self._request = Request()

    def on_url(self, url: bytes) -> None:
        assert self._request is not None
        self._request.target += url
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        assert self._request is not None
        if self._request.exchange is not None:
            # A trailer: the headers have been acted on already.
            return
        self._request.add_header(name.lower(), value)
        self._head_bytes += len(name) + len(value) + 4

    def on_headers_complete(self) -> None:
        request, parser = self._request, self._parser
        assert request is not None
        request.method = parser.get_method().decode("ascii", "replace")
        request.http10 = parser.get_http_version() == "1.0"
        request.keep_alive = parser.should_keep_alive() and not parser.should_upgrade() and not self._server.leaving
        head_bytes, self._head_bytes, self._idle_bytes = self._head_bytes, 0, 0
        if head_bytes > self._limits.header_bytes:
            raise _TooLarge
        exchange = Exchange(request, self, self._loop)
        request.exchange = exchange
        # A client that does not read its answers gets no further ones: they would pile up here.
        if self._exchange is None and not self._waiting and not self._write_paused:
            self._begin(exchange)
        else:
            self._waiting.append(exchange)

    def on_body(self, body: bytes) -> None:
        assert self._request is not None
        assert self._request.exchange is not None
        self._idle_bytes = 0
        self._ahead += len(body)
        self._request.exchange.add(body)
        if self._ahead > self._limits.ahead_bytes and not self._read_paused and self._transport is not None:
            self._read_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        assert self._request is not None
        assert self._request.exchange is not None
        self._idle_bytes = 0
        self._request.exchange.complete()
        self._request = None
        if len(self._waiting) > 64:
            self._refuse(400, b"Too many requests were sent before an answer was read.")

    def _in_head(self) -> bool:
        return self._request is None or self._request.exchange is None

    def _begin(self, exchange: Exchange) -> None:
        self._exchange = exchange
        task = self._loop.create_task(self._handle(exchange))
        self._server.tasks.add(task)
        task.add_done_callback(self._server.tasks.discard)

    async def _handle(self, exchange: Exchange) -> None:
        try:
            await self._server.handler(exchange)
        except Exception:  # the boundary: the handler answers its own errors, so this is a fault of ours
            log.exception("the answer to %s %s broke", exchange.method, exchange.path)
        finally:
            exchange.finish()

    def _end(self) -> None:
        """Close the connection when all is written; and read on for a while if the client is still sending."""
        self._waiting.clear()
        if self._transport is None or self._transport.is_closing():
            return
        if self._request is None or self._broken or not self._transport.can_write_eof():
            self._transport.close()
            return
        self._lingers = True
        self._transport.write_eof()
        if self._read_paused:
            self._read_paused = False
            self._transport.resume_reading()

    def _refuse(self, status: int, message: bytes) -> None:
        """Answer what is no request, unless another answer is on its way, and close."""
        self._broken = True
        if self._transport is None or self._exchange is not None:
            # The answer that is on its way ends first; `over` closes.
            if self._request is not None and self._request.exchange is not None:
                self._request.exchange.spoil(ApiError(status, message.decode("utf-8", "replace")))
            return
        self._transport.write(
            b"%s\r\ndate: %s\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
            % (status_line(status), http_date(), len(message), message)
        )
        self._transport.close()
