"""Answers that are kept under an idempotency key, for the requests of one gateway."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import msgspec

from tandem.config import IdempotencyConfig
from tandem.core.answers import AnswerState, Standing, answer_name, fingerprint, is_key
from tandem.gateway.answers.entries import encode
from tandem.gateway.answers.journal import Journal, JournalDown
from tandem.gateway.answers.kept import Kept
from tandem.gateway.api.requests import parse_json
from tandem.gateway.errors import ApiError

if TYPE_CHECKING:
    from tandem.gateway.asked import Asked
    from tandem.gateway.service import Body, Service

log = logging.getLogger(__name__)

HEADER = b"idempotency-key"
LET_GO_S = 30.0
CLOSE_S = 3.0
"""How long a gateway that stops takes to let its answers go."""


class Answers:
    """Belongs to the event loop that it was made on."""

    def __init__(self, service: Service, journal: Journal, config: IdempotencyConfig) -> None:
        self.service = service
        self.orphan_s = config.orphan_s
        self.closing = False
        self._journal = journal
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._finishing: set[asyncio.Task[None]] = set()
        self._followers: dict[asyncio.Task[None], Kept] = {}
        self._away = False

    async def claim(self, asked: Asked, key: bytes, body: Body) -> Kept | None:
        """The request's hold on the answer of its key; None if the journal is away, and it is served without.

        Raises ApiError: 400 for a key that is none, 422 for one of another request.
        """
        if not is_key(key):
            message = "The Idempotency-Key must have 1 to 255 printable characters of ASCII."
            raise ApiError(400, message, code="invalid_idempotency_key")
        tenant, size = asked.identity.tenant.name, len(body) if isinstance(body, bytes) else 0
        printed = await self.service.lanes.work(tenant, size, lambda: _fingerprint(asked, body))
        name, owner = answer_name(tenant, key), f"{self.service.driver.incarnation}:{next(self._numbers)}"
        try:
            claim = await self._journal.claim(
                name, tenant=tenant, fingerprint=printed, number=asked.number, created=asked.created, owner=owner
            )
        except asyncio.CancelledError:
            self.finish(self._let_go(name, owner))
            raise
        except JournalDown as error:
            if error.sent:
                self.finish(self._let_go(name, owner))
            if not self._away:
                log.warning("idempotency keys are not honoured now: %s", error)
            self._away = True
            return None
        self._away = False
        if claim.standing is Standing.MISMATCH:
            message = (
                "This Idempotency-Key was used for another request. "
                "Use a new key for each request, and the same one only to send the very same request again."
            )
            raise ApiError(422, message, code="idempotency_key_reused")
        try:
            return Kept(self, self._journal, name, owner, claim)
        except msgspec.MsgspecError as error:
            # A gateway of another version has written it.
            log.warning("the answer %s cannot be read, the request is served anew: %s", claim.number, error)
            self.finish(self._let_go(name, owner))
            return None

    async def _let_go(self, name: str, owner: str) -> None:
        """It may be the owner's, who will not work on it: nobody is to wait for that."""
        until = asyncio.get_running_loop().time() + LET_GO_S
        while asyncio.get_running_loop().time() < until:
            try:
                await self._journal.append(name, owner=owner, place=1, entry=encode([]), state=AnswerState.FREE)
                return
            except JournalDown as error:
                log.debug("could not let go of an answer: %s", error)
            await asyncio.sleep(1.0)

    def withdraw(self) -> None:
        """The gateway stops: end what only follows."""
        self.closing = True
        for kept in self._followers.values():
            kept.withdraw()

    async def close(self) -> None:
        """Let go of all answers, so that other gateways can go on with them."""
        self.withdraw()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)
        if self._finishing:
            await asyncio.wait(self._finishing, timeout=CLOSE_S)
        for task in list(self._finishing):
            task.cancel()
        if self._finishing:
            await asyncio.wait(self._finishing, timeout=CLOSE_S)
        await self._journal.close()

    # For `Kept`

    def follow(self, work: Coroutine[Any, Any, None], kept: Kept) -> asyncio.Task[None]:
        """Do it for as long as the request is there."""
        task = self.go(work)
        self._followers[task] = kept
        task.add_done_callback(lambda done: self._followers.pop(done, None))
        return task

    def go(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return _keep(self._tasks, work)

    def finish(self, work: Coroutine[Any, Any, None]) -> None:
        """Do it to its end, also when the gateway stops."""
        _keep(self._finishing, work)


def _keep(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    # The loop itself keeps no strong reference.
    task = asyncio.create_task(work, name="kept-answer")
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


def _fingerprint(asked: Asked, body: Body) -> str:
    return fingerprint(asked.endpoint.name, parse_json(body) if isinstance(body, bytes) else body)
