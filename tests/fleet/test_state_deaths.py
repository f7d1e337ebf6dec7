"""Redis dies, hangs, or comes back empty under a controller with living groups, and under a gateway with streams."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import orjson
import psutil
import pytest
import ray
import script_engine
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from bench.gateway.standin import Connection, Token
from bench.gateway.standin import Fleet as Engines
from support.redis_server import RedisServer
from tandem.config import FleetConfig
from tandem.core.group import Policy
from tandem.core.types import Group, GroupSpec, GroupState, Role
from tandem.engine.http1 import Pool, Response
from tandem.fleet.cluster import LocalCluster, connect, disconnect
from tandem.fleet.control_client import ControlClient
from tandem.fleet.controller import CONTROL_KEY, ControlAddress, Controller, ControllerSettings, start_controller
from tandem.fleet.hands import HandsSettings
from tandem.fleet.rank import RankSettings
from tandem.fleet.snapshot import FLEET_KEY, FleetRecord
from tandem.gateway.access.keys import keep, mint
from tandem.gateway.replica import GatewayReplica
from tandem.state import Store, StoreError, open_store
from unit.gateway.gateway_model import model_folder

cloudpickle.register_pickle_by_value(script_engine)  # the controller's process cannot import it

pytestmark = pytest.mark.timeout(120)

FLEET = "test"
WITHIN_S = 40.0
EVERYTHING = {"control", "fleet", "desired/prefill-0", "desired/decode-0", "groups/prefill-0", "groups/decode-0"}


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    server = RedisServer()
    server.start()
    yield server
    server.remove()


async def opened(redis: RedisServer) -> Store:
    return await open_store(redis.url, fleet=FLEET, folder=Path("unused"), deadline=2)


# The controller


@pytest.fixture(scope="module")
def controller(redis: RedisServer) -> Iterator[ActorHandle[Controller]]:
    """Of two groups of two ranks each, whose engine is a small script."""
    with tempfile.TemporaryDirectory(prefix="tandem-") as name:
        folder = Path(name)
        cluster = LocalCluster.start(folder, 4)
        try:
            connect(cluster.address, namespace=FLEET)
            made = start_controller(
                ControllerSettings(
                    fleet=FleetRecord(name=FLEET, model_name="script"),
                    store_url=redis.url,
                    store_folder=name,
                    engines=script_engine.ScriptEngines(str(folder / "rooms")),
                    hands=HandsSettings(rank=RankSettings(logs=str(folder / "logs"), scratch=name)),
                    policy=Policy(start=30, settle=0.2, backoff=0.1, backoff_most=0.5),
                    control_port=0,
                    log=str(folder / "logs" / "controller.log"),
                )
            )
            ray.get(made.ready.remote(WITHIN_S))
            yield made
        finally:
            disconnect()
            cluster.stop()


@pytest.fixture
async def pair(controller: ActorHandle[Controller], redis: RedisServer) -> list[Group]:
    """The two groups, ready."""
    store = await opened(redis)
    try:
        async with await control_of(store) as control:
            for role in Role:
                await control.put_group(GroupSpec(group=f"{role}-0", role=role, nodes=2))
        return [await until(store, f"{role}-0", is_ready) for role in Role]
    finally:
        await store.close()


async def control_of(store: Store) -> ControlClient:
    entry = await store.get(CONTROL_KEY)
    assert entry is not None
    return ControlClient(msgspec.json.decode(entry.value, type=ControlAddress).address)


def is_ready(group: Group) -> bool:
    return group.state is GroupState.READY


async def until(store: Store, name: str, holds: Callable[[Group], bool]) -> Group:
    """The group as soon as it is as wanted."""
    async with asyncio.timeout(WITHIN_S):
        async for change in store.watch(f"groups/{name}"):
            if change.value is not None and holds(group := msgspec.json.decode(change.value, type=Group)):
                return group
    raise AssertionError("the watch ended")


async def until_whole(redis: RedisServer) -> Store:
    """The store, as one sees it who comes now and knew nothing, once everything is there again."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            with contextlib.suppress(StoreError):
                store = await opened(redis)
                if {entry.key for entry in await store.list("")} >= EVERYTHING:
                    return store
                await store.close()
            await asyncio.sleep(0.1)


def pids(*groups: Group) -> list[int]:
    return [rank.pid for group in groups for rank in group.ranks]


def living(*groups: Group) -> list[int]:
    return [pid for pid in pids(*groups) if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


def decoded(entries: dict[str, bytes]) -> dict[str, Group]:
    return {key: msgspec.json.decode(value, type=Group) for key, value in entries.items() if key.startswith("groups/")}


async def test_a_redis_that_comes_back_empty_has_all_again_and_no_rank_notices(
    pair: list[Group], redis: RedisServer
) -> None:
    store = await opened(redis)
    before = {entry.key: entry.value for entry in await store.list("")}
    redis.stop()
    await store.close()
    redis.start()
    store = await until_whole(redis)
    assert {entry.key: entry.value for entry in await store.list("")} == before
    # The controller looks around every ten seconds: it must have done so, and ended nothing.
    os.kill(pair[1].ranks[1].pid, signal.SIGKILL)
    again = await until(store, "decode-0", lambda it: is_ready(it) and it.epoch > pair[1].epoch)
    assert again.epoch == pair[1].epoch + 1
    assert living(pair[0]) == pids(pair[0])
    async with await control_of(store) as control:
        await control.cordon("prefill-0", True)
        await until(store, "prefill-0", lambda it: it.state is GroupState.CORDONED)
        await control.cordon("prefill-0", False)
    assert pids(await until(store, "prefill-0", is_ready)) == pids(pair[0])
    await store.close()


async def test_an_empty_redis_ends_no_group_when_the_controller_compares_wishes(
    controller: ActorHandle[Controller], pair: list[Group], redis: RedisServer
) -> None:
    redis.stop()
    await asyncio.sleep(11)  # one comparison of wishes and groups falls into the outage: nothing tells of it
    redis.start()
    store = await until_whole(redis)
    await controller.ready.remote(WITHIN_S)
    found = decoded({entry.key: entry.value for entry in await store.list("groups/")})
    assert list(found.values()) == sorted(pair, key=lambda group: group.group)
    assert living(*pair) == pids(*pair)
    await store.close()


async def test_a_rank_that_dies_while_redis_is_away_is_noticed_when_it_is_back(
    pair: list[Group], redis: RedisServer
) -> None:
    redis.stop()
    os.kill(pair[1].ranks[0].pid, signal.SIGKILL)
    await asyncio.sleep(1)
    redis.start()
    store = await until_whole(redis)
    again = await until(store, "decode-0", lambda it: is_ready(it) and it.epoch > pair[1].epoch)
    assert again.epoch == pair[1].epoch + 1
    assert living(pair[0]) == pids(pair[0])
    await store.close()


async def test_a_redis_that_hangs_longer_than_the_deadline_changes_nothing(
    controller: ActorHandle[Controller], pair: list[Group], redis: RedisServer
) -> None:
    with redis.frozen():
        await asyncio.sleep(7)  # the controller's calls give up after five
        assert living(*pair) == pids(*pair)
    store = await until_whole(redis)
    await controller.ready.remote(WITHIN_S)
    assert [await until(store, group.group, is_ready) for group in pair] == pair
    await store.close()


async def test_controller_and_redis_may_die_together_while_a_gateway_keeps_the_state(
    controller: ActorHandle[Controller], pair: list[Group], redis: RedisServer
) -> None:
    gateway = await opened(redis)
    keeping = asyncio.create_task(gateway.keep())
    await until(gateway, "decode-0", is_ready)
    await asyncio.sleep(0.5)  # the keeper has a watch of its own
    redis.stop()
    os.kill(await controller.pid.remote(), signal.SIGKILL)
    redis.start()
    store = await until_whole(redis)
    async with asyncio.timeout(WITHIN_S):
        while True:
            with contextlib.suppress(RayActorError):  # Ray is about to start it again
                await controller.ready.remote(WITHIN_S)
                break
            await asyncio.sleep(0.1)
    assert [await until(store, group.group, is_ready) for group in pair] == pair
    assert living(*pair) == pids(*pair)
    keeping.cancel()
    await gateway.close()
    await store.close()


# The gateway


@dataclass
class Service:
    """A gateway with a key, over stand-in engines."""

    url: str
    key: str
    engines: Engines
    pool: Pool = field(default_factory=Pool)

    async def ask(self, tokens: int, *, begun: asyncio.Event | None = None) -> tuple[int, str]:
        """Status and text of a streamed answer; `begun` is set with its first token."""
        body = orjson.dumps({"model": "tiny", "prompt": [5, 6], "max_tokens": tokens, "stream": True})
        headers = [(b"authorization", b"Bearer " + self.key.encode())]
        answer = self.pool.begin("POST", f"{self.url}/v1/completions", body=body, headers=headers)
        response = answer if isinstance(answer, Response) else await answer
        status = await response.head(WITHIN_S)
        pieces = [await response.chunk(WITHIN_S) or b""]
        if begun is not None:
            begun.set()
        pieces.append(await response.read(WITHIN_S))
        events = [event.removeprefix(b"data: ") for event in b"".join(pieces).split(b"\n\n")]
        found = [orjson.loads(event) for event in events if event.startswith(b"{")]
        return status, "".join(choice["text"] for event in found for choice in event.get("choices", ()))


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[tuple[Service, RedisServer]]:
    redis = RedisServer()
    redis.start()
    config = FleetConfig.model_validate(
        {
            "name": FLEET,
            "gateway": {"port": 0, "grpc_port": 0, "auth": "required"},
            "tenants": {"acme": {"requests_per_minute": 1000}},
            "state": {"url": redis.url},
            "metering": {"sink": "off"},
        }
    )
    model_folder(tmp_path / "tiny")
    loop = asyncio.get_running_loop()
    store = await opened(redis)
    engines = Engines([Token(70, "C")], 20, 50)
    servers = []
    for role in Role:
        server = await loop.create_server(lambda role=role: Connection(engines, role.value, 1), "127.0.0.1", 0)
        servers.append(server)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        group = Group(group=f"{role}-0", role=role, epoch=1, state=GroupState.READY, url=url)
        await store.put(f"groups/{group.group}", msgspec.json.encode(group))
        spec = GroupSpec(group=group.group, role=role, nodes=1)
        await store.put(f"desired/{group.group}", msgspec.json.encode(spec))
    for key in (CONTROL_KEY, FLEET_KEY):
        await store.put(key, b"{}")
    record, key = mint("acme", now=time.time())
    assert await keep(store, record)
    await store.close()
    replica = GatewayReplica(config, model_path=tmp_path / "tiny", store_url=redis.url, folder=tmp_path)
    made = Service((await asyncio.to_thread(replica.start, WITHIN_S)).url, key, engines)
    try:
        yield made, redis
    finally:
        await made.pool.close()
        await asyncio.to_thread(replica.stop, 2)
        for server in servers:
            server.close()
        redis.remove()


async def test_streams_and_new_requests_go_on_while_redis_is_away_and_after_it_came_back_empty(
    service: tuple[Service, RedisServer],
) -> None:
    gateway, redis = service
    begun = asyncio.Event()
    stream = asyncio.create_task(gateway.ask(100, begun=begun))  # five seconds
    await asyncio.wait_for(begun.wait(), WITHIN_S)
    redis.stop()
    assert await gateway.ask(3) == (200, "CCC")
    redis.start()
    assert await gateway.ask(3) == (200, "CCC")
    store = await until_whole(redis)
    assert await gateway.ask(3) == (200, "CCC")
    assert len(await store.list("keys/")) == 1
    assert await stream == (200, "C" * 100)
    async with asyncio.timeout(WITHIN_S):  # its own registration as well
        async for change in store.watch("gateways/"):
            if change.value is not None:
                break
    await store.close()


async def test_streams_and_new_requests_go_on_while_redis_hangs(service: tuple[Service, RedisServer]) -> None:
    gateway, redis = service
    begun = asyncio.Event()
    stream = asyncio.create_task(gateway.ask(60, begun=begun))
    await asyncio.wait_for(begun.wait(), WITHIN_S)
    with redis.frozen():
        assert await gateway.ask(3) == (200, "CCC")
        assert await stream == (200, "C" * 60)
    assert await gateway.ask(3) == (200, "CCC")
