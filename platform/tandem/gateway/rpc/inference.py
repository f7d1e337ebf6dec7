"""Serves `tandem.v1.Inference`: a call becomes the body that the HTTP API takes, and goes the way of such a body."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import grpc
from google.protobuf.message import Message

from tandem.gateway.errors import ApiError
from tandem.gateway.http.exchange import ClientLeft
from tandem.gateway.rpc.answers import Step, chat_choices, chat_delta, text_choices, text_delta, usage_message
from tandem.gateway.rpc.errors import sentence, status_code, trailing_metadata
from tandem.gateway.rpc.incoming import Incoming, Receiving
from tandem.gateway.rpc.peer import Peer, peer_of
from tandem.gateway.rpc.translate import Body, chat_body, generate_body
from tandem.v1 import inference_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
SLOW_READER_S = 10.0
"""Grace beyond a request's own deadline for a client that reads its answer slowly."""

Endpoint = Literal["chat", "completions"]

_log = logging.getLogger(__name__)
_Context = grpc.aio.ServicerContext[Any, Any]


class Reply(Protocol):
    """An answer on its way."""

    @property
    def id(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def created(self) -> int:
        """When it began, in Unix seconds."""

    @property
    def weight_version(self) -> str:
        """Version of the weights that computed the newest token."""

    @property
    def prompt_ids(self) -> Sequence[int]:
        """Tokens of the prompt."""

    async def next(self) -> Sequence[Step]:
        """Wait for more. The last step of all has `usage`. Raises ApiError and ClientLeft."""

    async def settle(self) -> None:
        """The last step is there, and the caller is about to be told: count the answer."""

    def close(self, error: BaseException | None) -> None:
        """It is over, complete or with this error (`CancelledError`: nobody waits for it). Ends what still works on it.

        Called exactly once for each reply that has begun.
        """


class Answers(Protocol):
    """What answers requests, whichever front they come by."""

    async def begin(self, endpoint: Endpoint, incoming: Incoming, peer: Peer, deadline: float | None) -> Reply:
        """Authenticate, receive, check, tokenize, admit and submit. Raises ApiError.

        `deadline`: when the caller stops waiting, on the loop's clock. Whatever it raises, `CancelledError` too, it has
        left nothing behind.
        """


class InferenceService:
    """The service over one gateway's answers; `methods` is what a server takes."""

    def __init__(self, answers: Answers, *, longest_s: float, max_request_bytes: int) -> None:
        """`longest_s`: seconds that a request may take. A client that has not read its answer soon after is left."""
        self._answers = answers
        self._longest_s = longest_s + SLOW_READER_S
        self._receiving = Receiving(max_request_bytes)

    def methods(self) -> dict[str, grpc.RpcMethodHandler[Any, Any]]:
        """By name. They read and parse their requests themselves (on the wire, one request is a stream of one): nothing
        is received before it is known who calls, and garbage is answered and not logged as a crash."""
        stream, unary = grpc.stream_stream_rpc_method_handler, grpc.stream_unary_rpc_method_handler
        return {
            "Generate": stream(self.generate, response_serializer=pb.GenerateResponse.SerializeToString),
            "GenerateOnce": unary(self.generate_once, response_serializer=pb.GenerateOnceResponse.SerializeToString),
            "Chat": stream(self.chat, response_serializer=pb.ChatResponse.SerializeToString),
            "ChatOnce": unary(self.chat_once, response_serializer=pb.ChatOnceResponse.SerializeToString),
        }

    async def generate(self, _: object, context: _Context) -> None:
        async with self._answering(context) as (peer, deadline):
            incoming = self._incoming(context, pb.GenerateRequest, generate_body)
            reply = await self._answers.begin("completions", incoming, peer, deadline)
            await _stream(context, reply, pb.GenerateResponse, text_delta, ids=incoming.wants_ids)

    async def generate_once(self, _: object, context: _Context) -> pb.GenerateOnceResponse:
        async with self._answering(context) as (peer, deadline):
            incoming = self._incoming(context, pb.GenerateOnceRequest, generate_body)
            reply = await self._answers.begin("completions", incoming, peer, deadline)
            ids = incoming.wants_ids
            steps = await _all(reply)
            return pb.GenerateOnceResponse(
                info=_info(reply, ids=ids),
                weight_version=reply.weight_version,
                choices=text_choices(steps, ids=ids),
                usage=_usage(steps),
            )

    async def chat(self, _: object, context: _Context) -> None:
        async with self._answering(context) as (peer, deadline):
            incoming = self._incoming(context, pb.ChatRequest, chat_body)
            reply = await self._answers.begin("chat", incoming, peer, deadline)
            await _stream(context, reply, pb.ChatResponse, chat_delta, ids=incoming.wants_ids)

    async def chat_once(self, _: object, context: _Context) -> pb.ChatOnceResponse:
        async with self._answering(context) as (peer, deadline):
            incoming = self._incoming(context, pb.ChatOnceRequest, chat_body)
            reply = await self._answers.begin("chat", incoming, peer, deadline)
            ids = incoming.wants_ids
            steps = await _all(reply)
            return pb.ChatOnceResponse(
                info=_info(reply, ids=ids),
                weight_version=reply.weight_version,
                choices=chat_choices(steps, ids=ids),
                usage=_usage(steps),
            )

    def _incoming(self, context: _Context, kind: type[Message], body_of: Callable[[Any], Body]) -> Incoming:
        return Incoming(self._receiving, context, kind, body_of)

    @contextlib.asynccontextmanager
    async def _answering(self, context: _Context) -> AsyncIterator[tuple[Peer, float | None]]:
        """Hold the block to the call's limits, and end the call if it fails. Gives (peer, deadline).

        gRPC itself cancels the method when the client cancels, is gone, or has waited to its deadline.
        """
        peer = peer_of(context)
        identity = (("x-request-id", peer.request_id),)
        context.set_trailing_metadata(identity)
        remaining = context.time_remaining()
        deadline = None if remaining is None else asyncio.get_running_loop().time() + remaining
        try:
            async with asyncio.timeout(self._longest_s):
                yield peer, deadline
            return
        except ApiError as found:
            error = found
        except ClientLeft:
            error = ApiError(499, "The call was given up.", code="client_gone")
        except grpc.aio.InternalError as found:
            raise _gone(found) from None
        except TimeoutError:
            # Only a client that does not read gets here: everything else has ended by itself before.
            error = ApiError(504, f"The answer was not read within {self._longest_s:g} s.", code="timeout")
        except Exception:  # noqa: BLE001 - the boundary: whatever is wrong here, the client gets an answer and we a traceback
            _log.exception("gRPC request %s broke", peer.request_id)
            message = "The server had an error while processing your request."
            error = ApiError(500, message, type="server_error", code="internal_error")
        try:
            await context.abort(status_code(error.status), sentence(error), identity + trailing_metadata(error))
        except grpc.aio.InternalError as found:
            raise _gone(found) from None


async def _stream(
    context: _Context,
    reply: Reply,
    response: Callable[..., Message],
    delta: Callable[[Step, bool], Message | None],
    *,
    ids: bool,
) -> None:
    """Write each batch of steps as one message; the next batch is asked for when the client has room for it."""
    info: pb.AnswerInfo | None = _info(reply, ids=ids)
    version = ""
    with _closing(reply):
        while True:
            steps = await reply.next()
            news = [found for step in steps if (found := delta(step, ids)) is not None]
            usage = _usage(steps)
            changed = reply.weight_version if reply.weight_version != version else ""
            if usage is not None:
                await reply.settle()
            if news or usage or info or changed:
                await context.write(response(info=info, weight_version=changed, deltas=news, usage=usage))
                info, version = None, reply.weight_version
            if usage is not None:
                return


async def _all(reply: Reply) -> list[Step]:
    steps: list[Step] = []
    with _closing(reply):
        while not steps or steps[-1].usage is None:
            steps += await reply.next()
        await reply.settle()
        return steps


@contextlib.contextmanager
def _closing(reply: Reply) -> Iterator[None]:
    """Close the reply when the block is left, however it is left."""
    failed: BaseException | None = None
    try:
        yield
    except grpc.aio.InternalError:
        failed = asyncio.CancelledError()  # see `_gone`
        raise
    except BaseException as error:
        failed = error
        raise
    finally:
        reply.close(failed)


def _gone(error: Exception) -> asyncio.CancelledError:
    """Nothing could be sent: the connection was lost a moment ago. gRPC is about to cancel the method for that."""
    _log.debug("a call cannot be answered any more: %s", error)
    return asyncio.CancelledError()


def _info(reply: Reply, *, ids: bool) -> pb.AnswerInfo:
    prompt = reply.prompt_ids if ids else None
    return pb.AnswerInfo(id=reply.id, model=reply.model, created=reply.created, prompt_token_ids=prompt)


def _usage(steps: Sequence[Step]) -> pb.Usage | None:
    """What the reply cost, if it is over."""
    found = steps[-1].usage if steps else None
    return None if found is None else usage_message(found)
