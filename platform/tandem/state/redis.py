"""The Redis store: for a fleet on more than one machine. Redis 5 or later, `maxmemory-policy noeviction`.

Every step is one Lua script (`scripts.py`); a watch is a blocking read of the fleet's stream of changes.

A Redis that restarts empty makes a new store, with a birth of its own. Whoever knew the old one keeps from it: read as
it stands it would mean that no group is wanted and no key is valid. A keeper puts back what it remembers, and the old
birth with it; the new store notes whose place it took, so all clients end up with one birth (`scripts.RESTORE`).
"""

from __future__ import annotations

import asyncio
import builtins
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

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
"""A store that has lost what it held is taken as it is when nobody has put it back for so long, by one who holds
nothing that could be put back. A keeper that comes later still puts back what it holds."""

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
        self._lost: tuple[bytes, float] | None = None
        """The birth of the strange store that was last found, and since when it was found in every call."""
        self._keepers: set[_Keeper] = set()

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
        [held] = await self._run(self._get, check_key(key))
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
        return (await self._listing(prefix)).entries

    async def touch(self, key: str, ttl: float) -> bool:
        return bool((await self._run(self._touch, check_key(key), _milliseconds(ttl)))[0])

    def watch(self, prefix: str) -> AsyncIterator[Change]:
        return follow(_Feed(self, prefix), self._closed)

    async def keep(self, prefixes: Sequence[str] = KEPT) -> None:
        keeper = _Keeper(self, tuple(prefixes))
        self._keepers.add(keeper)
        try:
            async for change in follow(keeper, self._closed, lost=keeper.put_back):
                keeper.learn(change)
        finally:
            self._keepers.discard(keeper)

    async def revision(self) -> int:
        return int((await self._run(self._tick))[0])

    async def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        # Also the connections that wait for changes: their watches end.
        await self._redis.connection_pool.disconnect(inuse_connections=True)
        await self._redis.aclose()

    async def _listing(self, prefix: str) -> _Listing:
        revision, home, correctable, past, *flat = await self._run(self._list, prefix)
        entries = [_entry(key, held) for key, held in zip(flat[::2], flat[1::2], strict=True)]
        return _Listing(self._birth, home, int(correctable), past.split(b",") if past else [], int(revision), entries)

    async def _run(self, script: Callable[..., Awaitable[Any]], *arguments: str | bytes | int) -> builtins.list[Any]:
        """The script's result. Raises StoreError; StoreLostError when the store is not the one that was known."""
        birth, done, result = await self._ask(script, self._birth, *arguments)
        if done:
            self._birth, self._lost = birth, None
            return result
        now = time.monotonic()
        if self._lost is None or self._lost[0] != birth:
            self._lost = birth, now
        if now > self._lost[1] + BELIEVED_S and not any(keeper.held for keeper in self._keepers):
            _log.warning("%s has lost what it held, and nobody has put it back", self._where.rstrip(","))
            self._birth, self._lost = birth, None
            return await self._run(script, *arguments)
        raise StoreLostError(f"{self._where} has lost what it held. Whoever remembers puts it back; wait for that.")

    async def _ask(
        self, script: Callable[..., Awaitable[Any]], known: bytes, *arguments: str | bytes | int
    ) -> tuple[bytes, bool, builtins.list[Any]]:
        """Which birth was found, whether the script did its work for one who knows the birth `known`, its result."""
        call = partial(script, keys=self._keys, args=(known, uuid.uuid4().hex, *arguments))
        birth, done, *result = await self._within(self._deadline, call)
        return birth, bool(done), result

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
        self._lost = None  # it may be yet another store that answers next, or whoever remembers cannot reach it either
        # Raised outside the handler: the original error may quote the password, so it must not come along.
        raise StoreError(f"{self._where} {reason}. See that the server runs and that state.url is right.")

    def _without_secrets(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text.rstrip(".")


class _Listing(NamedTuple):
    """What is under a prefix, and what store it was read from (the terms are explained in `scripts.py`)."""

    birth: bytes
    home: bytes
    correctable: int
    past: builtins.list[bytes]
    revision: int
    entries: builtins.list[Entry]


class _Feed:
    """What a watch of the Redis store reads from."""

    def __init__(self, store: RedisStore, prefix: str) -> None:
        self._store = store
        self._prefix = prefix
        self._birth = b""

    async def snapshot(self) -> tuple[int, list[Entry]]:
        found = await self._store._listing(self._prefix)
        self._birth = found.birth
        return found.revision, found.entries

    async def after(self, cursor: int) -> tuple[int, list[Change]]:
        store = self._store
        revision, next_expiry_ms = await store._run(store._tick)
        if store._birth != self._birth:
            raise HistoryGone
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


class _Keeper(_Feed):
    """Remembers what is under its prefixes, of the store that it last listed, and puts it back there."""

    def __init__(self, store: RedisStore, prefixes: tuple[str, ...]) -> None:
        super().__init__(store, "")
        self._prefixes = prefixes
        self._home = b""
        self._past: list[bytes] = []
        self._cursor = 0
        self.held: dict[str, bytes] = {}

    def learn(self, change: Change) -> None:
        """Take over what was reported."""
        if not change.key.startswith(self._prefixes):
            return
        if change.value is None:
            self.held.pop(change.key, None)
        else:
            self.held[change.key] = change.value

    async def snapshot(self) -> tuple[int, list[Entry]]:
        found = await self._store._listing("")
        if found.birth == self._birth and found.home != self._home and -1 < found.correctable < self._cursor:
            # Another keeper was quicker, but what it put back is older: a key may since have been revoked.
            await self.put_back()
            found = await self._store._listing("")
        self._birth, self._home, self._past = found.birth, found.home, found.past
        self._cursor = found.revision
        return found.revision, found.entries

    async def after(self, cursor: int) -> tuple[int, list[Change]]:
        found = await super().after(cursor)
        self._cursor = found[0]
        return found

    async def put_back(self) -> None:
        """Put back what is held, as far as the store lacks it (`scripts.RESTORE` tells). Raises StoreError."""
        if not self._birth:
            return  # this store was never read: others know what was in it
        store = self._store
        flat = [part for entry in self.held.items() for part in entry]
        known: list[bytes | int] = [self._home, self._cursor, len(self._past), *self._past]
        birth, done, [made] = await store._ask(store._restore, self._birth, *known, *flat)
        if done:
            _log.warning("%s lacked what was known here: %d entries were put right", store._where.rstrip(","), made)
        if self.held:
            # Whatever this process could tell is there now, or is known there to be out of date.
            store._birth, store._lost = birth, None


def _entry(key: bytes, held: bytes) -> Entry:
    version, _, value = held.partition(b":")
    return Entry(key.decode(), value, int(version))


def _milliseconds(ttl: float | None) -> int | str:
    return "" if check_ttl(ttl) is None or ttl is None else math.ceil(ttl * 1000)
