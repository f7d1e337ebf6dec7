"""The gateway's service behind `tandem.v1.Inference`: the way of an HTTP request, for a gRPC one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import msgspec

from tandem.gateway.answers.answers import Answers as KeptAnswers
from tandem.gateway.asked import Asked
from tandem.gateway.errors import ApiError
from tandem.gateway.http.endpoints import CHAT, COMPLETIONS
from tandem.gateway.http.endpoints import Endpoint as HttpEndpoint
from tandem.gateway.pairing.reply import Reply, Step
from tandem.gateway.rpc.incoming import Incoming
from tandem.gateway.rpc.inference import Endpoint
from tandem.gateway.rpc.peer import Peer
from tandem.gateway.rpc.translate import Body
from tandem.gateway.service import Service
from tandem.gateway.text.lanes import INLINE_BYTES

_ENDPOINTS: Mapping[Endpoint, HttpEndpoint] = {"chat": CHAT, "completions": COMPLETIONS}


class ServiceAnswers:
    """`grpc_inference.Answers` over the gateway's own service."""

    def __init__(self, service: Service, weight_version: Callable[[], str], kept: KeptAnswers | None = None) -> None:
        """`weight_version` says which weights the fleet serves now; `kept` keeps answers under idempotency keys."""
        self._service = service
        self._kept = kept
        self._weight_version = weight_version
        self._loop = asyncio.get_running_loop()

    async def begin(self, endpoint: Endpoint, incoming: Incoming, peer: Peer, deadline: float | None) -> BegunReply:
        """See `Answers.begin`."""
        asked = Asked(
            self._service,
            _ENDPOINTS[endpoint],
            headers=peer.headers,
            certificate=peer.certificate,
            request_id=peer.request_id,
            arrived=self._loop.time(),
            deadline=deadline,
            answers=self._kept,
        )
        try:
            await asked.identify()
            reply = await asked.begin(await self._body(asked, incoming))
        except BaseException as error:
            asked.close(error)
            raise
        return BegunReply(asked, reply, self._weight_version)

    async def _body(self, asked: Asked, incoming: Incoming) -> Body | bytes:
        """What is asked; if that is much, as bytes: the service reads and tokenizes those in a thread."""
        size = await incoming.receive()
        if size <= INLINE_BYTES:
            return incoming.body()
        try:
            async with asyncio.timeout_at(asked.deadline):
                return await self._service.lanes.work(
                    asked.identity.tenant.name, size, lambda: msgspec.json.encode(incoming.body())
                )
        except TimeoutError:
            message = "The request's time was over before it could be read. Try again, or send less at once."
            raise ApiError(504, message, type="server_error", code="timeout") from None


class BegunReply:
    """A reply of the service with what a gRPC answer tells beside its steps."""

    def __init__(self, asked: Asked, reply: Reply, weight_version: Callable[[], str]) -> None:
        prefix = "chatcmpl-" if asked.endpoint is CHAT else "cmpl-"
        self.id = prefix + asked.number
        self.model = asked.wanted.model
        self.created = asked.created
        self.prompt_ids: Sequence[int] = reply.prompts[0]
        self._asked = asked
        self._reply = reply
        self._of_fleet = weight_version

    @property
    def weight_version(self) -> str:
        """Of the weights that answer; of the fleet's, where groups do not tell theirs."""
        return self._reply.weight_version or self._of_fleet()

    async def next(self) -> Sequence[Step]:
        return await self._reply.next()

    async def settle(self) -> None:
        await self._asked.settle()

    def close(self, error: BaseException | None) -> None:
        self._asked.close(error)
