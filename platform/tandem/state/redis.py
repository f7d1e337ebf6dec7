"""The Redis store: for a fleet on more than one machine. Redis 5 or later, `maxmemory-policy noeviction`.

Every step is one Lua script (`scripts.py`); a watch is a blocking read of the fleet's stream of changes.

A Redis that restarts empty makes a new store, with a later birth. Whoever knew the old one keeps from it: read as it
stands it would mean that no group is wanted and no key is valid. A keeper puts back what it remembers, and the old
birth with it.
"""

from __future__ import annotations

import asyncio
import builtins
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from tandem.state import scripts
from tandem.state.store import KEPT, Change, Entry, StoreError, StoreLostError, check_key, check_ttl
from tandem.state.watch import RECHECK_S, HistoryGone, follow

_T = TypeVar("_T")
_BATCH = 512
BELIEVED_S = 30.0
"""A store that has lost what it held is taken as it is when nobody has put it back for so long."""

_log = logging.getLogger(__name__)


class RedisStore:
    """See `Store`."""

    def __init__(self, url: str, *, fleet: str, deadline: float) -> None:
        """Use `open`."""
        self._deadline = deadline
        self._closed = asyncio.Event()
        try:
            # No retries inside the client: a write that is repeated unseen could answer with its own conflict.
            self._redis: Redis = Redis.from_url(
                url, protocol=2, retry=Retry(NoBackoff(), 0), socket_timeout=None, socket_connect_timeout=deadline
            )
        except ValueError:
            # The parser's message may quote a part of the password.
            raise StoreError("state.url is not a Redis URL; write redis://[user:password@]host:port/db.") from None
        settings = self._redis.connection_pool.connection_kwargs
        self._secrets = [str(settings["password"])] if settings.get("password") else []
        address = settings.get("path") or f"{settings.get('host', 'localhost')}:{settings.get('port', 6379)}"
        self._where = f"Redis at {address}, database {settings.get('db') or 0},"
        # The braces are a hash tag: in a Redis Cluster all keys of a fleet live in one slot.
        keys = [f"tandem:{{{fleet}}}:{name}" for name in scripts.KEY_NAMES]
        self._keys = keys
        self._changes = keys[scripts.KEY_NAMES.index("changes")]
        self._get = self._redis.register_script(scripts.GET)
        self._list = self._redis.register_script(scripts.LIST)
        self._write = self._redis.register_script(scripts.WRITE)
        self._touch = self._redis.register_script(scripts.TOUCH)
        self._tick = self._redis.register_script(scripts.TICK)
        self._restore = self._redis.register_script(scripts.RESTORE)
        self._birth = b""
        self._lost_at: float | None = None

    @classmethod
    async def open(cls, url: str, *, fleet: str, deadline: float) -> RedisStore:
        """Connect, and see that Redis answers. Raises `StoreError`."""
        store = cls(url, fleet=fleet, deadline=deadline)
        try:
            await store.revision()
        except StoreError:
            await store.close()
            raise
        return store

    async def get(self, key: str) -> Entry | None:
        [held] = await self._run(self._get, check_key(key)) or [None]
        return None if held is None else _entry(key.encode(), held)

    async def put(self, key: str, value: bytes, *, ttl: float | None = None) -> int:
        return int((await self._run(self._write, check_key(key), "", "put", value, _milliseconds(ttl)))[0])

    async def compare_and_set(
        self, key: str, value: bytes | None, *, version: int, ttl: float | None = None
    ) -> int | None:
        operation = "delete" if value is None else "put"
        [new] = await self._run(self._write, check_key(key), version, operation, value or b"", _milliseconds(ttl))
        if new < 0:
            return None
        return 0 if value is None else int(new)

    async def delete(self, key: str) -> bool:
        return bool((await self._run(self._write, check_key(key), "", "delete", b"", ""))[0])

    async def list(self, prefix: str) -> builtins.list[Entry]:
        return (await self._snapshot(prefix))[1]

    async def touch(self, key: str, ttl: float) -> bool:
        return bool((await self._run(self._touch, check_key(key), _milliseconds(ttl)))[0])

    def watch(self, prefix: str) -> AsyncIterator[Change]:
        return follow(_Feed(self, prefix), self._closed)

    async def keep(self, prefixes: Sequence[str] = KEPT) -> None:
        held: dict[str, bytes] = {}
        feed = _Feed(self, "")

        async def put_back() -> None:
            if feed.birth != self._birth:
                return  # this store was never read: others know what was in it
            flat = [part for entry in held.items() for part in entry]
            made = (await self._run(self._restore, *flat))[0]
            if made:
                _log.warning("%s had lost what it held: %d entries were put back", self._where.rstrip(","), made)

        async for change in follow(feed, self._closed, lost=put_back):
            if not change.key.startswith(tuple(prefixes)):
                continue
            if change.value is None:
                held.pop(change.key, None)
            else:
                held[change.key] = change.value

    async def revision(self) -> int:
        return int((await self._run(self._tick))[0])

    async def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        # Also the connections that wait for changes: their watches end.
        await self._redis.connection_pool.disconnect(inuse_connections=True)
        await self._redis.aclose()

    async def _snapshot(self, prefix: str) -> tuple[int, builtins.list[Entry]]:
        revision, *flat = await self._run(self._list, prefix)
        return int(revision), [_entry(key, held) for key, held in zip(flat[::2], flat[1::2], strict=True)]

    async def _run(self, script: Callable[..., Awaitable[Any]], *arguments: str | bytes | int) -> builtins.list[Any]:
        """The script's result. Raises StoreError; StoreLostError when the store is not the one that was known."""
        known = self._birth
        call = partial(script, keys=self._keys, args=(known, *arguments))
        result: builtins.list[Any]
        birth, *result = await self._within(self._deadline, call)
        if birth == known or not known:
            self._birth, self._lost_at = birth, None
            return result
        now = time.monotonic()
        self._lost_at = now if self._lost_at is None else self._lost_at
        if int(birth) < int(known) or now > self._lost_at + BELIEVED_S:
            # Older: what this client took for the store was the gap before the old one was put back.
            self._birth, self._lost_at = birth, None
            return await self._run(script, *arguments)
        raise StoreLostError(f"{self._where} has lost what it held. Whoever remembers puts it back; wait for that.")

    async def _within(self, deadline: float, call: Callable[[], Awaitable[_T]]) -> _T:
        if self._closed.is_set():
            raise StoreError("This store was closed.")
        try:
            async with asyncio.timeout(deadline):
                return await call()
        except TimeoutError:
            reason = f"gave no answer within {self._deadline:g} s"
        except (RedisError, OSError) as error:
            reason = f"cannot be used: {self._without_secrets(str(error))}"
        # Raised outside the handler: the original error may quote the password, so it must not come along.
        raise StoreError(f"{self._where} {reason}. See that the server runs and that state.url is right.")

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text.rstrip(".")


class _Feed:
    """What a watch of the Redis store reads from."""

    def __init__(self, store: RedisStore, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self.birth = b""
        """Of the store that was last listed."""

    async def snapshot(self) -> tuple[int, list[Entry]]:
        found = await self._store._snapshot(self._prefix)
        self.birth = self._store._birth
        return found

    async def after(self, cursor: int) -> tuple[int, list[Change]]:
        store = self._store
        revision, next_expiry_ms = await store._run(store._tick)
        wait_ms = int(RECHECK_S * 1000)
        if next_expiry_ms >= 0:
            wait_ms = max(1, min(wait_ms, next_expiry_ms))
        batch: Any = await store._within(
            wait_ms / 1000 + store._deadline,
            lambda: store._redis.xread({store._changes: f"{cursor}-0"}, count=_BATCH, block=wait_ms),
        )
        if not batch and revision != cursor:
            raise HistoryGone
        changes = []
        for identity, fields in batch[0][1] if batch else ():
            if int(fields[b"p"]) != cursor:
                raise HistoryGone
            cursor = int(identity.partition(b"-")[0])
            key = fields[b"k"].decode()
            if key.startswith(self._prefix):
                changes.append(Change(key, fields.get(b"v"), cursor))
        return cursor, changes


def _entry(key: bytes, held: bytes) -> Entry:
    version, _, value = held.partition(b":")
    return Entry(key.decode(), value, int(version))


def _milliseconds(ttl: float | None) -> int | str:
    return "" if check_ttl(ttl) is None or ttl is None else math.ceil(ttl * 1000)
