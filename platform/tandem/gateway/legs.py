"""One leg of a pair: the task that sends a request to one engine, reads its stream, and sees to its end."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Coroutine
from typing import Any, Protocol

import msgspec

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
from tandem.core.routing import Pair
from tandem.core.types import Role
from tandem.engine.client import Ended, EngineClient, EngineError
from tandem.gateway.ticket import Ticket

log = logging.getLogger(__name__)

ABORT_TRIES = 4
ABORT_WAIT_S = 0.5
"""After an abort the engine ends the stream itself. One that does not within this time may not have known the request
yet (SGLang forgets an abort that overtakes its request): it is told again, and in the end the connection is closed."""


class LegOwner(Protocol):
    """What a leg reports to."""

    tasks: set[asyncio.Task[None]]

    def tell(self, event: Event) -> None: ...
    def leg_ended(self, leg: Leg, ended: Ended) -> None: ...
    def leg_failure(self, leg: Leg, failure: Failure) -> None: ...


def common_body(ids: list[int], sampling: dict[str, Any]) -> bytes:
    """The part of a `/generate` body that both legs and all attempts share, made once: all but its opening brace."""
    return msgspec.json.encode({"input_ids": ids, "sampling_params": sampling, "stream": True})[1:]


def leg_body(pair: Pair, role: Role, room: int, common: bytes) -> tuple[str, bytes]:
    """(request id, body) of one leg. Ids are UUIDs: SGLang aborts by prefix, so none may begin another."""
    rid = str(uuid.uuid4())
    head: dict[str, Any] = {
        "rid": rid,
        "bootstrap_host": pair.bootstrap_host,
        "bootstrap_port": pair.bootstrap_port,
        "bootstrap_room": room,
    }
    if pair.target(role).dp_size > 1:
        head["routed_dp_rank"] = pair.target(role).dp_rank
    if pair.prefill.dp_size > 1:
        head["disagg_prefill_dp_rank"] = pair.prefill.dp_rank
    return rid, msgspec.json.encode(head)[:-1] + b"," + common


class Leg:
    """One request on one engine. It reports exactly one of LegFinished, LegFailed and LegClosed, then is over."""

    def __init__(
        self,
        owner: LegOwner,
        client: EngineClient,
        room: int,
        role: Role,
        url: str,
        rid: str,
        body: bytes,
        ticket: Ticket,
    ) -> None:
        self.room = room
        self.role = role
        self.ticket = ticket
        self._owner = owner
        self._client = client
        self._url = url
        self._rid = rid
        self._body = body
        self._reported = False
        self._aborting = False
        self._reader: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._reader = self._task(self._read())
        self._reader.add_done_callback(self._over)

    def abort(self, *, notify: bool) -> None:
        """End it: tell the engine if `notify`, then drop the connection."""
        self._aborting = True
        self._task(self._abort(notify))

    def cut(self) -> None:
        """Drop the connection at once."""
        if self._reader is not None:
            self._reader.cancel()

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._owner.tasks.add(task)
        task.add_done_callback(self._owner.tasks.discard)
        return task

    async def _read(self) -> None:
        # The pair table has deadlines for all of this; the stream needs none of its own.
        stream = await self._client.generate(self._url, self._body, first_byte_s=None)
        try:
            self._owner.tell(LegAccepted(room=self.room, role=self.role))
            async for chunk in stream:
                if chunk.ended is not None:
                    self._owner.leg_ended(self, chunk.ended)
                if self.role is Role.DECODE and chunk.ids:
                    self._owner.tell(LegTokens(room=self.room, ids=chunk.ids))
                if chunk.ended is not None:
                    self._report(LegFinished(room=self.room, role=self.role, reason=chunk.ended.reason))
                    await stream.drain(within=1.0)
        finally:
            stream.close()

    def _over(self, reader: asyncio.Task[None]) -> None:
        """The reader is done, however it came to that."""
        failure: Failure | None = None
        error = None if reader.cancelled() else reader.exception()
        if isinstance(error, EngineError):
            failure = error.failure
        elif error is not None:
            log.error("the %s leg of room %d broke", self.role.value, self.room, exc_info=error)
            failure = Failure(kind=FailureKind.BROKEN, message=f"internal error in the gateway: {error!r}")
        elif not self._aborting:
            failure = Failure(kind=FailureKind.BROKEN, message="the gateway dropped the connection")
        if self._reported:
            return
        if failure is None or self._aborting:
            self._report(LegClosed(room=self.room, role=self.role))
        else:
            self._owner.leg_failure(self, failure)
            self._report(LegFailed(room=self.room, role=self.role, failure=failure))

    def _report(self, event: Event) -> None:
        self._reported = True
        self._owner.tell(event)

    async def _abort(self, notify: bool) -> None:
        reader = self._reader
        assert reader is not None, "a leg is aborted only after it was sent"
        for _ in range(ABORT_TRIES if notify else 0):
            if reader.done():
                return
            try:
                await self._client.abort(self._url, self._rid, within=1.0)
            except EngineError as error:
                log.warning("could not abort the %s leg of room %d: %s", self.role.value, self.room, error)
                if error.failure.kind is FailureKind.UNREACHABLE:
                    break
            await asyncio.wait({reader}, timeout=ABORT_WAIT_S)
        reader.cancel()
