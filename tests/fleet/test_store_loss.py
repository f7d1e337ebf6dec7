"""A Redis that comes back empty: what was known is put back, and all clients end up with one store."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from support.redis_server import RedisServer
from tandem.state import Change, StoreError, StoreLostError, open_store
from tandem.state import redis as redis_store
from tandem.state.redis import RedisStore
from tandem.state.store import KEPT

Opener = Callable[[], Awaitable[RedisStore]]
T = TypeVar("T")
WITHIN_S = 10.0


async def take(watch: AsyncIterator[Change], count: int, within: float = WITHIN_S) -> list[Change]:
    async with asyncio.timeout(within):
        return [await anext(watch) for _ in range(count)]


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    server = RedisServer()
    server.start()
    yield server
    server.remove()


@pytest.fixture
async def opened(own_server: RedisServer, tmp_path: Path) -> AsyncIterator[Opener]:
    """Open one more client of a Redis of the test's own."""
    made: list[RedisStore] = []

    async def open_one() -> RedisStore:
        store = await open_store(own_server.url, fleet="f", folder=tmp_path, deadline=2)
        assert isinstance(store, RedisStore)
        made.append(store)
        return store

    yield open_one
    for store in made:
        await store.close()


async def lose_everything(server: RedisServer, store: RedisStore) -> None:
    server.stop()
    with pytest.raises(StoreError):
        await store.get("any")
    server.start()


async def test_a_watch_survives_a_redis_that_lost_everything_for_good(
    own_server: RedisServer,
    opened: Opener,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(redis_store, "BELIEVED_S", 0.5)
    caplog.set_level(logging.INFO)
    store = await opened()
    before = await store.put("lost", b"1")
    await store.put("again", b"1")
    watch = store.watch("")
    await take(watch, 2)
    waiting = asyncio.ensure_future(take(watch, 3))
    await lose_everything(own_server, store)
    newcomer = await opened()
    await newcomer.put("again", b"2")
    await newcomer.put("new", b"3")
    seen = await waiting
    assert {change.key: change.value for change in seen} == {"lost": None, "again": b"2", "new": b"3"}
    assert all(change.version > before for change in seen if change.value)
    logged = [record.levelname for record in caplog.records if record.name == "tandem.state.watch"]
    assert logged == ["WARNING", "INFO"]


async def test_a_redis_that_lost_everything_is_not_believed_and_takes_no_writes(
    own_server: RedisServer, opened: Opener
) -> None:
    store = await opened()
    version = await store.put("k", b"1")
    await lose_everything(own_server, store)
    for call in (store.get("k"), store.list(""), store.put("k", b"2"), store.touch("k", 1), store.delete("k")):
        with pytest.raises(StoreLostError, match="has lost what it held"):
            await call
    with pytest.raises(StoreLostError):
        await store.compare_and_set("k", b"2", version=version)
    assert await (await opened()).list("") == []


async def test_a_keeper_that_never_read_the_store_does_not_call_it_whole(
    own_server: RedisServer, opened: Opener
) -> None:
    keeper, late = await opened(), await opened()
    await keeper.put("keys/a", b"1")
    keeping = [asyncio.create_task(keeper.keep())]
    await take(keeper.watch(""), 1)
    await asyncio.sleep(0.2)  # the keeper has a watch of its own
    await lose_everything(own_server, late)
    keeping.append(asyncio.create_task(late.keep()))
    async with asyncio.timeout(10):
        async for change in late.watch("keys/"):
            assert change.value == b"1"
            break
    for task in keeping:
        task.cancel()


async def test_what_is_kept_comes_back_after_a_loss_and_no_watch_sees_it_deleted(
    own_server: RedisServer, opened: Opener
) -> None:
    store, keeper, other = [await opened() for _ in range(3)]
    await store.put("desired/a", b"1")
    await store.put("keys/gone", b"1")
    await store.put("gateways/a", b"1", ttl=60)
    await store.delete("keys/gone")
    version = await store.put("groups/a", b"2")
    keeping = [asyncio.create_task(one.keep()) for one in (keeper, other)]
    watch = store.watch("")
    await take(watch, 3)
    following = asyncio.ensure_future(take(watch, 4))
    # Both keepers must have seen it all.
    await asyncio.gather(*(take(one.watch("groups/"), 1) for one in (keeper, other)))
    await lose_everything(own_server, store)
    newcomer = await opened()
    await newcomer.put("keys/new", b"3")
    assert {change.key: change.value for change in await following} == {
        "desired/a": b"1",
        "groups/a": b"2",
        "keys/new": b"3",
        "gateways/a": None,  # its owner makes it again
    }
    held = {entry.key: entry for entry in await store.list("")}
    assert set(held) == {"desired/a", "groups/a", "keys/new"}
    assert held["groups/a"].version > version
    assert held == {entry.key: entry for entry in await newcomer.list("")}
    # Nobody's keeper takes the one store for another from here on.
    await newcomer.put("groups/a", b"3")
    assert (await store.get("groups/a")) == (await other.get("groups/a"))
    for task in keeping:
        task.cancel()


async def over_a_new_connection(call: Callable[[], Awaitable[T]]) -> T:
    """The first call after the server died may still take the connection that died with it."""
    try:
        return await call()
    except StoreLostError:
        raise
    except StoreError:
        return await call()


async def keeping(store: RedisStore) -> redis_store._Keeper:
    """A keeper that has seen all that is there, and sees no more: as one that the network has cut off."""
    keeper = redis_store._Keeper(store, KEPT)
    store._keepers.add(keeper)
    await look_again(keeper)
    return keeper


async def put_back(keeper: redis_store._Keeper) -> None:
    await over_a_new_connection(keeper.put_back)


async def look_again(keeper: redis_store._Keeper) -> None:
    entries = (await over_a_new_connection(keeper.snapshot))[1]
    keeper.held.clear()
    for entry in entries:
        keeper.learn(Change(*entry))


async def held(store: RedisStore) -> dict[str, bytes]:
    """What the store holds, once it is believed."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            with contextlib.suppress(StoreError):
                return {entry.key: entry.value for entry in await store.list("")}
            await asyncio.sleep(0.02)


async def births(*stores: RedisStore) -> set[bytes]:
    for store in stores:
        await held(store)
    return {store._birth for store in stores}


async def test_a_redis_that_comes_back_empty_twice_is_put_back_however_long_it_was_away_between(
    own_server: RedisServer, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "BELIEVED_S", 0.3)
    store, plain = await opened(), await opened()
    await store.put("desired/a", b"1")
    await held(plain)
    keeper = await keeping(store)
    for _ in range(2):
        for one in (store, plain):
            await lose_everything(own_server, one)
            with pytest.raises(StoreLostError):
                await one.get("desired/a")
        own_server.stop()
        with pytest.raises(StoreError):
            await plain.get("desired/a")
        await asyncio.sleep(0.4)
        own_server.start()
        for one in (store, plain):
            with pytest.raises(StoreLostError):
                await one.get("desired/a")
        await put_back(keeper)
        assert [await held(one) for one in (store, plain)] == [{"desired/a": b"1"}] * 2
        await look_again(keeper)


async def test_one_who_could_put_it_back_never_believes_an_empty_redis_that_takes_no_writes(
    own_server: RedisServer, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "BELIEVED_S", 0.2)
    store = await opened()
    await store.put("desired/a", b"1")
    keeper = await keeping(store)
    await lose_everything(own_server, store)
    newcomer = await opened()
    await newcomer._redis.config_set("min-replicas-to-write", "1")
    for _ in range(2):
        for _ in range(3):
            with pytest.raises(StoreLostError):
                await store.get("desired/a")
            await asyncio.sleep(0.15)
        with pytest.raises(StoreError, match="NOREPLICAS"):
            await keeper.put_back()
    await newcomer._redis.config_set("min-replicas-to-write", "0")
    await put_back(keeper)
    assert await held(store) == await held(newcomer) == {"desired/a": b"1"}


async def test_no_clock_says_which_store_is_the_older(own_server: RedisServer, opened: Opener) -> None:
    store, plain = await opened(), await opened()
    # As if the clock of the lost Redis had been an hour ahead of the new one's.
    revision = store._keys[4]
    await store.put("desired/a", b"0")
    await store._redis.set(revision, await store.revision() + 3600 * 1_000_000)
    version = await store.put("desired/a", b"1")
    keeper = await keeping(store)
    await held(plain)
    await lose_everything(own_server, store)
    newcomer = await opened()
    await newcomer.put("gateways/a", b"1")
    for one in (store, plain):
        with pytest.raises(StoreLostError):
            await one.get("desired/a")
    await put_back(keeper)
    assert await held(plain) == {"desired/a": b"1", "gateways/a": b"1"}
    assert len(await births(store, plain, newcomer)) == 1
    entry = await plain.get("desired/a")
    assert entry is not None
    assert entry.version > version  # a watch would take an earlier one for a change that it knows


@pytest.mark.parametrize("first", ["the old store's keeper", "the gap's keeper"])
async def test_keepers_of_two_stores_come_to_one_that_has_what_both_held(
    own_server: RedisServer, opened: Opener, first: str
) -> None:
    old, plain = await opened(), await opened()
    await old.put("groups/a", b"1")
    old_keeper = await keeping(old)
    await held(plain)
    await lose_everything(own_server, old)
    newcomer = await opened()  # takes the gap for the store
    await newcomer.put("keys/new", b"2")
    new_keeper = await keeping(newcomer)
    await lose_everything(own_server, newcomer)
    last = await opened()
    await last.put("keys/last", b"3")
    order = (old_keeper, new_keeper) if first == "the old store's keeper" else (new_keeper, old_keeper)
    await put_back(order[0])
    with pytest.raises(StoreLostError):
        await (newcomer if order[0] is old_keeper else old).get("any")
    await put_back(order[1])
    everything = {"groups/a": b"1", "keys/new": b"2", "keys/last": b"3"}
    everyone = [old, plain, newcomer, last, await opened()]
    assert [await held(one) for one in everyone] == [everything] * 5
    birth = await births(*everyone)
    assert len(birth) == 1
    # And it stays so: neither has more to say.
    version = await last.revision()
    for keeper in order:
        await put_back(keeper)
    assert await births(*everyone) == birth
    assert await last.revision() == version


async def test_a_gap_that_was_left_behind_does_not_come_back_as_the_store(
    own_server: RedisServer, opened: Opener
) -> None:
    store = await opened()
    await store.put("groups/a", b"1")
    keeper = await keeping(store)
    await lose_everything(own_server, store)
    newcomer = await opened()
    await newcomer.put("groups/b", b"of the gap")
    stale = await keeping(newcomer)
    await put_back(keeper)
    await look_again(keeper)
    await store.delete("groups/b")
    await look_again(keeper)
    await lose_everything(own_server, store)
    await put_back(stale)
    await put_back(keeper)  # it knows that the gap is no store of its own
    assert len(await births(store, newcomer)) == 1
    assert store._birth == keeper._birth
    assert await held(store) == await held(newcomer) == {"groups/a": b"1"}


async def test_one_who_knew_a_later_name_of_the_store_takes_the_earlier_one_that_its_own_keeper_holds(
    own_server: RedisServer, opened: Opener
) -> None:
    old, peer = await opened(), await opened()
    await old.put("groups/a", b"1")
    keeper, other = await keeping(old), await keeping(peer)
    await lose_everything(own_server, old)
    newcomer = await opened()
    await newcomer.put("keys/new", b"2")
    stranger = await keeping(newcomer)
    await lose_everything(own_server, newcomer)
    await put_back(stranger)
    await put_back(other)
    assert await held(old) == {"groups/a": b"1", "keys/new": b"2"}  # under the stranger's birth
    await lose_everything(own_server, old)
    await put_back(other)  # which has not listed the store since
    with pytest.raises(StoreLostError):
        await old.get("groups/a")
    await put_back(keeper)
    assert await held(old) == {"groups/a": b"1"}
    await put_back(stranger)
    assert await held(old) == await held(newcomer) == {"groups/a": b"1", "keys/new": b"2"}
    assert len(await births(old, peer, newcomer)) == 1


async def test_a_time_in_which_nobody_can_put_it_back_does_not_make_it_believed(
    own_server: RedisServer, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "BELIEVED_S", 0.3)
    plain = await opened()
    await plain.put("groups/a", b"1")
    await lose_everything(own_server, plain)
    with pytest.raises(StoreLostError):
        await plain.get("groups/a")
    plain._deadline = 0.5
    with own_server.frozen(), pytest.raises(StoreError, match="gave no answer"):
        await plain.get("groups/a")
    with pytest.raises(StoreLostError):
        await plain.get("groups/a")
    assert await held(plain) == {}


async def test_each_new_emptiness_is_doubted_for_itself(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_store, "BELIEVED_S", 0.3)
    plain = await opened()
    for _ in range(3):
        await plain._redis.flushall()  # no connection breaks
        with pytest.raises(StoreLostError):
            await plain.get("groups/a")
        await asyncio.sleep(0.2)
    assert await held(plain) == {}


async def test_one_who_believed_comes_back_when_the_store_does(
    own_server: RedisServer, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "BELIEVED_S", 0.2)
    store, plain = await opened(), await opened()
    await store.put("groups/a", b"1")
    keeper = await keeping(store)
    await held(plain)
    await lose_everything(own_server, plain)
    assert await held(plain) == {}
    await plain.put("keys/new", b"2")
    await put_back(keeper)
    assert await held(plain) == await held(store) == {"groups/a": b"1", "keys/new": b"2"}
    assert len(await births(plain, store)) == 1


async def test_a_new_fleet_in_the_same_redis_gets_nothing_of_the_one_before(
    own_server: RedisServer, opened: Opener
) -> None:
    old = await opened()
    await old.put("desired/old", b"1")
    await old.put("keys/a", b"1")
    task = asyncio.create_task(old.keep())
    up = await opened()
    for entry in await up.list("desired/"):
        await up.delete(entry.key)
    await up.put("desired/new", b"2")
    keeper = await keeping(up)
    await lose_everything(own_server, up)
    await put_back(keeper)
    expected = {"desired/new": b"2", "keys/a": b"1"}
    assert await held(up) == await held(old) == expected
    task.cancel()


async def test_one_who_saw_more_corrects_what_was_put_back_too_old(own_server: RedisServer, opened: Opener) -> None:
    cut_off, informed, plain = [await opened() for _ in range(3)]
    for key in ("keys/revoked", "epochs/a", "groups/same", "groups/written", "groups/deleted"):
        await plain.put(key, b"old")
    early = await keeping(cut_off)
    await plain.delete("keys/revoked")
    for key in ("epochs/a", "keys/late", "groups/written"):
        await plain.put(key, b"new")
    late = await keeping(informed)
    await lose_everything(own_server, plain)
    await put_back(early)
    assert set(await held(plain)) == {"keys/revoked", "epochs/a", "groups/same", "groups/written", "groups/deleted"}
    await plain.put("groups/written", b"since")
    await plain.delete("groups/deleted")
    await look_again(late)
    expected = {"epochs/a": b"new", "keys/late": b"new", "groups/same": b"old", "groups/written": b"since"}
    assert [await held(one) for one in (cut_off, informed, plain)] == [expected] * 3
    # Nobody puts it back to what it was.
    await look_again(early)
    await put_back(early)
    await put_back(late)
    assert await held(plain) == expected


async def test_one_who_saw_less_changes_nothing(own_server: RedisServer, opened: Opener) -> None:
    cut_off, informed = await opened(), await opened()
    await informed.put("keys/revoked", b"1")
    early = await keeping(cut_off)
    await informed.put("keys/a", b"1")
    await informed.delete("keys/revoked")
    late = await keeping(informed)
    await lose_everything(own_server, informed)
    await put_back(late)
    await put_back(early)
    await look_again(early)
    assert await held(cut_off) == await held(informed) == {"keys/a": b"1"}


async def test_what_was_put_back_long_ago_is_not_corrected(own_server: RedisServer, opened: Opener) -> None:
    cut_off, informed = await opened(), await opened()
    await informed.put("keys/a", b"1")
    early = await keeping(cut_off)
    await informed.put("keys/late", b"1")
    late = await keeping(informed)
    await lose_everything(own_server, informed)
    await put_back(early)
    await cut_off._redis.hset(cut_off._keys[8], "\nuntil", "1")
    await put_back(late)
    await look_again(late)
    assert await held(informed) == {"keys/a": b"1"}


async def test_two_losses_in_a_row_under_running_keepers_lose_nothing(
    own_server: RedisServer, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_store, "BELIEVED_S", 0.5)
    stores = [await opened() for _ in range(3)]
    await stores[0].put("desired/a", b"1")
    tasks = [asyncio.create_task(store.keep()) for store in stores[:2]]
    async with asyncio.timeout(WITHIN_S):
        while not all(any(keeper.held for keeper in store._keepers) for store in stores[:2]):
            await asyncio.sleep(0.01)
    await lose_everything(own_server, stores[0])
    for store in stores:
        with contextlib.suppress(StoreError):
            await store.get("desired/a")
    own_server.stop()
    await asyncio.sleep(0.6)
    own_server.start()
    for store in stores:
        async with asyncio.timeout(WITHIN_S):
            async for change in store.watch("desired/"):
                assert change.value == b"1"
                break
    assert len(await births(*stores, await opened())) == 1
    for task in tasks:
        task.cancel()
