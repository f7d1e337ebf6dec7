"""One HTTP request and its answer, as the endpoints see them."""

from __future__ import annotations

import asyncio
import http
import re
import time
import uuid
from collections.abc import Callable, Iterable
from email.utils import formatdate
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

from tandem.gateway.errors import ApiError

Headers = Iterable[tuple[bytes, bytes]]

BODY_TIMEOUT_S = 60.0
"""A client must have sent its body by then."""
SMALL_BODY = 256 * 1024
"""Bytes; so much of a body is always read, however many others are."""
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")
_NO_BODY = frozenset({"GET", "HEAD", "DELETE", "OPTIONS"})
_STATUS = {status.value: f"HTTP/1.1 {status.value} {status.phrase}".encode() for status in http.HTTPStatus}


class ClientLeft(Exception):
    """The client has gone: there is nobody to answer."""


class Connection(Protocol):
    """What an exchange needs of the connection that it came over."""

    @property
    def closing(self) -> bool: ...
    @property
    def write_paused(self) -> bool: ...
    @property
    def certificate(self) -> dict[str, Any] | None: ...
    def send(self, data: bytes) -> None: ...
    def taken(self, exchange: Exchange, size: int) -> None: ...
    def hold(self, size: int) -> bool: ...
    def over(self, exchange: Exchange, *, keep: bool) -> None: ...


class Request:
    """The head of a request as it is read."""

    __slots__ = ("exchange", "headers", "http10", "keep_alive", "method", "target")

    def __init__(self) -> None:
        self.method = ""
        self.target = b""
        self.headers: dict[bytes, bytes] = {}
        self.http10 = False
        self.keep_alive = True
        self.exchange: Exchange | None = None

    def add_header(self, name: bytes, value: bytes) -> None:
        """Names are in small letters; a header that comes twice is one with a comma, as RFC 9110 has it."""
        before = self.headers.get(name)
        self.headers[name] = value if before is None else before + b", " + value


class Exchange:
    """One request and its answer: `read` the body, then `reply` at once, or `start`, `write` … and `end`."""

    def __init__(self, request: Request, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        self.method = request.method
        self.headers = request.headers
        path, _, self.query = request.target.partition(b"?")
        if b"%" in path:
            path = unquote_to_bytes(path)
        self.path = path.decode("utf-8", "replace")
        asked = request.headers.get(b"x-request-id", b"")
        self.request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex.encode()
        self.arrived = loop.time()
        self.started = False
        """The status has left; an error can only be told within the body now."""
        self._http10 = request.http10
        self._keep_alive = request.keep_alive
        self._connection = connection
        self._loop = loop
        # One buffer: a list of the pieces would take many times the memory of a body that comes in tiny chunks.
        self._body = bytearray()
        self._size = 0
        """Of the body, not yet told to the connection as taken."""
        self._held = 0
        """What the connection was told of the body's memory."""
        self._crowded = False
        self._spoiled: ApiError | None = None
        self._complete = False
        self._over = False
        self._head = b""
        self._chunked = False
        self._left = False
        self._on_left: Callable[[], object] | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def certificate(self) -> dict[str, Any] | None:
        """The client's TLS certificate, as `ssl.SSLSocket.getpeercert` has it; None without one."""
        return self._connection.certificate

    async def read(self, limit: int) -> bytes:
        """The body, at most `limit` bytes. Raises ApiError, ClientLeft."""
        if self.headers.get(b"content-encoding", b"identity").lower() not in (b"", b"identity"):
            raise ApiError(415, "Compressed bodies are not supported: send the JSON as it is.")
        length = self.headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        if not self._complete and self.headers.get(b"expect", b"").lower() == b"100-continue":
            self._connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        timer = None
        expired: list[bool] = []
        try:
            while True:
                self._take()
                if len(self._body) > limit:
                    raise _too_large(limit)
                if self._crowded and len(self._body) > SMALL_BODY:
                    message = "The gateway is reading too many large bodies at once. Try again shortly."
                    raise ApiError(503, message, type="server_error", code="overloaded", retry_after=1.0)
                if self._complete:
                    body = bytes(self._body)
                    self._drop()
                    return body
                if self._spoiled is not None:
                    raise self._spoiled
                if self._left:
                    raise ClientLeft
                if expired:
                    message = f"The body did not arrive within {BODY_TIMEOUT_S:g} s."
                    raise ApiError(408, message, code="timeout")
                if timer is None:
                    timer = self._loop.call_later(BODY_TIMEOUT_S, self._expire, expired)
                await self._wait()
        finally:
            if timer is not None:
                timer.cancel()

    def when_left(self, then: Callable[[], object]) -> None:
        """Have `then` called when the client leaves before its answer is complete; at once if it has."""
        self._on_left = then
        if self._left:
            then()

    def start(self, status: int, headers: Headers) -> None:
        """The head of an answer whose length is not known. It leaves with the first `write`."""
        self._chunked = not self._http10
        self._head = self._make_head(status, headers, b"transfer-encoding: chunked\r\n" if self._chunked else b"")
        self._keep_alive = self._keep_alive and self._chunked

    def push(self, data: bytes) -> None:
        """A part of the answer, not empty, whether or not the client reads it."""
        if self._chunked:
            data = b"%s%x\r\n%s\r\n" % (self._head, len(data), data)
        elif self._head:
            data = self._head + data
        self._head = b""
        self.started = True
        self._connection.send(data)

    def remark(self, data: bytes) -> None:
        """`push` what may be left out: nothing while the client reads slowly."""
        if not self._connection.write_paused and not self._connection.closing:
            self.push(data)

    async def write(self, data: bytes) -> None:
        """`push`, then wait while the client reads slowly. Raises ClientLeft when it has gone."""
        if self._connection.closing:
            raise ClientLeft
        self.push(data)
        while self._connection.write_paused:
            if self._left:
                raise ClientLeft
            await self._wait()

    def end(self, data: bytes = b"") -> None:
        """The last part of the answer; the connection holds it until the client has read it."""
        if self._over:
            return
        self._over = True
        self.started = True
        if self._chunked:
            last = b"%x\r\n%s\r\n" % (len(data), data) if data else b""
            data = self._head + last + b"0\r\n\r\n"
        else:
            data = self._head + data
        self._connection.send(data)
        self._drop()
        self._connection.over(self, keep=self._keep_alive and self._complete)

    def reply(self, status: int, body: bytes, headers: Headers, *, close: bool = False) -> None:
        """A whole answer."""
        self._chunked = False  # a stream may have been meant
        self._keep_alive = self._keep_alive and not close
        self._head = self._make_head(status, headers, b"content-length: %d\r\n" % len(body))
        self.end(b"" if self.method == "HEAD" else body)

    def finish(self) -> None:
        """The handler has returned. An answer that it left open is cut: the client shall see that it is not whole."""
        if not self._over:
            self._over = True
            self._drop()
            self._connection.over(self, keep=False)

    # The connection's

    def add(self, body: bytes) -> None:
        if not self._over:
            self._body += body
            self._size += len(body)
            self.wake()
        else:
            # Nobody will read it.
            self._connection.taken(self, len(body))

    def complete(self) -> None:
        self._complete = True
        self.wake()

    def spoil(self, error: ApiError) -> None:
        """What comes of the body is none: there will be no more of it."""
        self._spoiled = error
        self.wake()

    def client_left(self) -> None:
        if self._over:
            return
        self._left = True
        self.wake()
        if self._on_left is not None:
            self._on_left()

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _take(self) -> None:
        size, self._size = self._size, 0
        if size:
            self._held += size
            self._crowded = not self._connection.hold(size)
            self._connection.taken(self, size)

    def _drop(self) -> None:
        """What was not read of the body will not be; or the next request would wait for room for ever."""
        self._take()
        self._connection.hold(-self._held)
        self._held, self._body = 0, bytearray()

    def _expire(self, expired: list[bool]) -> None:
        expired.append(True)
        self.wake()

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _make_head(self, status: int, headers: Headers, framing: bytes) -> bytes:
        lines = b"".join([b"%s: %s\r\n" % header for header in headers])
        close = b"" if self._keep_alive and (self._complete or self.method in _NO_BODY) else b"connection: close\r\n"
        if close:
            self._keep_alive = False
        elif self._http10:
            close = b"connection: keep-alive\r\n"
        return b"%s\r\ndate: %s\r\n%s%s%sx-request-id: %s\r\n\r\n" % (
            status_line(status),
            http_date(),
            lines,
            framing,
            close,
            self.request_id,
        )


def status_line(status: int) -> bytes:
    """The first line of an answer, without its line end."""
    return _STATUS.get(status) or b"HTTP/1.1 %d" % status


_date: tuple[int, bytes] = (0, b"")


def http_date() -> bytes:
    """The value of the `date` header; made once a second."""
    global _date
    now = int(time.time())
    if now != _date[0]:
        _date = (now, formatdate(now, usegmt=True).encode())
    return _date[1]


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than {limit} bytes.", code="body_too_large")
