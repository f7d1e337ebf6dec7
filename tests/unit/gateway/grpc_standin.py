"""Answers without an engine, behind the real gRPC server: what a test wants said is said."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import grpc

from tandem.gateway.errors import ApiError
from tandem.gateway.pairing.reply import Step
from tandem.gateway.rpc.incoming import Incoming
from tandem.gateway.rpc.inference import Endpoint
from tandem.gateway.rpc.peer import Peer
from tandem.gateway.rpc.server import GrpcServer
from tandem.gateway.text.answer import Piece, Usage
from tandem.v1 import inference_pb2_grpc

USAGE = Usage(prompt=7, completion=3, reasoning=1, cached=4)


def steps(*texts: str, index: int = 0, reason: str = "stop") -> list[list[Step]]:
    """One batch for each text, and one that ends the reply."""
    batches = [[Step(index=index, piece=Piece(content=text, ids=[place]))] for place, text in enumerate(texts)]
    return [*batches, [Step(index=index, piece=Piece(), reason=reason, usage=USAGE)]]


class SaidReply:
    """A reply that says `batches`, then fails with `error`, or waits for ever if it has not ended."""

    id = "chatcmpl-1"
    model = "tiny"
    created = 1_700_000_000
    prompt_ids = (11, 12)

    def __init__(self, batches: Sequence[Sequence[Step]], error: Exception | None = None) -> None:
        self.weight_version = "1"
        self.closed: list[BaseException | None] = []
        self.settled = 0
        self.over = asyncio.Event()
        self.asked = 0
        self._batches = batches
        self._error = error

    async def next(self) -> Sequence[Step]:
        self.asked += 1
        if self.asked <= len(self._batches):
            await asyncio.sleep(0)
            return self._batches[self.asked - 1]
        if self._error is not None:
            raise self._error
        await asyncio.Event().wait()
        raise AssertionError("it waits for ever")

    async def settle(self) -> None:
        self.settled += 1

    def close(self, error: BaseException | None) -> None:
        self.closed.append(error)
        self.over.set()


class SaidAnswers:
    """Every request gets a reply of `say`, or the next of `errors`; what was asked for is kept."""

    def __init__(self, say: Callable[[], SaidReply] | None = None) -> None:
        self.say = say or (lambda: SaidReply(steps("Hel", "lo")))
        self.errors: list[Exception] = []
        self.asked: list[tuple[Endpoint, dict[str, Any], Peer, float | None]] = []
        self.replies: list[SaidReply] = []
        self.begun = asyncio.Event()
        self.hang = False
        self.given_up = asyncio.Event()

    async def begin(self, endpoint: Endpoint, incoming: Incoming, peer: Peer, deadline: float | None) -> SaidReply:
        await incoming.receive()
        self.asked.append((endpoint, incoming.body(), peer, deadline))
        self.begun.set()
        if self.errors:
            raise self.errors.pop(0)
        if self.hang:
            try:
                await asyncio.Event().wait()
            finally:
                self.given_up.set()
        reply = self.say()
        self.replies.append(reply)
        return reply

    @property
    def body(self) -> dict[str, Any]:
        """Of the last request."""
        return self.asked[-1][1]


class Served(SaidAnswers):
    """The answers together with their server and a channel to it."""

    server: GrpcServer
    channel: grpc.aio.Channel
    stub: inference_pb2_grpc.InferenceAsyncStub
    shortage: str | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server.port}"


@contextlib.asynccontextmanager
async def serving(
    say: Callable[[], SaidReply] | None = None, *, longest_s: float = 600.0, max_request_bytes: int = 2**20
) -> AsyncIterator[Served]:
    """A gRPC server on a free port of loopback."""
    served = Served(say)
    served.server = GrpcServer(
        served, shortage=lambda: served.shortage, longest_s=longest_s, max_request_bytes=max_request_bytes
    )
    port = await served.server.start("127.0.0.1", 0)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            served.channel = channel
            served.stub = inference_pb2_grpc.InferenceStub(channel)
            yield served
    finally:
        await served.server.stop(grace=0)


def too_many(retry_after: float = 7.0) -> ApiError:
    return ApiError(429, "Too many requests.", type="rate_limit_error", code="rate_limited", retry_after=retry_after)
