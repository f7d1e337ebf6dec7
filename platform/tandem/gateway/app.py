"""The HTTP side: a plain ASGI application, without a framework between a token and its socket."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from tandem.gateway.answer import Piece
from tandem.gateway.errors import ApiError
from tandem.gateway.pages import Pages
from tandem.gateway.service import ClientLeft, Endpoint, Run, Service, Step
from tandem.gateway.wire import error_event

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

log = logging.getLogger(__name__)

JSON: tuple[bytes, bytes] = (b"content-type", b"application/json")
EVENTS: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
BODY_TIMEOUT_S = 60.0
"""A client must have sent its body by then."""
SLOW_READER_S = 10.0
"""Grace beyond a request's own deadline for a client that reads its answer slowly."""
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")

GENERATE = {"/v1/chat/completions": Endpoint.CHAT, "/v1/completions": Endpoint.COMPLETIONS}


class App:
    """ASGI entry point of one gateway replica."""

    def __init__(self, service: Service, pages: Pages) -> None:
        self._service = service
        self._pages = pages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        exchange = _Exchange(scope, receive, send)
        endpoint = GENERATE.get(scope["path"])
        try:
            if endpoint is None:
                status, kind, body = self._pages.get(scope["method"], scope["path"])
                await exchange.reply(status, body, [(b"content-type", kind)])
            elif scope["method"] != "POST":
                raise ApiError(405, f"Not allowed to {scope['method']} on {scope['path']}; use POST.")
            else:
                await self._generate(exchange, endpoint)
        except ApiError as error:
            await exchange.fail(error)
        except Exception:  # the boundary: whatever is wrong here, the client gets an answer and we a traceback
            log.exception("request %s on %s broke", exchange.request_id.decode(), scope["path"])
            message = "The server had an error while processing your request."
            await exchange.fail(ApiError(500, message, type="server_error", code="internal_error"))

    async def _generate(self, exchange: _Exchange, endpoint: Endpoint) -> None:
        metrics = self._service.metrics
        arrived = asyncio.get_running_loop().time()
        outcome = "internal_error"
        metrics.in_flight.inc()
        try:
            await self._answer(exchange, endpoint, arrived)
            outcome = "ok"
        except ApiError as error:
            outcome = error.code or error.type
            raise
        except ClientLeft:
            outcome = "client_gone"
        finally:
            metrics.in_flight.dec()
            metrics.requests.labels(endpoint.value, outcome).inc()
            metrics.duration.labels(endpoint.value).observe(asyncio.get_running_loop().time() - arrived)

    async def _answer(self, exchange: _Exchange, endpoint: Endpoint, arrived: float) -> None:
        body = await exchange.read(self._service.config.max_body_bytes)
        prepared = await self._service.prepare(endpoint, body)
        run = self._service.submit(prepared, arrived)
        watcher = asyncio.create_task(exchange.until_gone(run.leave))
        try:
            async with asyncio.timeout(self._service.config.request_timeout_s + SLOW_READER_S):
                if prepared.wanted.stream:
                    await _stream(exchange, run)
                else:
                    await _whole(exchange, run)
        except TimeoutError:
            # Only a client that does not read gets here: the pair table ends everything else in time.
            raise ClientLeft from None
        finally:
            watcher.cancel()
            run.leave()


async def _stream(exchange: _Exchange, run: Run) -> None:
    # Until there is a first token a failure can still have its own status.
    step = await run.step()
    await exchange.start(200, EVENTS)
    opening = run.writer.first()
    while True:
        data = opening + run.writer.piece(step.piece)
        opening = b""
        if step.reason is not None and step.usage is not None:
            await exchange.write(data + run.writer.last(step.reason, step.usage), more=False)
            return
        if data:
            await exchange.write(data)
        step = await run.step()


async def _whole(exchange: _Exchange, run: Run) -> None:
    steps: list[Step] = []
    while True:
        step = await run.step()
        steps.append(step)
        if step.reason is not None and step.usage is not None:
            break
    piece = Piece(
        "".join(s.piece.reasoning for s in steps),
        "".join(s.piece.content for s in steps),
        [token for s in steps for token in s.piece.ids],
    )
    await exchange.reply(200, run.writer.whole(piece, step.reason, step.usage), [JSON])


class _Exchange:
    """One HTTP request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._headers: Headers = scope["headers"]
        self._receive = receive
        self._send = send
        self._started = False
        asked = self._header(b"x-request-id") or b""
        self.request_id = asked if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex.encode()

    async def read(self, limit: int) -> bytes:
        """The body, at most `limit` bytes. Raises ApiError."""
        encoding = self._header(b"content-encoding")
        if encoding not in (None, b"", b"identity"):
            raise ApiError(415, "Compressed bodies are not supported: send the JSON as it is.")
        length = self._header(b"content-length")
        if length is not None and length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientLeft
                    piece = message.get("body", b"")
                    size += len(piece)
                    if size > limit:
                        raise _too_large(limit)
                    pieces.append(piece)
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            raise ApiError(408, f"The body did not arrive within {BODY_TIMEOUT_S:g} s.", code="timeout") from None

    async def until_gone(self, then: Callable[[], None]) -> None:
        """Wait for the client to leave, then call `then`."""
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                then()
                return

    async def start(self, status: int, headers: Headers) -> None:
        self._started = True
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [*headers, (b"x-request-id", self.request_id)],
            }
        )

    async def write(self, body: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def reply(self, status: int, body: bytes, headers: Headers) -> None:
        await self.start(status, [*headers, (b"content-length", str(len(body)).encode())])
        await self.write(body, more=False)

    async def fail(self, error: ApiError) -> None:
        """Tell the client of an error, in a stream that has begun as an event (and no `[DONE]`: it is not done)."""
        if self._started:
            await self.write(error_event(error), more=False)
            return
        headers = [JSON, *error.headers()]
        if error.status in (408, 413):
            # The rest of the body is not read.
            headers.append((b"connection", b"close"))
        await self.reply(error.status, error.body(), headers)

    def _header(self, name: bytes) -> bytes | None:
        return next((value for key, value in self._headers if key == name), None)


def _too_large(limit: int) -> ApiError:
    return ApiError(413, f"The body is larger than {limit} bytes.", code="body_too_large")
