"""A streaming client of the OpenAI API that notes when each piece arrives."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

import msgspec
import orjson

from tandem.engine.http1 import HttpFailure
from tandem.engine.sse import SseParser


class Answer(Protocol):
    """See `engine.http1.Response`."""

    async def head(self, within: float | None) -> int: ...

    async def chunk(self, within: float | None) -> bytes | None: ...

    async def read(self, within: float) -> bytes: ...

    def close(self) -> None: ...


class Client(Protocol):
    """Who carries a request to the gateway: `engine.http1.Pool`, or `cli.https.GatewayClient` with TLS and a key."""

    async def request(self, method: str, url: str, *, body: bytes = ...) -> Answer: ...


class RequestFailed(Exception):
    """The server refused, or the stream broke; the message is what it said."""

    def __init__(self, message: str, *, status: int = 0) -> None:
        """`status`: of an answer that was an error; 0 = it was none."""
        super().__init__(message)
        self.status = status


class Piece(msgspec.Struct, frozen=True):
    """What one event of a stream added."""

    text: str = ""
    reasoning: str = ""
    token_ids: tuple[int, ...] = ()
    """With `return_token_ids` in the request."""
    usage: dict[str, Any] | None = None
    """In the last event, when asked for with `stream_options.include_usage`."""
    finish_reason: str | None = None


class Timing(msgspec.Struct):
    """One request, timed at the client; seconds."""

    tokens: int = 0
    """Completion tokens, from the server's usage."""
    ttft: float = 0.0
    """Until the first piece."""
    total: float = 0.0

    @property
    def itl(self) -> float:
        """Mean seconds between tokens after the first piece."""
        return (self.total - self.ttft) / (self.tokens - 1) if self.tokens > 1 else 0.0


async def stream(
    client: Client, base: str, path: str, body: dict[str, Any], *, within: float
) -> AsyncGenerator[Piece, None]:
    """POST `body` with `stream: true`; yield the pieces of the answer.

    Args:
        within: seconds for the first byte, and between any two.

    Raises:
        RequestFailed: an error status, an `error` event, or a broken stream.
    """
    wanted = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        response = await client.request("POST", base + path, body=orjson.dumps(wanted))
        try:
            status = await response.head(within)
            if status != 200:
                raise refusal(status, await response.read(within))
            parser = SseParser()
            while (data := await response.chunk(within)) is not None:
                for event in parser.feed(data):
                    if event == b"[DONE]":
                        return
                    yield _piece(orjson.loads(event))
        finally:
            response.close()
    except HttpFailure as error:
        raise RequestFailed(str(error)) from error
    raise RequestFailed("the stream ended without [DONE]")


def refusal(status: int, body: bytes) -> RequestFailed:
    """What an answer with an error status says: OpenAI's message and code, or whatever there is."""
    try:
        error = orjson.loads(body)["error"]
        told = f"{error['message']} ({error['code'] or error['type']})"
    except (ValueError, KeyError, TypeError):
        told = body.decode(errors="replace")
    return RequestFailed(f"HTTP {status}: {told}", status=status)


def _piece(event: dict[str, Any]) -> Piece:
    if "error" in event:
        raise RequestFailed(str(event["error"].get("message", event["error"])))
    choices = event.get("choices") or [{}]  # the event with the usage has none
    delta = choices[0].get("delta") or {}
    return Piece(
        text=choices[0].get("text") or delta.get("content") or "",
        reasoning=delta.get("reasoning_content") or "",
        token_ids=tuple(choices[0].get("token_ids") or ()),
        usage=event.get("usage"),
        finish_reason=choices[0].get("finish_reason"),
    )


async def timed(
    client: Client,
    base: str,
    path: str,
    body: dict[str, Any],
    *,
    within: float = 60.0,
    show: Callable[[Piece], None] = lambda piece: None,
) -> Timing:
    """Run one request to its end; `show` is given each piece as it comes. Raises `RequestFailed`."""
    started = time.perf_counter()
    timing = Timing()
    async for piece in stream(client, base, path, body, within=within):
        now = time.perf_counter() - started
        if not timing.ttft and (piece.text or piece.reasoning):
            timing.ttft = now
        if piece.usage:
            timing.tokens = int(piece.usage["completion_tokens"])
        timing.total = now
        show(piece)
    return timing
