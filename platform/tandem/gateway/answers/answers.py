"""Answers that are kept under an idempotency key, for the requests of one gateway."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import msgspec

from tandem.config import IdempotencyConfig
from tandem.core.answers import AnswerState, Claim, Standing, answer_name, fingerprint, is_key
from tandem.gateway.answers.entries import Left, decode, encode, versions
from tandem.gateway.answers.journal import Journal, JournalDown
from tandem.gateway.answers.kept import Kept
from tandem.gateway.answers.releases import Releases
from tandem.gateway.api.requests import parse_json
from tandem.gateway.errors import ApiError

if TYPE_CHECKING:
    from tandem.gateway.answers.entries import Entry
    from tandem.gateway.asked import Asked
    from tandem.gateway.service import Body, Service

log = logging.getLogger(__name__)

HEADER = b"idempotency-key"
CLOSE_S = 3.0
"""How long a gateway that stops takes to let its answers go."""
KEY_FOLLOWERS = 64
"""Requests with one key that this gateway answers from the journal at a time; with a further one it is told to come
back."""
TENANT_FOLLOWERS = 512
"""The same of one tenant. When a gateway dies, all that its clients ask again are such, until its lease is over."""


class Answers:
    """Belongs to the event loop that it was made on."""

    def __init__(self, service: Service, journal: Journal, config: IdempotencyConfig) -> None:
        self.service = service
        self.orphan_s = config.orphan_s
        self.closing = False
        self._journal = journal
        self._releases = Releases(journal, within=service.config.request_timeout_s + config.keep_s)
        self._numbers = itertools.count(1)
        self._working: set[str] = set()
        """Owners of this gateway that work on their answers, or may come to."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._finishing: set[asyncio.Task[None]] = set()
        self._followers: dict[asyncio.Task[None], Kept] = {}
        self._of_key: Counter[str] = Counter()
        self._of_tenant: Counter[str] = Counter()
        """How many follow."""
        self._away = False

    async def claim(self, asked: Asked, key: bytes, body: Body) -> Kept | None:
        """The request's hold on the answer of its key; None if the journal is away, and it is served without.

        Raises ApiError: 400 for a key that is none, 422 for one of another request, 429 when too many follow.
        """
        if not is_key(key):
            message = "The Idempotency-Key must have 1 to 255 printable characters of ASCII."
            raise ApiError(400, message, code="invalid_idempotency_key")
        tenant, size = asked.identity.tenant.name, len(body) if isinstance(body, bytes) else 0
        printed = await self.service.lanes.work(tenant, size, lambda: _fingerprint(asked, body))
        name, owner = answer_name(tenant, key), f"{self.service.driver.incarnation}:{next(self._numbers)}"
        self._check_room(name, tenant)
        self._working.add(owner)
        try:
            # What this gateway has not been able to let go of is not to be waited for.
            await self._releases.settle(name)
            claim = await self._claim(asked, name, printed, owner)
        except JournalDown as error:
            if not self._away:
                log.warning("idempotency keys are not honoured now: %s", error)
            self._away = True
            self._working.discard(owner)
            return None
        except BaseException:
            self._working.discard(owner)
            raise
        self._away = False
        if claim.standing is Standing.MISMATCH:
            self._working.discard(owner)
            message = (
                "This Idempotency-Key was used for another request. "
                "Use a new key for each request, and the same one only to send the very same request again."
            )
            raise ApiError(422, message, code="idempotency_key_reused")
        try:
            return await self._hold(claim, name, tenant, owner)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            # A gateway of another version has written it.
            log.warning("the answer %s cannot be read, the request is served anew: %s", claim.number, error)
            self.release(name, owner)
            return None
        except BaseException:
            self.release(name, owner)
            raise

    async def _claim(self, asked: Asked, name: str, printed: str, owner: str) -> Claim:
        claiming = asyncio.ensure_future(
            self._journal.claim(
                name,
                tenant=asked.identity.tenant.name,
                fingerprint=printed,
                number=asked.number,
                created=asked.created,
                owner=owner,
            )
        )
        try:
            return await asyncio.shield(claiming)
        except asyncio.CancelledError:
            self.release(name, owner, after=claiming)
            raise
        except JournalDown as error:
            if error.sent:
                self.release(name, owner, after=claiming)
            raise

    async def _hold(self, claim: Claim, name: str, tenant: str, owner: str) -> Kept:
        entries, place = await self.service.lanes.work(tenant, sum(map(len, claim.log)), lambda: decode(claim.log)), 0
        if claim.standing is Standing.OWNED:
            place = len(claim.log)
            if entries and self._weights_are_gone(entries):
                entries, place = await self._begin_anew(name, owner, entries, place)
        else:
            place = len(claim.log)
            self._check_room(name, tenant)
            self._of_key[name] += 1
            self._of_tenant[tenant] += 1
        return Kept(self, self._journal, name, tenant, owner, claim, entries, place)

    def _weights_are_gone(self, entries: list[Entry]) -> bool:
        """No group has, or will have, the weights that the rest has to come from."""
        for version in versions(entries):
            shortage = self.service.driver.router.shortage(version)
            if shortage is not None and not shortage.coming:
                return True
        return False

    async def _begin_anew(self, name: str, owner: str, entries: list[Entry], place: int) -> tuple[list[Entry], int]:
        """Nothing was sent to this client yet: it can have another answer under the same number."""
        # What was counted for the old one stays counted.
        counted: list[Entry] = [entry for entry in entries if isinstance(entry, Left)]
        try:
            if not await self._journal.restart(name, owner=owner):
                return entries, place
            log.info("an answer is begun anew: no group has the weights that its first part is of")
            if counted:
                await self._journal.append(name, owner=owner, place=1, entry=encode(counted), state=AnswerState.OPEN)
        except JournalDown as error:
            # How far that came is not known: nothing of it is to be kept, and the client asks again.
            self.release(name, owner, AnswerState.VOID)
            log.debug("could not begin an answer anew: %s", error)
            message = "The answer of this Idempotency-Key cannot be begun anew now. Ask again with the same key."
            raise ApiError(503, message, type="server_error", code="unavailable", retry_after=1.0) from None
        return counted, 1 if counted else 0

    def _check_room(self, name: str, tenant: str) -> None:
        if self._of_key[name] < KEY_FOLLOWERS and self._of_tenant[tenant] < TENANT_FOLLOWERS:
            return
        message = "Too many requests wait for answers that earlier ones with their Idempotency-Key have begun. "
        raise ApiError(429, message + "Please try again in 2s.", type="requests", code="overloaded", retry_after=2.0)

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
        await self._releases.close(CLOSE_S)
        await self._journal.close()

    # For `Kept`

    def works(self, owner: str) -> None:
        """This gateway's owner may come to own its answer."""
        self._working.add(owner)

    def rests(self, owner: str) -> None:
        """It owns nothing any more, or will not work on it."""
        self._working.discard(owner)

    def release(
        self,
        name: str,
        owner: str,
        state: AnswerState = AnswerState.FREE,
        *,
        after: asyncio.Future[Any] | None = None,
    ) -> None:
        """It may be the owner's, who will not work on it: nobody is to wait for that."""
        self._working.discard(owner)
        self._releases.add(name, owner, state, after=after)

    def forsaken(self, owner: str) -> bool:
        """It is one of this gateway's, and does not work on its answer: whatever the journal says."""
        return owner.partition(":")[0] == self.service.driver.incarnation and owner not in self._working

    async def settle(self, name: str, owner: str) -> None:
        """Let go of the answer in the name of the owner, which is forsaken. Raises JournalDown."""
        await self._releases.settle(name, owner)

    def follows_no_more(self, name: str, tenant: str) -> None:
        for counted, one in ((self._of_key, name), (self._of_tenant, tenant)):
            counted[one] -= 1
            if not counted[one]:
                del counted[one]

    def follow(self, work: Coroutine[Any, Any, None], kept: Kept) -> asyncio.Task[None]:
        """Do it for as long as the request is there."""
        task = self.go(work)
        self._followers[task] = kept
        task.add_done_callback(lambda done: self._followers.pop(done, None))
        return task

    def go(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return _keep(self._tasks, work)

    def finish(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Do it to its end, also when the gateway stops."""
        return _keep(self._finishing, work)


def _keep(tasks: set[asyncio.Task[None]], work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    # The loop itself keeps no strong reference.
    task = asyncio.create_task(work, name="kept-answer")
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task


def _fingerprint(asked: Asked, body: Body) -> str:
    return fingerprint(asked.endpoint.name, parse_json(body) if isinstance(body, bytes) else body)
