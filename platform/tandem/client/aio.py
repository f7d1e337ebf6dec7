"""The client for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterable
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from tandem.client import channel
from tandem.client.errors import Cancelled, from_rpc_error
from tandem.client.requests import ChatParams, GenerateParams, Prompt, Turn, chat_fields, generate_fields
from tandem.client.results import Collector, chatted, generated
from tandem.client.types import Answer, Piece
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc


class AsyncClient:
    """`Client` for one event loop: the same methods, to be awaited; streams to be read with `async for`.

        async with AsyncClient("gateway:9001", api_key="tdm-…", model="deepseek-r1", tls=True) as client:
            answer = await client.generate("The capital of France is", max_tokens=8)
            async for piece in client.chat_stream([{"role": "user", "content": "Why?"}]):
                print(piece.text, end="", flush=True)

    Make it within the loop that uses it. A task that is cancelled while it waits for an answer ends the call.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        model: str = "",
        tls: bool | channel.Tls | grpc.ChannelCredentials = False,
        timeout: float = 600.0,
        attempts: int = 3,
    ) -> None:
        """`address`: `host:port`. `model`: for calls that name none. `timeout`: seconds that each call may take."""
        self.address = address
        self.model = model
        self.timeout = timeout
        self._api_key = api_key
        self._closed = False
        options, credentials = channel.options(attempts), channel.credentials(tls)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(address, options=options)
        else:
            self._channel = grpc.aio.secure_channel(address, credentials, options=options)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection and every call on it."""
        self._closed = True
        await self._channel.close(None)

    async def generate(self, prompt: Prompt, **params: Unpack[GenerateParams]) -> Answer:
        """Continue a text, or tokens. See `Client.generate`."""
        request = pb.GenerateOnceRequest(**generate_fields(prompt, params, self.model))
        return generated(await self._once(self._stub.GenerateOnce, request, params))

    def generate_stream(self, prompt: Prompt, **params: Unpack[GenerateParams]) -> AsyncStream:
        """Continue a text, or tokens, and give the text as it comes. See `Client.generate_stream`."""
        request = pb.GenerateRequest(**generate_fields(prompt, params, self.model))
        return self._stream(self._stub.Generate, request, params)

    async def chat(self, messages: Iterable[Turn], **params: Unpack[ChatParams]) -> Answer:
        """Answer a conversation. See `Client.chat`."""
        request = pb.ChatOnceRequest(**chat_fields(messages, params, self.model))
        return chatted(await self._once(self._stub.ChatOnce, request, params))

    def chat_stream(self, messages: Iterable[Turn], **params: Unpack[ChatParams]) -> AsyncStream:
        """Answer a conversation, and give reasoning, text and tool calls as they come. See `Client.chat_stream`."""
        request = pb.ChatRequest(**chat_fields(messages, params, self.model))
        return self._stream(self._stub.Chat, request, params)

    async def _once(self, method: Any, request: Any, params: GenerateParams) -> Any:
        try:
            return await method(request, **self._beside(params))
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error
        except asyncio.CancelledError:
            raise _cancelled() from None

    def _stream(self, method: Any, request: Any, params: GenerateParams) -> AsyncStream:
        return AsyncStream(method(request, **self._beside(params)), self.address)

    def _beside(self, params: GenerateParams) -> dict[str, Any]:
        if self._closed:
            raise ValueError("the client is closed: make a new one.")
        timeout = params.get("timeout")
        return {
            "timeout": self.timeout if timeout is None else timeout,
            "metadata": channel.metadata(self._api_key, params.get("request_id")),
        }


class AsyncStream(AsyncIterator[Piece]):
    """Pieces of an answer as they come. Leaving its `async with` block, or `close`, ends what is left of the answer."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._collector = Collector()
        self._pieces: deque[Piece] = deque()

    @property
    def answer(self) -> Answer | None:
        """The whole answer with its usage; None until the stream has come to its end."""
        return self._collector.answer()

    async def __anext__(self) -> Piece:
        while not self._pieces:
            try:
                message = await self._call.read()
            except grpc.RpcError as error:
                raise from_rpc_error(error, self._address) from error
            except asyncio.CancelledError:
                raise _cancelled() from None
            if message is grpc.aio.EOF:  # type: ignore[attr-defined]  # its stubs are older
                raise StopAsyncIteration
            self._pieces.extend(self._collector.take(message))
        return self._pieces.popleft()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # gRPC keeps every open call: one that nobody can read any more would go on to its end.
        with contextlib.suppress(RuntimeError):  # the loop is closed, and all calls with it
            self.close()

    def close(self) -> None:
        """Nothing more is wanted: the server stops at once."""
        self._call.cancel()


def _cancelled() -> BaseException:
    """What a wait ends with that was cancelled: the task's own cancellation, or that of the call alone."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        return asyncio.CancelledError()
    return Cancelled("The call was cancelled, or its client was closed.", code=grpc.StatusCode.CANCELLED.name)
