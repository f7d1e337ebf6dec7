"""Hears which answers in Redis have changed: one connection for all that are followed at one gateway."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import RedisError

log = logging.getLogger(__name__)

BLOCK_S = 2.0
RETRY_S = 1.0
_BATCH = 1000


class RedisNews:
    """`watch` a name. Who watches hears early; that something was missed is found out by looking now and then."""

    def __init__(self, redis: Redis, stream: str, *, deadline: float) -> None:
        """`stream`: the key of the scripts' `news`."""
        self._redis = redis
        self._stream = stream
        self._deadline = deadline
        self._watching: dict[str, set[asyncio.Event]] = {}
        self._wanted = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None

    @contextlib.contextmanager
    def watch(self, name: str) -> Iterator[asyncio.Event]:
        """The event is set when the answer has changed."""
        changed = asyncio.Event()
        self._watching.setdefault(name, set()).add(changed)
        self._wanted.set()
        if self._reading is None:
            self._reading = asyncio.create_task(self._read(), name="answers-news")
        try:
            yield changed
        finally:
            self._watching[name].discard(changed)
            if not self._watching[name]:
                del self._watching[name]

    def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()

    async def _read(self) -> None:
        cursor = "0-0"
        while True:
            if not self._watching:
                self._wanted.clear()
                await self._wanted.wait()
            try:
                async with asyncio.timeout(BLOCK_S + self._deadline):
                    found: Any = await self._redis.xread(
                        {self._stream: cursor}, count=_BATCH, block=int(BLOCK_S * 1000)
                    )
            except (RedisError, OSError, TimeoutError):
                # Not its text, which may quote the password. Whoever watches looks by itself meanwhile.
                log.debug("could not hear of news in the journal of answers")
                await asyncio.sleep(RETRY_S)
                continue
            for identity, fields in found[0][1] if found else ():
                cursor = identity.decode()
                for changed in self._watching.get(fields[b"n"].decode(), ()):
                    changed.set()
