"""The HTTP side: which request goes where, and how its answer goes out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from tandem.core.tenants import ANONYMOUS
from tandem.gateway.answers.answers import Answers
from tandem.gateway.api.wire import Writer
from tandem.gateway.asked import Asked
from tandem.gateway.errors import ApiError
from tandem.gateway.http.endpoints import BY_PATH, Endpoint
from tandem.gateway.http.exchange import ClientLeft, Exchange
from tandem.gateway.http.pages import Pages
from tandem.gateway.pairing.reply import Reply
from tandem.gateway.service import Service
from tandem.gateway.text.answer import Piece

log = logging.getLogger(__name__)

JSON: tuple[bytes, bytes] = (b"content-type", b"application/json")
EVENTS: Sequence[tuple[bytes, bytes]] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
SLOW_READER_S = 10.0
"""Grace beyond a request's own deadline for a client that reads its answer slowly."""
KEEP_ALIVE_S = 10.0
"""A stream in which nothing happens says so as often, that no proxy on the way takes it for dead."""


class App:
    """The handler of one gateway replica's HTTP server."""

    def __init__(self, service: Service, pages: Pages, answers: Answers | None = None) -> None:
        """`answers` keeps those of requests with an idempotency key."""
        self._service = service
        self._answers = answers
        self._pages = pages

    async def __call__(self, exchange: Exchange) -> None:
        endpoint = BY_PATH.get(exchange.path)
        encode = endpoint.error if endpoint is not None else self._pages.error_of(exchange.path)
        try:
            if endpoint is None:
                await self._page(exchange)
            elif exchange.method != "POST":
                raise ApiError(405, f"Not allowed to {exchange.method} on {exchange.path}; use POST.")
            else:
                await self._generate(exchange, endpoint)
        except ClientLeft:
            log.debug("the client of request %s has gone", exchange.request_id.decode())
        except ApiError as error:
            _refuse(exchange, error, encode)
        except Exception:  # the boundary: whatever is wrong here, the client gets an answer and we a traceback
            log.exception("request %s on %s broke", exchange.request_id.decode(), exchange.path)
            _refuse(exchange, _internal(), encode)

    async def _page(self, exchange: Exchange) -> None:
        headers = exchange.headers
        if not self._pages.is_open(exchange.path):
            identity = await self._service.authenticator.identify(headers, exchange.certificate)
            tenant = identity.tenant
        else:
            tenant = ANONYMOUS
        body = b""
        if exchange.method == "POST":
            body = await exchange.read(self._service.config.max_body_bytes)
        status, kind, data = await self._pages.get(exchange.method, exchange.path, body, tenant)
        exchange.reply(status, data, [(b"content-type", kind)])

    async def _generate(self, exchange: Exchange, endpoint: Endpoint) -> None:
        asked = Asked(
            self._service,
            endpoint,
            headers=exchange.headers,
            certificate=exchange.certificate,
            request_id=exchange.request_id.decode(),
            arrived=exchange.arrived,
            answers=self._answers,
        )
        failed: BaseException | None = None
        signs = _Signs(exchange, asked)
        try:
            await asked.identify()
            body = await exchange.read(self._service.config.max_body_bytes)
            task = asyncio.current_task()
            assert task is not None, "a handler runs in a task"
            # While it waits for its turn there is nothing else to end.
            exchange.when_left(task.cancel)
            signs.start()
            try:
                reply = await asked.begin(body)
            except Exception as error:
                if exchange.started:
                    _Stream(exchange, asked, signs).fail(error)
                raise
            # What is kept may outlive its client: `asked` sees to that when it is closed.
            exchange.when_left(asked.leave if asked.kept is None else task.cancel)
            await self._answer(exchange, asked, reply, signs)
        except BaseException as error:
            failed = error
            raise
        finally:
            signs.stop()
            try:
                asked.close(failed)
            finally:
                failed = None  # it holds this frame, and no cycle is to be left for the collector

    async def _answer(self, exchange: Exchange, asked: Asked, reply: Reply, signs: _Signs) -> None:
        try:
            async with asyncio.timeout_at(asked.deadline + SLOW_READER_S):
                if asked.wanted.stream:
                    await _Stream(exchange, asked, signs).run(reply)
                else:
                    await _whole(exchange, asked, reply)
        except TimeoutError:
            # Only a client that does not read gets here: the pair table ends everything else in time.
            raise ClientLeft from None


class _Signs:
    """Signs of life in a stream: while its request waits for its turn, while prefill works, and in mid-stream."""

    def __init__(self, exchange: Exchange, asked: Asked) -> None:
        self._exchange = exchange
        self._asked = asked
        self._loop = asyncio.get_running_loop()
        self._written = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """The request is there; from now on its client waits."""
        self.wrote()
        self._timer = self._loop.call_later(KEEP_ALIVE_S, self._beat)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def wrote(self) -> None:
        """Something else was written, which is a sign as well."""
        self._written = self._loop.time()

    def _beat(self) -> None:
        """Nothing may have been written for a while."""
        now = self._loop.time()
        if now - self._written >= KEEP_ALIVE_S:
            self._written = now
            # Whether it is to be a stream is known when it was read.
            if self._asked.prepared is not None and self._asked.wanted.stream:
                _open(self._exchange, self._asked)
                self._exchange.remark(self._asked.endpoint.keep_alive)
        self._timer = self._loop.call_at(self._written + KEEP_ALIVE_S, self._beat)


class _Stream:
    """Sends a reply as it comes."""

    def __init__(self, exchange: Exchange, asked: Asked, signs: _Signs) -> None:
        self._exchange = exchange
        self._asked = asked
        self._signs = signs
        self._writer: Writer = asked.writer()
        self._opening: bytes | None = self._writer.first()

    async def run(self, reply: Reply) -> None:
        try:
            while await self._step(reply):
                pass
        except ClientLeft:
            raise
        except Exception as error:
            if self._exchange.started:
                self.fail(error)
            raise

    def fail(self, error: Exception) -> None:
        """Tell the error, after the status has left. No `[DONE]`: it is not done."""
        told = error if isinstance(error, ApiError) else _internal()
        # A stream that has said nothing but that it lives still begins as all do.
        opening, self._opening = self._opening or b"", None
        tell: Callable[[ApiError, str], bytes] = getattr(self._writer, "failed", self._asked.endpoint.error_event)
        self._exchange.end(opening + tell(told, self._exchange.request_id.decode()))

    async def _step(self, reply: Reply) -> bool:
        writer = self._writer
        data = b""
        end: bytes | None = None
        for step in await reply.next():
            data += writer.piece(step.index, step.piece)
            last = b"" if step.reason is None else writer.last(step.index, step.reason)
            if step.usage is not None:
                end = last + writer.closing(step.usage)
            else:
                data += last
        # Until there is a first token a failure can still have its own status.
        if self._opening is not None:
            data, self._opening = self._opening + data, None
            _open(self._exchange, self._asked)
        if data:
            self._signs.wrote()
            await self._exchange.write(data)
        if end is None:
            return True
        await self._asked.settle()
        self._exchange.end(end)
        return False


def _open(exchange: Exchange, asked: Asked) -> None:
    """Begin a stream, unless it has begun."""
    if not exchange.started:
        exchange.start(200, [*EVENTS, *asked.headers()])


async def _whole(exchange: Exchange, asked: Asked, reply: Reply) -> None:
    pieces: list[list[Piece]] = [[] for _ in reply.runs]
    reasons = [""] * len(pieces)
    while reply.usage is None:
        for step in await reply.next():
            pieces[step.index].append(step.piece)
            if step.reason is not None:
                reasons[step.index] = step.reason
    choices = [(_joined(found), reason) for found, reason in zip(pieces, reasons, strict=True)]
    body = asked.writer().whole(choices, reply.usage)
    await asked.settle()
    exchange.reply(200, body, [JSON, *asked.headers()])


def _joined(pieces: list[Piece]) -> Piece:
    return Piece(
        "".join(piece.reasoning for piece in pieces),
        "".join(piece.content for piece in pieces),
        [token for piece in pieces for token in piece.ids],
        [delta for piece in pieces for delta in piece.tools],
        [one for piece in pieces for one in piece.logprobs],
    )


def _internal() -> ApiError:
    message = "The server had an error while processing your request."
    return ApiError(500, message, type="server_error", code="internal_error")


def _refuse(exchange: Exchange, error: ApiError, encode: Callable[[ApiError, str], bytes]) -> None:
    """Answer with an error, unless something has been answered already."""
    if exchange.started:
        return
    body = encode(error, exchange.request_id.decode())
    # The rest of a body that is late or too large is not read; and who has not said who he is may send none.
    exchange.reply(error.status, body, [JSON, *error.headers()], close=error.status in (408, 413))
