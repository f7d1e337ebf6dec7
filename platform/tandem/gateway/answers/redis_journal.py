"""Answers kept in Redis, for all gateways of a fleet: what one began, another goes on with. Redis 5 or later."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import MaxConnectionsError, RedisError

from tandem.core.answers import AnswerState, Appended, Claim, Limits, News, Standing
from tandem.gateway.answers.journal import Journal, JournalDown, LocalJournal
from tandem.gateway.answers.redis_news import RedisNews
from tandem.gateway.answers.redis_scripts import APPEND, CLAIM, NEWS, RESTART, TAKE

log = logging.getLogger(__name__)

_T = TypeVar("_T")

LEASE_S = 3.0
"""A gateway that has not told Redis for so long that it lives is dead: others go on with its answers."""
WANT_S = 5.0
"""Who has asked for news is taken to wait for more for so long."""
DEADLINE_S = 0.5
RETRY_S = 1.0
"""Nobody waits for a Redis that did not answer, for so long."""
CONNECTIONS = 16
"""For all that is asked of Redis at once; more wait for their turn."""
TURN_S = 2.0
"""How long for."""


class RedisJournal:
    """See `Journal`. Belongs to the event loop that it was made on."""

    def __init__(
        self,
        url: str,
        limits: Limits,
        *,
        fleet: str,
        incarnation: str,
        lease_s: float = LEASE_S,
        deadline: float = DEADLINE_S,
    ) -> None:
        """`incarnation`: what the gateway's owners begin with. Raises ValueError for a URL that is none."""
        try:
            self._redis: Redis = Redis.from_url(
                url,
                protocol=2,
                retry=Retry(NoBackoff(), 0),
                socket_timeout=None,
                socket_connect_timeout=deadline,
                # One is for the news. The turns keep the others few: the pool's own limit is an error.
                max_connections=2 * CONNECTIONS,
            )
        except ValueError:
            # The parser's message may quote a part of the password.
            raise ValueError("state.url is not a Redis URL; write redis://[user:password@]host:port/db.") from None
        self._secret = str(self._redis.connection_pool.connection_kwargs.get("password") or "")
        # The braces are a hash tag: in a Redis Cluster all keys of a fleet live in one slot.
        self._prefix = f"tandem:{{{fleet}}}:answers:"
        self._limits = limits
        self._lease_s = lease_s
        self._incarnation = incarnation
        self._deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._down_until = 0.0
        self._claim = self._redis.register_script(CLAIM)
        self._take = self._redis.register_script(TAKE)
        self._append = self._redis.register_script(APPEND)
        self._news = self._redis.register_script(NEWS)
        self._restart = self._redis.register_script(RESTART)
        self._turns = asyncio.Semaphore(CONNECTIONS)
        self._heard = RedisNews(self._redis, f"{self._prefix}news", deadline=deadline)
        self._renewal: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    async def claim(self, name: str, *, tenant: str, fingerprint: str, number: str, created: int, owner: str) -> Claim:
        self._renew_from_now_on()
        standing, found, at, born, lengths, entries = await self._run(
            self._claim,
            name,
            tenant,
            fingerprint,
            number,
            created,
            owner,
            *self._lives(AnswerState.OPEN),
            *self._room(),
        )
        return Claim(
            standing=Standing(standing.decode()),
            number=found.decode(),
            created=int(at),
            born=born.decode(),
            log=_entries(lengths, entries),
        )

    async def take(self, name: str, *, before: str, owner: str) -> bool:
        self._renew_from_now_on()
        [taken] = await self._run(self._take, name, before, owner, *self._lives(AnswerState.OPEN))
        return bool(taken)

    async def append(self, name: str, *, owner: str, place: int, entry: bytes, state: AnswerState) -> Appended:
        [found] = await self._run(
            self._append, name, owner, place, entry, state.value, *self._lives(state), *self._room()
        )
        return Appended(found.decode())

    async def restart(self, name: str, *, owner: str) -> bool:
        [done] = await self._run(self._restart, name, owner)
        return bool(done)

    async def news(self, name: str, *, after: int, within: float) -> News | None:
        with self._heard.watch(name) as changed:
            found = await self._look(name, after)
            if found is None or found.log or not found.alive or not within:
                return found
            try:
                async with asyncio.timeout(within):
                    await changed.wait()
            except TimeoutError:
                pass  # its owner may have died meanwhile
        return await self._look(name, after)

    async def wanted(self, name: str) -> bool:
        return bool(await self._within(self._deadline, lambda: self._redis.exists(f"{self._prefix}w:{name}")))

    async def close(self) -> None:
        self._closing.set()
        self._heard.close()
        if self._renewal is not None:
            await asyncio.wait([self._renewal], timeout=self._deadline)
            self._renewal.cancel()
            try:
                # Whoever waits for one of this gateway's answers need not wait until its lease is over.
                await self._within(self._deadline, lambda: self._redis.delete(self._lease_key))
            except JournalDown as error:
                log.debug("the lease of this gateway's answers ends by itself: %s", error)
        await self._redis.connection_pool.disconnect(inuse_connections=True)
        await self._redis.aclose()

    async def _look(self, name: str, after: int) -> News | None:
        found = await self._run(self._news, name, after, _ms(WANT_S))
        if not found:
            return None
        state, owner, alive, born, lengths, entries = found
        return News(
            state=AnswerState(state.decode()),
            owner=owner.decode(),
            alive=bool(alive),
            born=born.decode(),
            log=_entries(lengths, entries),
        )

    @property
    def _lease_key(self) -> str:
        return f"{self._prefix}o:{self._incarnation}"

    def _lives(self, state: AnswerState) -> tuple[int, int]:
        life = self._limits.open_s if state is AnswerState.OPEN else self._limits.keep_s
        return _ms(self._lease_s), _ms(life)

    def _room(self) -> tuple[int, int]:
        return self._limits.tenant_bytes, self._limits.total_bytes

    def _renew_from_now_on(self) -> None:
        """A gateway that was never asked to keep an answer has no lease."""
        if self._renewal is None:
            self._renewal = asyncio.create_task(self._renew(), name="answers-lease")

    async def _renew(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._lease_s / 3):
                    await self._closing.wait()
                return
            except TimeoutError:
                pass
            try:
                await self._within(self._deadline, lambda: self._redis.set(self._lease_key, 1, px=_ms(self._lease_s)))
            except JournalDown as error:
                log.debug("could not renew the lease of this gateway's answers: %s", error)

    async def _run(self, script: Callable[..., Awaitable[Any]], *arguments: str | bytes | int) -> Any:
        return await self._within(self._deadline, lambda: script(keys=[self._prefix], args=arguments))

    async def _within(self, deadline: float, call: Callable[[], Awaitable[_T]]) -> _T:
        self._check()
        try:
            async with asyncio.timeout(TURN_S):
                await self._turns.acquire()
        except TimeoutError:
            raise JournalDown("too much is asked of Redis at once", sent=False) from None
        try:
            self._check()
            async with asyncio.timeout(deadline):
                return await call()
        except MaxConnectionsError:
            # Says nothing of Redis.
            raise JournalDown("there are too many connections to Redis", sent=False) from None
        except TimeoutError:
            reason = f"Redis gave no answer within {deadline:g} s"
        except (RedisError, OSError) as error:
            text = str(error)
            reason = f"Redis cannot be used: {text.replace(self._secret, '***') if self._secret else text}"
        finally:
            self._turns.release()
        self._down_until = self._loop.time() + RETRY_S
        # Raised outside the handler: the original error may quote the password, so it must not come along.
        raise JournalDown(reason.rstrip("."))

    def _check(self) -> None:
        if self._loop.time() < self._down_until:
            raise JournalDown("Redis did not answer a moment ago", sent=False)


def open_journal(url: str, limits: Limits, *, fleet: str, incarnation: str) -> Journal:
    """The journal for a `state.url`: Redis, or this gateway's own where the state is embedded."""
    if url.startswith("embedded"):
        return LocalJournal(limits)
    return RedisJournal(url, limits, fleet=fleet, incarnation=incarnation)


def _entries(lengths: bytes, entries: bytes) -> list[bytes]:
    """See `redis_scripts`."""
    found, at = [], 0
    for length in map(int, lengths.split()):
        found.append(entries[at : at + length])
        at += length
    return found


def _ms(seconds: float) -> int:
    return int(seconds * 1000)
