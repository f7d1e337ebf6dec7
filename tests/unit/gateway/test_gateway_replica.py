"""A whole replica: its own thread, loop and socket, a store, and stand-in engines; a client on a real connection."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from certificates import Authority
from engine_standin import Engine, Script, engine
from gateway_model import ids_of, model_folder
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tandem.config import FleetConfig
from tandem.core.traffic import TRAFFIC, TrafficReport
from tandem.core.types import GatewayReplica as Record
from tandem.core.types import Group, GroupState, Role
from tandem.gateway.replica import GatewayReplica, ReplicaError
from tandem.state import Store, open_store


@dataclass
class Place:
    """Where replicas run."""

    folder: Path
    store: Store
    engines: list[Engine]

    def replica(self, fleet: str = "t", **gateway: Any) -> GatewayReplica:
        config = FleetConfig(name=fleet, gateway={"port": 0, "grpc_port": 0, **gateway})  # type: ignore[arg-type]
        return GatewayReplica(config, model_path=self.folder / "tiny", folder=self.folder)

    async def announce(self, state: GroupState = GroupState.READY) -> None:
        for one in self.engines:
            group = Group(group=one.role, role=Role(one.role), epoch=1, state=state, url=one.url)
            await self.store.put(f"groups/{one.role}", msgspec.json.encode(group))


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    model_folder(tmp_path / "tiny")
    async with engine("prefill") as prefill, engine("decode") as decode:
        store = await open_store("embedded", fleet="t", folder=tmp_path)
        yield Place(tmp_path, store, [prefill, decode])
        await store.close()


@contextlib.asynccontextmanager
async def running(replica: GatewayReplica) -> AsyncIterator[Record]:
    yield await asyncio.to_thread(replica.start, 10)
    await asyncio.to_thread(replica.stop, 2)


async def ask(url: str, path: str, body: object = None) -> tuple[int, Any]:
    def exchange() -> tuple[int, Any]:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, json.loads(data) if data.startswith(b"{") else data

    return await asyncio.to_thread(exchange)


async def until(url: str, path: str, status: int) -> None:
    """Wait until the page answers so: the watch of the store takes a moment."""
    async with asyncio.timeout(5):
        while (await ask(url, path))[0] != status:
            await asyncio.sleep(0.02)


COMPLETION = {"model": "tiny", "prompt": [5, 6], "max_tokens": 9}


async def test_it_listens_registers_answers_and_leaves(place: Place) -> None:
    await place.announce()
    replica = place.replica()
    async with running(replica) as record:
        replica.probe()
        entry = await place.store.get(f"gateways/{record.replica}")
        assert entry is not None
        assert msgspec.json.decode(entry.value, type=Record) == record
        place.engines[1].default = Script(ids=ids_of("hi there"))
        status, found = await ask(record.url, "/v1/completions", COMPLETION)
        assert (status, found["choices"][0]["text"]) == (200, "hi there")
        _, fleet = await ask(record.url, "/fleet")
        assert [group["group"] for group in fleet["groups"]] == ["decode", "prefill"]
    assert await place.store.get(f"gateways/{record.replica}") is None
    with pytest.raises(ReplicaError):
        replica.probe()


async def test_one_that_lingers_answers_and_says_that_it_leaves(place: Place) -> None:
    await place.announce()
    replica = place.replica()
    record = await asyncio.to_thread(replica.start, 10)
    stopping = asyncio.create_task(asyncio.to_thread(replica.stop, 2, linger=1.0))
    await until(record.url, "/health", 503)
    assert (await ask(record.url, "/v1/completions", COMPLETION))[0] == 200
    replica.probe()
    await stopping
    with pytest.raises(ConnectionRefusedError):
        await ask(record.url, "/health")


async def test_who_asks_second_for_the_stop_waits_for_the_first(place: Place) -> None:
    replica = place.replica()
    record = await asyncio.to_thread(replica.start, 10)
    first = asyncio.create_task(asyncio.to_thread(replica.stop, 2, linger=0.5))
    await until(record.url, "/health", 503)
    await asyncio.to_thread(replica.stop, 0)
    with pytest.raises(ConnectionRefusedError):
        await ask(record.url, "/health")
    await first


async def test_it_follows_the_store(place: Place) -> None:
    async with running(place.replica()) as record:
        await until(record.url, "/ready", 503)
        await place.announce()
        await until(record.url, "/ready", 200)
        await place.announce(GroupState.FAILED)
        await until(record.url, "/ready", 503)
        await place.store.put("groups/odd", b"no group")
        await place.announce()
        await until(record.url, "/ready", 200)


async def test_a_request_waits_for_groups_that_come_when_somebody_asks_and_the_store_says_so(place: Place) -> None:
    replica = place.replica(summoned=["prefill", "decode"])
    async with running(replica) as record, grpc.aio.insecure_channel(record.grpc) as channel:
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING, "a client that looks there first never asks"
        assert (await ask(record.url, "/ready"))[0] == 503
        place.engines[1].default = Script(ids=ids_of("hi there"))
        asked = asyncio.create_task(ask(record.url, "/v1/completions", COMPLETION))
        async with asyncio.timeout(5):
            async for change in place.store.watch(TRAFFIC):
                assert change.value is not None
                told = msgspec.json.decode(change.value, type=TrafficReport)
                if (told.waiting_prefill, told.waiting_decode) == (1, 1):
                    break
        await place.announce(GroupState.STARTING)
        await place.announce()
        status, found = await asked
    assert (status, found["choices"][0]["text"]) == (200, "hi there")


async def test_two_replicas_share_a_port(place: Place) -> None:
    first = place.replica()
    async with running(first) as one, running(place.replica(port=int(one.url.rsplit(":", 1)[1]))) as two:
        assert (one.url, one.replica != two.replica) == (two.url, True)
        first.probe()


async def test_one_that_stands_still_on_the_port_keeps_no_other_from_starting_and_being_healthy(place: Place) -> None:
    with socket.socket() as frozen:
        frozen.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        frozen.bind(("127.0.0.1", 0))
        frozen.listen()
        replica = place.replica(port=frozen.getsockname()[1])
        async with running(replica):
            await asyncio.to_thread(replica.probe, 0.05)


async def test_another_fleet_is_not_let_in_on_the_port(place: Place) -> None:
    async with running(place.replica()) as record:
        stranger = place.replica(fleet="other", port=int(record.url.rsplit(":", 1)[1]))
        with pytest.raises(ReplicaError, match="the gateway of fleet 't' does"):
            await asyncio.to_thread(stranger.start, 10)


async def test_a_port_that_is_taken_is_named(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ReplicaError, match=rf"127\.0\.0\.1:{port}"):
            place.replica(port=port).start(10)


async def test_a_model_folder_without_a_tokenizer_is_named(place: Place) -> None:
    (place.folder / "tiny" / "tokenizer.json").unlink()
    with pytest.raises(ReplicaError, match=r"tokenizer\.json is missing"):
        await asyncio.to_thread(place.replica().start, 10)


async def test_a_client_that_hangs_up_ends_both_legs(place: Place) -> None:
    await place.announce()
    for one in place.engines:
        one.default = Script(ids=ids_of("some words"), finish=None)
    async with running(place.replica()) as record:
        host, port = record.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        body = json.dumps({**COMPLETION, "stream": True}).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        await reader.readuntil(b"data: ")
        writer.transport.abort()
        for one in place.engines:
            await one.idle()
            assert len(one.aborted) == 1


async def test_a_stop_lets_answers_end(place: Place) -> None:
    await place.announce()
    go = asyncio.Event()
    place.engines[1].default = Script(ids=ids_of("hi there"), go=go)
    replica = place.replica()
    record = await asyncio.to_thread(replica.start, 10)
    asking = asyncio.create_task(ask(record.url, "/v1/completions", COMPLETION))
    await place.engines[1].until(lambda: place.engines[1].running)
    stopping = asyncio.create_task(asyncio.to_thread(replica.stop, 5))
    async with asyncio.timeout(5):
        while await place.store.get(f"gateways/{record.replica}") is not None:
            await asyncio.sleep(0.02)
    assert not asking.done()
    go.set()
    assert (await asking)[1]["choices"][0]["text"] == "hi there"
    await stopping


async def test_a_stop_ends_what_does_not_end_by_itself(place: Place) -> None:
    await place.announce()
    place.engines[1].default = Script(finish=None)
    replica = place.replica()
    record = await asyncio.to_thread(replica.start, 10)
    asking = asyncio.create_task(ask(record.url, "/v1/completions", COMPLETION))
    await place.engines[1].until(lambda: place.engines[1].running)
    await asyncio.to_thread(replica.stop, 0.2)
    await place.engines[1].idle()
    status, found = await asking
    assert (status, found["error"]["message"]) == (503, "The request failed: this gateway is going down; try again.")


async def test_replicas_that_want_certificates_share_a_port_and_pass_their_own_health_check(place: Place) -> None:
    ca = Authority(place.folder)
    server = ca.server()
    tls = {"certificate": server.certificate, "key": server.key, "client_ca": ca.file}
    await place.announce()
    async with running(place.replica(tls=tls)) as first:
        port = int(first.url.rpartition(":")[2])
        second = place.replica(port=port, tls=tls)
        async with running(second):
            await asyncio.to_thread(second.probe)
