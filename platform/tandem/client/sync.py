"""The client for plain threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from tandem.client import channel
from tandem.client.errors import from_rpc_error
from tandem.client.requests import ChatParams, GenerateParams, Prompt, Turn, chat_fields, generate_fields
from tandem.client.results import Collector, chatted, generated
from tandem.client.types import Answer, Piece
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc


class Client:
    """A connection to a Tandem gateway's gRPC port. May be used by several threads at once.

        with Client("gateway:9001", api_key="tdm-…", model="deepseek-r1", tls=True) as client:
            answer = client.generate("The capital of France is", max_tokens=8)
            print(answer.text, answer.usage.completion_tokens)

    It connects at the first call, and again by itself when the connection is lost. A call that fails with UNAVAILABLE
    before its first token is made again, `attempts` times in all, after as long as the server asks for; nothing else
    is. Every call raises TandemError, and TypeError or ValueError for arguments that cannot be sent at all.
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
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, credentials, options)
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection and every call on it."""
        self._closed = True
        self._channel.close()

    def generate(self, prompt: Prompt, **params: Unpack[GenerateParams]) -> Answer:
        """Continue a text, or tokens.

        answer = client.generate([0, 671, 6102, 294, 8760, 344], max_tokens=4, temperature=0, return_token_ids=True)
        print(answer.token_ids)
        """
        request = pb.GenerateOnceRequest(**generate_fields(prompt, params, self.model))
        return generated(self._once(self._stub.GenerateOnce, request, params))

    def generate_stream(self, prompt: Prompt, **params: Unpack[GenerateParams]) -> Stream:
        """Continue a text, or tokens, and give the text as it comes.

        for piece in client.generate_stream("Once upon a time", max_tokens=64):
            print(piece.text, end="", flush=True)
        """
        request = pb.GenerateRequest(**generate_fields(prompt, params, self.model))
        return self._stream(self._stub.Generate, request, params)

    def chat(self, messages: Iterable[Turn], **params: Unpack[ChatParams]) -> Answer:
        """Answer a conversation.

        turns = [{"role": "user", "content": "What is 17 × 23?"}]
        answer = client.chat(turns)
        print(answer.reasoning, answer.text)
        turns += [answer.message, {"role": "user", "content": "And doubled?"}]
        print(client.chat(turns).text)
        """
        request = pb.ChatOnceRequest(**chat_fields(messages, params, self.model))
        return chatted(self._once(self._stub.ChatOnce, request, params))

    def chat_stream(self, messages: Iterable[Turn], **params: Unpack[ChatParams]) -> Stream:
        """Answer a conversation, and give reasoning, text and tool calls as they come.

        with client.chat_stream([{"role": "user", "content": "Why is the sky blue?"}]) as stream:
            for piece in stream:
                print(piece.reasoning or piece.text, end="", flush=True)
        print(stream.answer.usage)
        """
        request = pb.ChatRequest(**chat_fields(messages, params, self.model))
        return self._stream(self._stub.Chat, request, params)

    def _once(self, method: Any, request: Any, params: GenerateParams) -> Any:
        try:
            return method(request, **self._beside(params))
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.address) from error

    def _stream(self, method: Any, request: Any, params: GenerateParams) -> Stream:
        return Stream(method(request, **self._beside(params)), self.address)

    def _beside(self, params: GenerateParams) -> dict[str, Any]:
        if self._closed:
            raise ValueError("the client is closed: make a new one.")
        timeout = params.get("timeout")
        return {
            "timeout": self.timeout if timeout is None else timeout,
            "metadata": channel.metadata(self._api_key, params.get("request_id")),
        }


class Stream(Iterator[Piece]):
    """Pieces of an answer as they come. Leaving its `with` block, or `close`, ends what is left of the answer."""

    def __init__(self, call: Any, address: str) -> None:
        self._call = call
        self._address = address
        self._collector = Collector()
        self._pieces: deque[Piece] = deque()

    @property
    def answer(self) -> Answer | None:
        """The whole answer with its usage; None until the stream has come to its end."""
        return self._collector.answer()

    def __next__(self) -> Piece:
        while not self._pieces:
            try:
                self._pieces.extend(self._collector.take(next(self._call)))
            except grpc.RpcError as error:
                raise from_rpc_error(error, self._address) from error
        return self._pieces.popleft()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Nothing more is wanted: the server stops at once."""
        self._call.cancel()
