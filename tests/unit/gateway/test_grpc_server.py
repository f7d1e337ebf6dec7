"""The gateway's gRPC server: health, reflection, and how it starts and stops; over a real loopback connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tandem.v1 import inference_pb2 as pb
from unit.gateway.grpc_standin import SaidReply, Served, serving, steps

WITHIN_S = 20.0
GENERATE = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="Say hello"))
GENERATE_ONCE = pb.GenerateOnceRequest(model="tiny", prompt=GENERATE.prompt)
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as found:
        yield found


async def test_health_says_serving_only_while_the_fleet_can_answer(served: Served) -> None:
    health = health_pb2_grpc.HealthStub(served.channel)
    for service in ("", "tandem.v1.Inference"):
        served.shortage = None
        assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == SERVING
        served.shortage = "no decode group is ready"
        assert (await health.Check(health_pb2.HealthCheckRequest(service=service))).status == NOT_SERVING
    found = await health.List(health_pb2.HealthListRequest())
    assert {name: status.status for name, status in found.statuses.items()} == {
        "": NOT_SERVING,
        "tandem.v1.Inference": NOT_SERVING,
    }


async def test_health_of_an_unknown_service_is_not_found_and_watched_as_unknown(served: Served) -> None:
    health = health_pb2_grpc.HealthStub(served.channel)
    request = health_pb2.HealthCheckRequest(service="tandem.v1.Other")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(request)
    watch = health.Watch(request)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


async def test_a_watch_is_told_of_each_change_and_of_the_end(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.gateway.rpc.health.LOOK_S", 3600.0)
    watch = health_pb2_grpc.HealthStub(served.channel).Watch(health_pb2.HealthCheckRequest())
    async with asyncio.timeout(WITHIN_S):
        assert (await watch.read()).status == SERVING
        served.shortage = "no decode group is ready"
        served.server.health_changed()
        assert (await watch.read()).status == NOT_SERVING
        served.shortage = None
        served.server.health_changed()
        assert (await watch.read()).status == SERVING
        # The watch ends by itself: a stop with a long grace does not wait for it.
        await served.server.stop(grace=3600)
        assert (await watch.read()).status == NOT_SERVING
        assert await watch.read() is grpc.aio.EOF


async def test_a_watch_looks_by_itself_for_what_nobody_tells(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.gateway.rpc.health.LOOK_S", 0.01)
    watch = health_pb2_grpc.HealthStub(served.channel).Watch(health_pb2.HealthCheckRequest())
    async with asyncio.timeout(WITHIN_S):
        assert (await watch.read()).status == SERVING
        served.shortage = "no decode group is ready"
        assert (await watch.read()).status == NOT_SERVING
    watch.cancel()


async def test_reflection_names_the_services(served: Served) -> None:
    reflection = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    call = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name async for answer in call for service in answer.list_services_response.service}
    assert {"tandem.v1.Inference", "grpc.health.v1.Health"} <= names


def test_it_runs_on_the_gateways_event_loop_in_a_thread_of_its_own() -> None:
    """As in a replica, and several in one process."""

    async def talk() -> str:
        async with serving() as served:
            found = await asyncio.wait_for(served.stub.GenerateOnce(GENERATE_ONCE), WITHIN_S)
            return str(found.choices[0].text)

    def thread() -> str:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(talk())

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(lambda _: thread(), range(3))) == ["Hello"] * 3


async def test_stopping_lets_a_call_end_within_its_grace(served: Served) -> None:
    going = asyncio.Event()

    class Late(SaidReply):
        async def next(self) -> object:
            if self.asked == 1:
                await going.wait()
            return await super().next()

    served.say = lambda: Late(steps("a", "b"))
    call = served.stub.Generate(GENERATE)
    async with asyncio.timeout(WITHIN_S):
        first = await call.read()
        stopping = asyncio.create_task(served.server.stop(grace=WITHIN_S))
        going.set()
        rest = [await call.read(), await call.read()]
        assert await call.read() is grpc.aio.EOF
        await stopping
    assert [delta.text for message in [first, *rest] for delta in message.deltas] == ["a", "b", ""]


async def test_a_taken_port_is_named_in_the_error(served: Served) -> None:
    with pytest.raises(OSError, match=str(served.server.port)):
        await type(served.server)(served, shortage=lambda: None, longest_s=1.0, max_request_bytes=1000).start(
            "127.0.0.1", served.server.port
        )
