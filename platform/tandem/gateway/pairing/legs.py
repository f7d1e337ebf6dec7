"""One leg of a pair: sends a request to one engine, takes its stream in as it arrives, and sees to its end.

No task runs for a leg while tokens come: the connection calls, the table hears of it, and the reply is woken.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine
from typing import Any, Protocol

from tandem.core.pair_events import (
    Event,
    Failure,
    FailureKind,
    LegAccepted,
    LegClosed,
    LegFailed,
    LegFinished,
    LegTokens,
)
from tandem.core.routing import Target
from tandem.core.types import Role
from tandem.engine.client import Ended, EngineClient, EngineError, TokenStream, from_http, from_status
from tandem.engine.http1 import HttpFailure, Response
from tandem.gateway.observe.tracing import LegTrace
from tandem.gateway.pairing.ticket import Ticket

log = logging.getLogger(__name__)

ABORT_TRIES = 4
ABORT_WAIT_S = 0.5
"""After an abort the engine ends the stream itself. One that does not within this time may not have known the request
yet (SGLang forgets an abort that overtakes its request): it is told again, and in the end the connection is closed.
SGLang looks for closed connections every few seconds, and then aborts by itself."""
DRAIN_S = 1.0
"""What follows the last token (`[DONE]`) must come so soon, or the connection is not used again."""
ERROR_BYTES = 2**20
UNNAMED = "default"
"""What SGLang calls weights of which it was told no version."""


def outcome_of(event: Event) -> str:
    """How a leg that reports this has ended, for metrics and traces."""
    if isinstance(event, LegFailed):
        return event.failure.kind.value
    return "ok" if isinstance(event, LegFinished) else "aborted"


class LegOwner(Protocol):
    """What a leg reports to."""

    tasks: set[asyncio.Task[None]]

    def tell(self, event: Event) -> None: ...
    def leg_ended(self, leg: Leg, ended: Ended) -> None: ...
    def leg_over(self, leg: Leg, event: Event, seconds: float) -> None: ...


class Leg:
    """One request on one engine. It reports exactly one of LegFinished, LegFailed and LegClosed, then is over."""

    def __init__(
        self,
        owner: LegOwner,
        client: EngineClient,
        room: int,
        role: Role,
        target: Target,
        rid: str,
        body: bytes,
        ticket: Ticket,
        trace: LegTrace | None = None,
    ) -> None:
        self.room = room
        self.role = role
        self.target = target
        self.ticket = ticket
        self._owner = owner
        self._client = client
        self._url = target.url
        self._rid = rid
        self._body = body
        self._trace = trace
        self._loop = asyncio.get_running_loop()
        self._began = self._loop.time()
        ticket.leg_begun(self._began)
        self._connecting: asyncio.Task[None] | None = None
        self._response: Response | None = None
        self._stream: TokenStream | None = None
        self._weights = ticket.weight_version
        self._refusal = b""
        self._first: int | None = None
        """Prefill's one token."""
        self._reported = False
        self._aborting = False
        self._over = asyncio.Event()

    def start(self) -> None:
        """Send it. Nothing is reported before this returns."""
        try:
            headers = self._trace.headers if self._trace is not None else ()
            response = self._client.request(self._url, self._body, headers)
        except ValueError as error:
            self._loop.call_soon(self._fail, Failure(kind=FailureKind.UNREACHABLE, message=str(error)))
            return
        if isinstance(response, Response):
            self._listen(response)
        else:
            self._connecting = self._task(self._connect(response))

    def abort(self, *, notify: bool) -> None:
        """End it: tell the engine if `notify`, then drop the connection."""
        self._aborting = True
        self._task(self._abort(notify))

    def cut(self) -> None:
        """Drop the connection at once."""
        if self._connecting is not None:
            self._connecting.cancel()
        if not self._reported:
            self._fail(Failure(kind=FailureKind.BROKEN, message="the gateway dropped the connection"))

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._owner.tasks.add(task)
        task.add_done_callback(self._owner.tasks.discard)
        return task

    async def _connect(self, response: Awaitable[Response]) -> None:
        try:
            self._listen(await response)
        except HttpFailure as error:
            self._fail(from_http(error).failure)
        except (OSError, ValueError) as error:
            self._fail(Failure(kind=FailureKind.UNREACHABLE, message=f"{self.target.url} cannot be reached: {error}"))

    def _listen(self, response: Response) -> None:
        self._response = response
        if self._reported:
            response.close()
        else:
            response.listen(self._news)

    def _news(self) -> None:
        """Called by the connection, once for all that has arrived together."""
        if self._reported:
            return
        try:
            self._take()
        except EngineError as error:
            self._fail(error.failure)
        except HttpFailure as error:
            self._fail(from_http(error).failure)
        except Exception as error:  # the boundary to the transport, which would only drop the connection
            log.exception("the %s leg of room %d broke", self.role.value, self.room)
            self._fail(Failure(kind=FailureKind.BROKEN, message=f"internal error in the gateway: {error!r}"))

    def _take(self) -> None:
        response = self._response
        assert response is not None, "it is listened to only after it was made"
        if response.status == 200:
            self._take_tokens(response)
        elif response.status:
            self._refusal += response.take()
            if response.done or response.failure is not None or len(self._refusal) > ERROR_BYTES:
                raise from_status(response.status, self._refusal)
        if response.failure is not None and not self._reported:
            raise response.failure

    def _take_tokens(self, response: Response) -> None:
        # The pair table has deadlines for all of this; the stream needs none of its own.
        if self._stream is None:
            self._stream = TokenStream(response, None)
            self._owner.tell(LegAccepted(room=self.room, role=self.role))
        data = response.take()
        chunk = self._stream.feed(data) if data else None
        if chunk is not None:
            self._check_weights(self._stream.weight_version)
            if chunk.ended is not None:
                self._owner.leg_ended(self, chunk.ended)
            if self.role is Role.PREFILL:
                if self._first is None and chunk.ids:
                    self._first = chunk.ids[0]
            elif chunk.ids:
                if chunk.logprobs is not None:
                    self.ticket.scored.setdefault(self.room, []).extend(chunk.logprobs)
                self._owner.tell(LegTokens(room=self.room, ids=chunk.ids))
            if chunk.failure is not None:
                self._fail(chunk.failure)
                return
            if chunk.ended is not None and not self._reported:
                self._loop.call_later(DRAIN_S, response.close)
                reason = chunk.ended.reason
                self._report(LegFinished(room=self.room, role=self.role, reason=reason, first=self._first))
                return
        if response.done and not self._reported:
            raise TokenStream.unfinished()

    def _check_weights(self, found: str) -> None:
        """A gateway whose view of the fleet is old must not pair two versions. Raises EngineError."""
        if found != self._weights and self._weights and found not in ("", UNNAMED):
            message = f"{self.target.group} has the weights {found!r}, not {self._weights!r}"
            raise EngineError(FailureKind.BAD_KV, message)

    def _fail(self, failure: Failure) -> None:
        """The leg is over, and not well; or it was to be ended."""
        if self._reported:
            return
        if self._response is not None:
            self._response.close()
        if self._aborting:
            self._report(LegClosed(room=self.room, role=self.role))
        else:
            self._report(LegFailed(room=self.room, role=self.role, failure=failure))

    def _report(self, event: Event) -> None:
        self._reported = True
        self._over.set()
        response, self._response = self._response, None
        if response is not None:
            # What still comes is nobody's; and no cycle is to be left for the collector.
            response.listen(None)
        if self._trace is not None:
            self._trace.end(outcome_of(event))
        now = self._loop.time()
        self.ticket.leg_over(self._began, now)
        self._owner.leg_over(self, event, now - self._began)
        self._owner.tell(event)

    async def _abort(self, notify: bool) -> None:
        for _ in range(ABORT_TRIES if notify else 0):
            if self._over.is_set():
                return
            try:
                await self._client.abort(self._url, self._rid, within=1.0)
            except EngineError as error:
                log.warning("could not abort the %s leg of room %d: %s", self.role.value, self.room, error)
                if error.failure.kind is FailureKind.UNREACHABLE:
                    break
            try:
                async with asyncio.timeout(ABORT_WAIT_S):
                    await self._over.wait()
            except TimeoutError:
                continue
        self.cut()
