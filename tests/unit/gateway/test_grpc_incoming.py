"""Requests of gRPC calls on their way: bounded over all calls, and read only of who is known."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
import pytest

from tandem.gateway.errors import ApiError
from tandem.gateway.rpc import incoming
from tandem.gateway.rpc.incoming import Incoming, Receiving
from tandem.gateway.rpc.translate import generate_body
from tandem.v1 import inference_pb2 as pb
from unit.gateway.grpc_standin import serving

WITHIN_S = 10.0
GENERATE = pb.GenerateOnceRequest(model="tiny", prompt=pb.Prompt(text="hi"))


class Call:
    """A call whose message comes when the test says so."""

    def __init__(self) -> None:
        self._message: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def read(self) -> Any:
        return await self._message

    def sends(self, message: Any) -> None:
        self._message.set_result(message)


class Crowd:
    """Calls whose messages are being received."""

    def __init__(self, limit: int) -> None:
        self.receiving = Receiving(2**20)
        self.receiving.limit = limit
        self.calls: list[Call] = []
        self.tasks: list[asyncio.Task[bytes]] = []

    async def join(self, number: int = 1) -> None:
        for _ in range(number):
            call = Call()
            self.calls.append(call)
            self.tasks.append(asyncio.create_task(self.receiving.message(cast("grpc.aio.ServicerContext", call))))
        await asyncio.sleep(0)

    async def refusal(self, number: int) -> ApiError:
        async with asyncio.timeout(WITHIN_S):
            with pytest.raises(ApiError) as caught:
                await self.tasks[number]
        return caught.value

    def waiting(self) -> list[int]:
        return [number for number, task in enumerate(self.tasks) if not task.done()]

    async def send_all(self) -> None:
        for number in self.waiting():
            self.calls[number].sends(b"x")
        await asyncio.gather(*self.tasks, return_exceptions=True)


async def test_with_one_late_message_too_many_the_oldest_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "LATE_S", 0.0)
    crowd = Crowd(limit=2)
    await crowd.join(3)
    error = await crowd.refusal(0)
    assert (error.status, error.code, error.retry_after) == (429, "overloaded", 1.0)
    assert crowd.waiting() == [1, 2]
    await crowd.join()
    await crowd.refusal(1)
    await crowd.send_all()
    assert [task.result() for task in crowd.tasks[2:]] == [b"x", b"x"]


async def test_messages_that_are_not_late_may_be_any_number() -> None:
    crowd = Crowd(limit=2)
    await crowd.join(500)
    await crowd.send_all()
    assert [task.result() for task in crowd.tasks] == [b"x"] * 500


async def test_as_many_as_may_be_late_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "LATE_S", 0.0)
    crowd = Crowd(limit=4)
    await crowd.join(4)
    for _ in range(10):
        await asyncio.sleep(0)
    assert crowd.waiting() == [0, 1, 2, 3]
    await crowd.send_all()


async def test_a_message_that_never_comes_is_given_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "BODY_TIMEOUT_S", 0.01)
    crowd = Crowd(limit=4)
    await crowd.join()
    assert (await crowd.refusal(0)).status == 408


async def test_a_call_that_is_cancelled_is_not_counted_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(incoming, "LATE_S", 0.0)
    crowd = Crowd(limit=1)
    await crowd.join()
    crowd.tasks[0].cancel()
    await asyncio.wait(crowd.tasks)
    await crowd.join()
    for _ in range(10):
        await asyncio.sleep(0)
    assert crowd.waiting() == [1]
    await crowd.send_all()


async def test_the_limit_follows_from_how_large_a_message_may_be() -> None:
    assert Receiving(16 * 2**20, bodies_bytes=256 * 2**20).limit == 32
    assert Receiving(2**30, bodies_bytes=256 * 2**20).limit == 4


async def test_a_request_tells_whether_ids_are_wanted_with_its_body() -> None:
    request = pb.GenerateOnceRequest(model="tiny", prompt=pb.Prompt(text="hi"))
    request.options.return_token_ids = True
    call = Call()
    call.sends(request.SerializeToString())
    found = Incoming(Receiving(2**20), cast("grpc.aio.ServicerContext", call), pb.GenerateOnceRequest, generate_body)
    assert await found.receive() == request.ByteSize()
    assert found.body()["prompt"] == "hi"
    assert found.wants_ids


async def test_a_call_without_a_message_is_the_callers_fault() -> None:
    async with serving() as served:
        call = served.channel.stream_unary("/tandem.v1.Inference/GenerateOnce")(iter(()))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call, WITHIN_S)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert served.asked == []


async def test_who_is_refused_by_name_is_not_read() -> None:
    async with serving() as served:

        async def refuse(*_: object) -> Any:
            raise ApiError(401, "Who are you?")

        served.begin = refuse  # type: ignore[method-assign]
        never = asyncio.Event()

        async def nothing() -> Any:
            await never.wait()
            yield b""

        call = served.channel.stream_unary("/tandem.v1.Inference/GenerateOnce")(nothing())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(call, WITHIN_S)
        never.set()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
