"""Usage records in Redis: the stream `tandem:{<fleet>}:usage`, one entry a record, field `r` its JSON.

Each writer has a position in Redis: how far what it has to deliver is in the stream. One script compares it, adds the
records and moves it, in one step. So a delivery whose outcome is unknown is simply made again: it adds nothing if it
was made, however late the first one is carried out, and whoever makes it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

_T = TypeVar("_T")

POSITION_LIVES_S = 30 * 86400
"""A writer that has delivered nothing for so long is forgotten."""
_PAGE = 1000

_DELIVER = """
local have = redis.call('GET', KEYS[1]) or '0'
if have ~= ARGV[1] then return have end
for i = 5, #ARGV do
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[3], '*', 'r', ARGV[i])
end
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[4])
return ARGV[2]
"""
"""KEYS: the writer's position, the stream. ARGV: from where, to where, entries that the stream keeps, seconds that the
position lives, records. Returns the position that holds now. (A script that has begun to write is not stopped by
`maxmemory`, so it is done whole or not at all.)"""


class UsageStreamError(Exception):
    """Redis cannot be used; the message says why. A delivery that ends so may have been made or not."""


class UsageStream:
    """Connection to one fleet's stream. Belongs to the event loop that uses it."""

    def __init__(self, url: str, *, fleet: str, keep: int = 1_000_000, deadline: float = 5.0) -> None:
        """`keep`: how many records the stream holds at least, the oldest go first. `deadline`: seconds per call."""
        try:
            # No retries inside the client: ours know what they repeat.
            self._redis: Redis = Redis.from_url(
                url, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=None, socket_connect_timeout=deadline
            )
        except ValueError:
            # The parser's message may quote a part of the password.
            raise UsageStreamError(
                "the URL of the usage stream is not a Redis URL; write redis://[user:password@]host:port/db"
            ) from None
        settings = self._redis.connection_pool.connection_kwargs
        self._secret = str(settings.get("password") or "")
        self._where = settings.get("path") or f"{settings.get('host', 'localhost')}:{settings.get('port', 6379)}"
        self.fleet = fleet
        self._deadline = deadline
        self._keep = keep
        # The braces are a hash tag: in a Redis Cluster all keys of a fleet live in one slot.
        self._key = f"tandem:{{{fleet}}}:usage"
        self._deliver = self._redis.register_script(_DELIVER)

    async def position(self, writer: str) -> int:
        """Up to where the writer has delivered. Raises UsageStreamError."""
        return int(await self._within(self._redis.get(self._position(writer))) or 0)

    async def deliver(self, writer: str, start: int, end: int, records: Sequence[bytes]) -> int:
        """Add the writer's records from `start` to `end`; return its position afterwards.

        Another one than `end` means that nothing was added: what comes next is at that position. Raises
        UsageStreamError.
        """
        arguments: list[str | bytes | int] = [start, end, self._keep, POSITION_LIVES_S, *records]
        return int(await self._within(self._deliver(keys=[self._position(writer), self._key], args=arguments)))

    async def read(self, since: float | None = None) -> AsyncIterator[bytes]:
        """The records in the stream, oldest first; those added before `since` (Unix seconds) may be left out.

        A page is in memory at a time. Raises UsageStreamError.
        """
        after = f"{max(0, int((since or 0) * 1000))}-0"
        while True:
            page: Any = await self._within(self._redis.xrange(self._key, min=after, count=_PAGE))
            for _, fields in page:
                yield fields[b"r"]
            if len(page) < _PAGE:
                return
            milliseconds, _, number = page[-1][0].decode().partition("-")
            after = f"{milliseconds}-{int(number) + 1}"

    async def close(self) -> None:
        await self._redis.aclose()

    def _position(self, writer: str) -> str:
        return f"{self._key}:at:{writer}"

    async def _within(self, call: Awaitable[_T]) -> _T:
        try:
            async with asyncio.timeout(self._deadline):
                return await call
        except TimeoutError:
            reason = f"gave no answer within {self._deadline:g} s"
        except (RedisError, OSError) as error:
            reason = f"cannot be used: {error}"
        if self._secret:
            reason = reason.replace(self._secret, "***")
        # Raised outside the handler: the original error may quote the password, so it must not come along.
        raise UsageStreamError(f"Redis at {self._where} {reason}")
