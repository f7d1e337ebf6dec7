"""Both stores keep the same promises."""

from __future__ import annotations

import asyncio
import itertools
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from support.redis_server import RedisServer, Silence
from tandem.state import Change, Store, StoreError, open_store

Opener = Callable[..., Awaitable[Store]]
_fleets = itertools.count()


@pytest.fixture(params=["embedded", "redis"])
async def open_again(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Opener]:
    """Open one more client of the same, at first empty, store."""
    url = "embedded" if request.param == "embedded" else request.getfixturevalue("redis_server").url
    own_fleet = f"fleet-{next(_fleets)}"
    opened: list[Store] = []

    async def open_one(fleet: str = own_fleet) -> Store:
        opened.append(await open_store(url, fleet=fleet, folder=tmp_path, deadline=5))
        return opened[-1]

    yield open_one
    for store in opened:
        await store.close()


@pytest.fixture
async def store(open_again: Opener) -> Store:
    return await open_again()


async def take(watch: AsyncIterator[Change], count: int, within: float = 10) -> list[Change]:
    async with asyncio.timeout(within):
        return [await anext(watch) for _ in range(count)]


async def gone(store: Store, key: str) -> None:
    """Return when `key` has expired, as a watch tells."""
    async with asyncio.timeout(10):
        async for change in store.watch(key):
            if change.value is None:
                return


async def test_a_value_comes_back_as_it_was_written(store: Store) -> None:
    value = bytes(range(256))
    version = await store.put("groups/ä:1", value)
    assert await store.get("groups/ä:1") == ("groups/ä:1", value, version)


async def test_what_was_never_written_is_not_there(store: Store) -> None:
    assert await store.get("nothing") is None
    assert not await store.delete("nothing")
    assert not await store.touch("nothing", 10)
    assert await store.list("") == []
    assert await store.revision() == 0


async def test_another_client_sees_it_at_once(store: Store, open_again: Opener) -> None:
    other = await open_again()
    await store.put("k", b"1")
    entry = await other.get("k")
    assert entry is not None
    assert entry.value == b"1"
    assert await other.delete("k")
    assert await store.get("k") is None


async def test_versions_rise_and_never_come_back(store: Store) -> None:
    first = await store.put("k", b"1")
    second = await store.put("k", b"1")
    await store.delete("k")
    third = await store.put("k", b"1")
    assert 0 < first < second < third == await store.revision()


async def test_fleets_do_not_see_each_other(store: Store, open_again: Opener) -> None:
    stranger = await open_again("another")
    await store.put("k", b"mine")
    assert await stranger.get("k") is None
    assert await stranger.list("") == []


async def test_a_prefix_is_taken_letter_by_letter(store: Store) -> None:
    keys = ["a*b/1", "a[b]/1", "a?/1", "ab/1", "a\\/1", "a%/1", "a_/1", "ä/1"]
    for key in keys:
        await store.put(key, b"")
    for key in keys:
        assert [entry.key for entry in await store.list(key[:-1])] == [key]
    assert [entry.key for entry in await store.list("")] == sorted(keys)


async def test_keys_that_no_store_could_hold_are_refused(store: Store) -> None:
    for key in ("", "line\nbreak", "x" * 513):
        with pytest.raises(ValueError, match="printable"):
            await store.put(key, b"")


async def test_compare_and_set_makes_only_what_is_not_there(store: Store) -> None:
    version = await store.compare_and_set("k", b"1", version=0)
    assert version
    assert await store.compare_and_set("k", b"2", version=0) is None
    assert await store.get("k") == ("k", b"1", version)


async def test_compare_and_set_changes_and_deletes_only_the_named_version(store: Store) -> None:
    first = await store.put("k", b"1")
    second = await store.compare_and_set("k", b"2", version=first)
    assert second
    assert await store.compare_and_set("k", b"3", version=first) is None
    assert await store.compare_and_set("k", None, version=first) is None
    assert await store.compare_and_set("k", None, version=second) == 0
    assert await store.get("k") is None


async def test_of_two_racing_writers_exactly_one_wins_each_round(store: Store, open_again: Opener) -> None:
    other = await open_again()
    version = await store.put("k", b"")
    for _ in range(20):
        outcomes = await asyncio.gather(
            store.compare_and_set("k", b"a", version=version), other.compare_and_set("k", b"b", version=version)
        )
        (version,) = [outcome for outcome in outcomes if outcome]


async def test_no_increment_is_lost_between_racing_counters(store: Store, open_again: Opener) -> None:
    async def count(client: Store) -> None:
        done = 0
        while done < 10:
            entry = await client.get("n")
            value, version = (int(entry.value), entry.version) if entry else (0, 0)
            if await client.compare_and_set("n", b"%d" % (value + 1), version=version):
                done += 1

    await asyncio.gather(count(store), count(await open_again()), count(await open_again()))
    entry = await store.get("n")
    assert entry is not None
    assert entry.value == b"30"


async def test_an_entry_is_gone_when_its_time_is_up(store: Store) -> None:
    await store.put("k", b"1", ttl=0.1)
    assert await store.get("k")
    await gone(store, "k")
    assert await store.get("k") is None
    assert await store.list("") == []
    assert await store.compare_and_set("k", b"2", version=0)


async def test_a_touch_prolongs_a_life_without_being_a_change(store: Store) -> None:
    version = await store.put("kept", b"", ttl=0.1)
    await store.put("lost", b"", ttl=0.2)
    assert await store.touch("kept", 60)
    await gone(store, "lost")
    assert await store.get("kept") == ("kept", b"", version)


async def test_a_new_value_without_ttl_stays(store: Store) -> None:
    await store.put("k", b"", ttl=0.1)
    await store.put("k", b"new")
    await store.put("clock", b"", ttl=0.2)
    await gone(store, "clock")
    assert await store.get("k")


async def test_a_watch_tells_what_is_there_then_every_change_in_order(store: Store, open_again: Opener) -> None:
    writer = await open_again()
    await store.put("groups/b", b"0")
    await store.put("groups/a", b"0")
    await store.put("other/x", b"0")
    watch = store.watch("groups/")
    assert [change.key for change in await take(watch, 2)] == ["groups/a", "groups/b"]

    await writer.put("other/x", b"1")
    versions = [await writer.put("groups/a", b"1"), await writer.put("groups/a", b"2", ttl=0.2)]
    await writer.delete("groups/b")
    seen = await take(watch, 4)

    assert [(key, value) for key, value, _ in seen] == [
        ("groups/a", b"1"),
        ("groups/a", b"2"),
        ("groups/b", None),
        ("groups/a", None),
    ]
    assert [change.version for change in seen[:2]] == versions
    assert sorted(change.version for change in seen) == [change.version for change in seen]


async def test_every_watch_hears_of_an_expiry_once(store: Store, open_again: Opener) -> None:
    watches = [store.watch("k"), store.watch(""), (await open_again()).watch("k")]
    await store.put("k", b"", ttl=0.2)
    await store.put("k/end", b"")
    for watch in watches:
        await take(watch, 2)
    heard = await asyncio.gather(*(take(watch, 1) for watch in watches))
    assert len({change for (change,) in heard}) == 1
    await store.put("k/end", b"1")
    for watch in watches:
        assert [change.key for change in await take(watch, 1)] == ["k/end"]


async def test_a_change_wakes_a_watch_quickly(store: Store, open_again: Opener) -> None:
    writer, watch = await open_again(), store.watch("k")
    await writer.put("k", b"")
    await take(watch, 1)
    delays = []
    for _ in range(5):
        waiting = asyncio.ensure_future(take(watch, 1))
        await asyncio.sleep(0.02)  # let it fall asleep
        start = time.monotonic()
        await writer.put("k", b"")
        await waiting
        delays.append(time.monotonic() - start)
    assert min(delays) < 0.05
    assert max(delays) < 1  # the periodic look would take two seconds


async def test_an_open_watch_costs_next_to_nothing(store: Store) -> None:
    await store.put("k", b"", ttl=60)
    watch = store.watch("")
    await take(watch, 1)
    waiting = asyncio.ensure_future(anext(watch))
    start = time.process_time()
    await asyncio.wait([waiting], timeout=2.5)
    assert time.process_time() - start < 0.05
    waiting.cancel()


async def test_a_watch_that_fell_far_behind_still_ends_up_right(store: Store) -> None:
    await store.put("deleted", b"")
    await store.put("changed", b"old")
    watch = store.watch("")
    await take(watch, 2)
    await store.delete("deleted")
    for number in range(0, 5000, 100):
        await asyncio.gather(*(store.put("changed", b"%d" % n) for n in range(number, number + 100)))
    await store.put("changed", b"last")
    state: dict[str, bytes | None] = {}
    async with asyncio.timeout(10):
        while state != {"deleted": None, "changed": b"last"}:
            key, state[key], _ = await anext(watch)


async def test_closing_ends_the_watches(store: Store) -> None:
    async def drain() -> list[Change]:
        return [change async for change in store.watch("")]

    await store.put("k", b"")
    waiting = asyncio.ensure_future(drain())
    await asyncio.sleep(0.05)
    await store.close()
    assert len(await asyncio.wait_for(waiting, 5)) == 1
    with pytest.raises(StoreError, match="closed"):
        await store.get("k")


_OTHER_PROCESS = """
import asyncio, pathlib, sys
from tandem.state import open_store

async def main():
    store = await open_store("embedded", fleet="f", folder=pathlib.Path(sys.argv[1]))
    await store.put(f"from/{sys.argv[2]}", b"hello")
    for _ in range(20):
        while True:
            entry = await store.get("n")
            value, version = (int(entry.value), entry.version) if entry else (0, 0)
            if await store.compare_and_set("n", b"%d" % (value + 1), version=version):
                break

asyncio.run(main())
"""


async def test_processes_share_an_embedded_store(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", _OTHER_PROCESS, str(tmp_path)]
    children = [await asyncio.create_subprocess_exec(*arguments, str(number)) for number in range(2)]
    store = await open_store("embedded", fleet="f", folder=tmp_path)
    try:
        heard = await take(store.watch("from/"), 2, within=30)
        assert {change.key for change in heard} == {"from/0", "from/1"}
        assert [await asyncio.wait_for(child.wait(), 30) for child in children] == [0, 0]
        entry = await store.get("n")
        assert entry is not None
        assert entry.value == b"40"
    finally:
        await store.close()
        for child in children:
            if child.returncode is None:
                child.kill()
                await child.wait()


async def test_an_embedded_store_outlives_its_processes(tmp_path: Path) -> None:
    first = await open_store("embedded", fleet="f", folder=tmp_path)
    version = await first.put("k", b"1")
    await first.close()
    second = await open_store("embedded", fleet="f", folder=tmp_path)
    assert await second.get("k") == ("k", b"1", version)
    await second.close()


async def test_a_damaged_state_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "f.state.db").write_bytes(os.urandom(8192))
    with pytest.raises(StoreError, match=r"f\.state\.db cannot be used: .*not a database.*remove"):
        await open_store("embedded", fleet="f", folder=tmp_path)


@pytest.mark.parametrize("url", ["redis://:hunter2@127.0.0.1:1/0", "unix://:hunter2@/nowhere/redis.sock"])
async def test_an_absent_redis_is_reported_at_once(tmp_path: Path, url: str) -> None:
    with pytest.raises(StoreError, match=r"Redis at .* cannot be used: .* state\.url") as caught:
        await open_store(url, fleet="f", folder=tmp_path)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is caught.value.__context__ is None


async def test_a_silent_redis_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    with Silence() as port:
        start = time.monotonic()
        with pytest.raises(StoreError, match=r"gave no answer within 0\.3 s"):
            await open_store(f"redis://127.0.0.1:{port}/0", fleet="f", folder=tmp_path, deadline=0.3)
        assert time.monotonic() - start < 2


async def test_a_late_answer_is_not_taken_for_the_next_one(redis_server: RedisServer, tmp_path: Path) -> None:
    store = await open_store(redis_server.url, fleet="late", folder=tmp_path, deadline=0.3)
    await store.put("a", b"a")
    await store.put("b", b"b")
    with redis_server.frozen(), pytest.raises(StoreError, match="gave no answer"):
        await store.get("a")
    entry = await store.get("b")
    assert entry is not None
    assert entry.value == b"b"
    await store.close()


async def test_a_wrong_password_is_not_told_on(redis_server: RedisServer, tmp_path: Path) -> None:
    url = redis_server.url.replace("unix://", "unix://:hunter2@")
    with pytest.raises(StoreError) as caught:
        await open_store(url, fleet="f", folder=tmp_path)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["redis://:hun/ter2@host:1", "http://:hunter2@host", "redis://h:hunter2"])
async def test_an_url_that_is_none_is_refused_without_being_repeated(tmp_path: Path, url: str) -> None:
    with pytest.raises(StoreError, match=r"state\.url|Redis at") as caught:
        await open_store(url, fleet="f", folder=tmp_path, deadline=0.5)
    assert "ter2" not in str(caught.value)


async def test_a_fleet_name_that_could_escape_its_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot name a fleet"):
        await open_store("embedded", fleet="../x", folder=tmp_path)
