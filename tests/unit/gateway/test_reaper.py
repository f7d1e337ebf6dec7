"""What a dead gateway has left on the engines is aborted by those that live."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engine_standin import Engine, engine

from tandem.core.types import FleetSnapshot, GatewayReplica, Group, GroupState, Role
from tandem.engine.client import EngineClient
from tandem.gateway.survival.reaper import Reaper
from tandem.gateway.survival.registration import Registration
from tandem.state import Store, StoreError, open_store


def record(name: str) -> GatewayReplica:
    return GatewayReplica(replica=name, url="http://127.0.0.1:1", pid=1, incarnation=f"of-{name}")


@dataclass
class Fleet:
    """A store, two engines, and the reaper of gateway `me`."""

    store: Store
    engines: list[Engine]
    client: EngineClient
    groups: list[Group] = field(default_factory=list)
    unsteady_until: float = 0.0

    async def run(self, name: str, *, dead: bool = False) -> None:
        """The gateway has registered, and has died since if `dead`."""
        await self.store.put(f"gateways/{name}", msgspec.json.encode(record(name)))
        await self.store.put(f"incarnations/of-{name}", name.encode())
        if dead:
            await self.store.delete(f"gateways/{name}")

    @contextlib.asynccontextmanager
    async def reaper(self, name: str = "me") -> AsyncIterator[Reaper]:
        made = Reaper(
            self.store,
            self.client,
            lambda: FleetSnapshot(groups=tuple(self.groups)),
            incarnation=f"of-{name}",
            steady_at=lambda: self.unsteady_until,
            again_s=0.01,
            give_up_s=0.2,
        )
        task = asyncio.create_task(made.work())
        yield made
        task.cancel()
        await asyncio.wait([task])

    async def reaped(self, name: str) -> None:
        """Wait until nothing of it is left."""
        async with asyncio.timeout(5):
            while await self.store.get(f"incarnations/of-{name}") is not None:
                await asyncio.sleep(0.005)

    def aborted(self) -> list[list[str]]:
        return [one.aborted for one in self.engines]


@pytest.fixture
async def fleet(tmp_path: Path) -> AsyncIterator[Fleet]:
    async with engine("prefill") as prefill, engine("decode") as decode:
        store = await open_store("embedded", fleet="t", folder=tmp_path)
        client = EngineClient(connect_s=0.5)
        made = Fleet(store, [prefill, decode], client)
        for one in made.engines:
            made.groups.append(Group(group=one.role, role=Role(one.role), epoch=1, state=GroupState.READY, url=one.url))
        yield made
        await client.close()
        await store.close()


async def test_a_dead_gateways_requests_are_aborted_on_every_engine_and_once_more(fleet: Fleet) -> None:
    await fleet.run("me")
    await fleet.run("other", dead=True)
    async with fleet.reaper():
        await fleet.reaped("other")
    assert fleet.aborted() == [["of-other-*"] * 2] * 2
    assert await fleet.store.get("reaped/of-other") is not None


async def test_those_that_live_are_left_alone(fleet: Fleet) -> None:
    await fleet.run("me")
    await fleet.run("other")
    await fleet.run("third", dead=True)
    async with fleet.reaper():
        await fleet.reaped("third")
    assert {rid for aborted in fleet.aborted() for rid in aborted} == {"of-third-*"}


async def test_a_gateway_that_dies_later_is_noticed(fleet: Fleet) -> None:
    await fleet.run("other")
    async with fleet.reaper() as reaper:
        await fleet.store.delete("gateways/other")
        reaper.look()
        await fleet.reaped("other")
    assert fleet.aborted() == [["of-other-*"] * 2] * 2


async def test_several_reapers_do_no_harm(fleet: Fleet) -> None:
    await fleet.run("other", dead=True)
    async with fleet.reaper("me"), fleet.reaper("you"):
        await fleet.reaped("other")
    assert {rid for aborted in fleet.aborted() for rid in aborted} == {"of-other-*"}


async def test_one_that_comes_back_keeps_its_incarnation(fleet: Fleet) -> None:
    await fleet.run("other", dead=True)
    async with fleet.reaper():
        await fleet.engines[1].until(lambda: fleet.engines[1].aborted)
        await fleet.run("other")
        if tasks := reaping("of-other"):
            await asyncio.wait(tasks, timeout=5)
    assert await fleet.store.get("incarnations/of-other") is not None


async def test_while_the_store_has_just_been_away_nobody_is_dead(fleet: Fleet) -> None:
    await fleet.run("other", dead=True)
    fleet.unsteady_until = asyncio.get_running_loop().time() + 0.2
    async with fleet.reaper() as reaper:
        reaper.look()
        await asyncio.sleep(0.05)
        assert fleet.aborted() == [[], []]
        await fleet.reaped("other")


async def test_an_engine_that_does_not_answer_is_given_up(fleet: Fleet) -> None:
    await fleet.run("other", dead=True)
    fleet.groups[0] = msgspec.structs.replace(fleet.groups[0], url="http://127.0.0.1:1")
    async with fleet.reaper():
        await fleet.reaped("other")
    assert fleet.aborted() == [[], ["of-other-*"] * 2]


async def test_a_group_that_is_gone_is_not_waited_for(fleet: Fleet) -> None:
    await fleet.run("other", dead=True)
    fleet.groups[0] = msgspec.structs.replace(fleet.groups[0], state=GroupState.FAILED)
    async with fleet.reaper():
        await fleet.reaped("other")
    assert fleet.aborted() == [[], ["of-other-*"] * 2]


def reaping(incarnation: str) -> set[asyncio.Task[Any]]:
    return {task for task in asyncio.all_tasks() if task.get_name() == f"reap-{incarnation}"}


async def registered(store: Store, name: str) -> tuple[Registration, asyncio.Task[None]]:
    made, done = Registration(store, record(name), lease_s=0.3), asyncio.Event()
    task = asyncio.create_task(made.keep(done.set))
    await done.wait()
    return made, task


async def test_a_replica_is_registered_until_it_leaves(fleet: Fleet) -> None:
    made, task = await registered(fleet.store, "me")
    entry = await fleet.store.get("gateways/me")
    assert entry is not None
    assert msgspec.json.decode(entry.value, type=GatewayReplica) == record("me")
    assert await fleet.store.get("incarnations/of-me") is not None
    task.cancel()
    await made.leave()
    assert await fleet.store.list("") == []


async def test_a_replica_that_stops_is_no_gateway_but_lives_until_it_has_left(fleet: Fleet) -> None:
    made, task = await registered(fleet.store, "other")
    await made.retire()
    await fleet.run("third", dead=True)
    async with fleet.reaper():
        await fleet.reaped("third")
    assert {rid for aborted in fleet.aborted() for rid in aborted} == {"of-third-*"}
    assert await fleet.store.list("gateways/") == []
    task.cancel()
    await made.leave()
    assert [entry.key for entry in await fleet.store.list("")] == ["reaped/of-third"]


async def test_a_replica_that_dies_leaves_its_incarnation(fleet: Fleet) -> None:
    _, task = await registered(fleet.store, "other")
    task.cancel()
    async with fleet.reaper() as reaper, asyncio.timeout(5):
        async for change in fleet.store.watch("gateways/"):
            if change.value is None:
                break
        reaper.look()
        await fleet.reaped("other")


async def test_a_replica_that_was_thought_dead_is_there_again_and_hears_of_it(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    _, task = await registered(fleet.store, "me")
    await fleet.store.delete("gateways/me")
    await fleet.store.delete("incarnations/of-me")
    await fleet.store.put("reaped/of-me", b"me")
    async with asyncio.timeout(5):
        while await fleet.store.get("reaped/of-me") is not None:
            await asyncio.sleep(0.005)
    task.cancel()
    assert [entry.key for entry in await fleet.store.list("")] == ["gateways/me", "incarnations/of-me"]
    assert "took this one for dead" in caplog.text


async def test_a_store_that_is_away_makes_the_replica_doubt(fleet: Fleet) -> None:
    made, task = await registered(fleet.store, "me")
    now = asyncio.get_running_loop().time()
    assert made.steady_at < now
    await fleet.store.close()
    async with asyncio.timeout(5):
        while made.steady_at < now:
            await asyncio.sleep(0.005)
    task.cancel()


@pytest.mark.parametrize("garbage", [b"no gateway", b'{"replica": "\xff", "url": ""}'])
async def test_while_an_entry_cannot_be_read_nobody_is_taken_for_dead(fleet: Fleet, garbage: bytes) -> None:
    await fleet.run("other", dead=True)
    await fleet.store.put("gateways/third", garbage)
    async with fleet.reaper() as reaper:
        reaper.look()
        await asyncio.sleep(0.05)
        assert fleet.aborted() == [[], []]
        # The reaper is still there.
        await fleet.store.delete("gateways/third")
        reaper.look()
        await fleet.reaped("other")


class Failing:
    """A store in which one write fails."""

    def __init__(self, store: Store, key: str) -> None:
        self._store = store
        self._key = key
        self.failed = asyncio.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def put(self, key: str, value: bytes, **fields: Any) -> Any:
        if key == self._key and not self.failed.is_set():
            self.failed.set()
            raise StoreError("it is away")
        return await self._store.put(key, value, **fields)


async def test_an_incarnation_that_could_not_be_written_is_written_later(fleet: Fleet) -> None:
    store: Any = Failing(fleet.store, "incarnations/of-me")
    _, task = await registered(store, "me")
    assert store.failed.is_set()
    async with asyncio.timeout(5):
        while await fleet.store.get("incarnations/of-me") is None:
            await asyncio.sleep(0.005)
    task.cancel()
