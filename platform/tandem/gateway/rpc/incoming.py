"""The request of a gRPC call: received when it is known who calls, and bounded over all calls together.

How large a message is nobody can tell before it is complete: gRPC keeps its pieces to itself. But those of a usual size
are complete as soon as they are looked for. So what bounds the memory is how many others may be on their way at once.
gRPC takes no more than its window (64 KiB) of a message that is not yet read.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
from collections.abc import Callable
from typing import Any, Protocol, cast

import grpc
from google.protobuf.message import DecodeError, Message

from tandem.gateway.errors import ApiError
from tandem.gateway.http.exchange import BODY_TIMEOUT_S
from tandem.gateway.http.server import Limits
from tandem.gateway.rpc.translate import Body

LATE_S = 0.5
"""A message that is not complete after this is a large one, or a slow client's."""
_TRIM_S = 1.0
"""After the end of a late message; those of others are mostly over by then."""
_Context = grpc.aio.ServicerContext[Any, Any]


class Request(Protocol):
    """What every request message has."""

    @property
    def options(self) -> Any: ...


class _Wait:
    """For one message."""

    __slots__ = ("given_up", "limit", "since")

    def __init__(self, since: float, limit: asyncio.Timeout) -> None:
        self.since = since
        self.limit = limit
        self.given_up = False


class Receiving:
    """The messages that are on their way, of all calls. Belongs to one event loop."""

    def __init__(self, max_request_bytes: int, *, bodies_bytes: int = Limits.bodies_bytes) -> None:
        """`bodies_bytes`: what all of them may take together, when they are half there on average."""
        self.limit = max(4, 2 * bodies_bytes // max_request_bytes)
        """So many may be late; with a further one the oldest is given up."""
        self._waits: dict[_Wait, None] = {}
        """By their age, the oldest first."""
        self._timer: asyncio.TimerHandle | None = None
        self._trimming: asyncio.TimerHandle | None = None

    async def message(self, context: _Context) -> bytes:
        """The call's request. Raises ApiError."""
        loop = asyncio.get_running_loop()
        wait = None
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S) as limit:
                wait = _Wait(loop.time(), limit)
                self._waits[wait] = None
                self._arm(loop)
                data = await context.read()
        except TimeoutError:
            if wait is not None and wait.given_up:
                message = "The gateway is receiving too many large requests at once. Please try again in 1s."
                raise ApiError(429, message, type="requests", code="overloaded", retry_after=1.0) from None
            message = f"The request did not arrive within {BODY_TIMEOUT_S:g} s."
            raise ApiError(408, message, code="timeout") from None
        finally:
            if wait is not None:
                self._waits.pop(wait, None)
                if loop.time() - wait.since >= LATE_S and self._trimming is None:
                    self._trimming = loop.call_later(_TRIM_S, self._trim, loop)
        if data is grpc.aio.EOF:  # type: ignore[attr-defined]  # the stubs lack it
            raise ApiError(400, "The call has no request message.", code="invalid_request")
        return cast(bytes, data)

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look again when one too many can be late."""
        if self._timer is None and len(self._waits) > self.limit:
            last = next(itertools.islice(self._waits, self.limit, None))
            self._timer = loop.call_at(last.since + LATE_S, self._give_up, loop)

    def _give_up(self, loop: asyncio.AbstractEventLoop) -> None:
        """Of those that are late, the oldest: who never sends the rest must not keep others from sending theirs."""
        self._timer = None
        now = loop.time()
        late = [wait for wait in self._waits if wait.since + LATE_S <= now]
        for wait in late[: max(0, len(late) - self.limit)]:
            wait.given_up = True
            wait.limit.reschedule(now)
            del self._waits[wait]
        self._arm(loop)

    def _trim(self, loop: asyncio.AbstractEventLoop) -> None:
        """gRPC has a large message in thousands of small blocks, and what was freed of them stays with the process."""
        self._trimming = None
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:  # another C library than glibc has none
            loop.run_in_executor(None, trim, 0)


class Incoming:
    """One call's request: `receive` it, then `body` is what it asks for."""

    def __init__(
        self, receiving: Receiving, context: _Context, kind: type[Message], body_of: Callable[[Any], Body]
    ) -> None:
        """`kind`: the message's type; `body_of` makes the HTTP API's body of one, and raises ApiError."""
        self.wants_ids = False
        """Whether token ids are to be told; known with the body."""
        self._receiving = receiving
        self._context = context
        self._kind = kind
        self._body_of = body_of
        self._data = b""

    async def receive(self) -> int:
        """Wait for all of it, and return its size in bytes. Raises ApiError."""
        self._data = await self._receiving.message(self._context)
        return len(self._data)

    def body(self) -> Body:
        """The HTTP API's body that says the same. Takes 30 ms and more for megabytes. Raises ApiError."""
        data, self._data = self._data, b""
        try:
            request = self._kind.FromString(data)
        except DecodeError as error:
            name = self._kind.DESCRIPTOR.full_name
            message = f"The request is not a valid {name}: {error}. Is it made from the same .proto?"
            raise ApiError(400, message, code="invalid_request") from error
        self.wants_ids = cast(Request, request).options.return_token_ids
        return self._body_of(request)
