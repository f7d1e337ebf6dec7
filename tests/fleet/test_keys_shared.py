"""API keys that several gateway replicas share, over both stores, and over an outage of the one that can have one."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from support.redis_server import RedisServer
from tandem.gateway.access.keys import KEYS, KeyFault, KeyRecord, KeyRing, keep, mint, revoke
from tandem.state import Store, open_store

Opener = Callable[[], Awaitable[Store]]
_fleets = itertools.count()


@pytest.fixture(params=["embedded", "redis"])
async def open_again(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Opener]:
    """Open one more client of the same, at first empty, store."""
    url = "embedded" if request.param == "embedded" else request.getfixturevalue("redis_server").url
    fleet = f"keys-{next(_fleets)}"
    opened: list[Store] = []

    async def open_one() -> Store:
        opened.append(await open_store(url, fleet=fleet, folder=tmp_path, deadline=5))
        return opened[-1]

    yield open_one
    for store in opened:
        await store.close()


class Replicas:
    """Key rings of several replicas, each with a client of the store of its own."""

    def __init__(self) -> None:
        self.rings: list[KeyRing] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def add(self, store: Store) -> None:
        ring = KeyRing(store)
        self._tasks.append(asyncio.create_task(ring.follow()))
        await ring.loaded()
        self.rings.append(ring)

    async def say(self, key: bytes, wanted: KeyRecord | KeyFault) -> None:
        """Return when every replica says this of the key."""
        async with asyncio.timeout(20):
            while any(ring.check(key, now=time.time()) != wanted for ring in self.rings):
                await asyncio.sleep(0.001)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


@pytest.fixture
async def replicas(open_again: Opener) -> AsyncIterator[Replicas]:
    made = Replicas()
    for _ in range(3):
        await made.add(await open_again())
    yield made
    await made.close()


async def new_key(store: Store, lives_s: float | None = None) -> tuple[KeyRecord, bytes]:
    record, key = mint("acme", now=time.time(), lives_s=lives_s)
    assert await keep(store, record)
    return record, key.encode()


async def test_a_new_key_opens_in_every_replica(open_again: Opener, replicas: Replicas) -> None:
    record, key = await new_key(await open_again())
    await replicas.say(key, record)


async def test_a_revoked_key_opens_in_no_replica_also_not_in_one_that_starts_later(
    open_again: Opener, replicas: Replicas
) -> None:
    store = await open_again()
    record, key = await new_key(store)
    await replicas.say(key, record)
    await revoke(store, record.id, now=time.time())
    await replicas.say(key, KeyFault.REVOKED)
    await replicas.add(await open_again())
    assert replicas.rings[-1].check(key, now=time.time()) is KeyFault.REVOKED


async def test_two_that_revoke_at_once_agree(open_again: Opener) -> None:
    stores = [await open_again() for _ in range(4)]
    record, _ = await new_key(stores[0])
    ended = await asyncio.gather(*(revoke(store, record.id, now=100.0 + n) for n, store in enumerate(stores)))
    assert len({one.revoked for one in ended if one is not None}) == 1


async def test_the_record_outlives_the_key_but_not_for_ever(open_again: Opener, replicas: Replicas) -> None:
    store = await open_again()
    record, key = await new_key(store, lives_s=0.001)
    await replicas.say(key, KeyFault.EXPIRED)
    assert await store.touch(KEYS + record.id, 0.001)
    async with asyncio.timeout(10):
        while await store.get(KEYS + record.id) is not None:
            await asyncio.sleep(0.001)
    await replicas.say(key, KeyFault.UNKNOWN)


async def test_known_keys_open_while_redis_is_down_and_new_ones_as_soon_as_it_is_back(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    fleet = f"keys-{next(_fleets)}"
    store = await open_store(redis_server.url, fleet=fleet, folder=tmp_path)
    admin = await open_store(redis_server.url, fleet=fleet, folder=tmp_path, deadline=10)
    record, key = await new_key(store)
    replicas = Replicas()
    await replicas.add(store)
    with redis_server.frozen():
        pending = asyncio.create_task(new_key(admin))
        await asyncio.sleep(0.3)
        await replicas.say(key, record)
    late, late_key = await pending
    await replicas.say(late_key, late)
    await replicas.close()
    await store.close()
    await admin.close()


async def test_a_redis_that_lost_everything_has_the_keys_of_living_gateways_again_and_none_that_was_revoked(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    fleet = f"keys-{next(_fleets)}"
    store = await open_store(redis_server.url, fleet=fleet, folder=tmp_path)
    keeping = asyncio.create_task(store.keep())  # as every gateway does
    record, key = await new_key(store)
    gone, gone_key = await new_key(store)
    await revoke(store, gone.id, now=time.time())
    replicas = Replicas()
    await replicas.add(store)
    await replicas.say(gone_key, KeyFault.REVOKED)
    await asyncio.sleep(0.5)  # the keeper has a watch of its own
    redis_server.stop()
    await replicas.say(key, record)
    redis_server.start()
    newcomer = await open_store(redis_server.url, fleet=fleet, folder=tmp_path)
    await replicas.add(newcomer)
    await replicas.say(key, record)
    await replicas.say(gone_key, KeyFault.REVOKED)
    await replicas.close()
    keeping.cancel()
    await newcomer.close()
    await store.close()
