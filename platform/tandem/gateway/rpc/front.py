"""The gateway's service behind `tandem.v1.Inference`: the way of an HTTP request, for a gRPC one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from tandem.gateway.asked import Asked
from tandem.gateway.http.endpoints import CHAT, COMPLETIONS
from tandem.gateway.http.endpoints import Endpoint as HttpEndpoint
from tandem.gateway.pairing.reply import Reply, Step
from tandem.gateway.rpc.inference import Endpoint
from tandem.gateway.rpc.peer import Peer
from tandem.gateway.rpc.translate import Body
from tandem.gateway.service import Service
from tandem.gateway.text.lanes import INLINE_BYTES

_ENDPOINTS: Mapping[Endpoint, HttpEndpoint] = {"chat": CHAT, "completions": COMPLETIONS}


class ServiceAnswers:
    """`grpc_inference.Answers` over the gateway's own service."""

    def __init__(self, service: Service, weight_version: Callable[[], str]) -> None:
        """`weight_version` says which weights the fleet serves now."""
        self._service = service
        self._weight_version = weight_version
        self._loop = asyncio.get_running_loop()

    async def begin(self, endpoint: Endpoint, body: Body, peer: Peer, deadline: float | None) -> BegunReply:
        """See `Answers.begin`."""
        asked = Asked(
            self._service,
            _ENDPOINTS[endpoint],
            headers=peer.headers,
            certificate=peer.certificate,
            request_id=peer.request_id,
            arrived=self._loop.time(),
            deadline=deadline,
        )
        try:
            await asked.identify()
            # A large body as bytes: the service reads and tokenizes those in a thread.
            reply = await asked.begin(body if peer.size <= INLINE_BYTES else msgspec.json.encode(body))
        except BaseException as error:
            asked.close(error)
            raise
        return BegunReply(asked, reply, self._weight_version)


class BegunReply:
    """A reply of the service with what a gRPC answer tells beside its steps."""

    def __init__(self, asked: Asked, reply: Reply, weight_version: Callable[[], str]) -> None:
        prefix = "chatcmpl-" if asked.endpoint is CHAT else "cmpl-"
        self.id = prefix + asked.number
        self.model = asked.wanted.model
        self.created = int(time.time())
        self.weight_version = weight_version()
        self.prompt_ids: Sequence[int] = reply.prompts[0]
        self._asked = asked
        self._reply = reply

    async def next(self) -> Sequence[Step]:
        return await self._reply.next()

    def close(self, error: BaseException | None) -> None:
        self._asked.close(error)
