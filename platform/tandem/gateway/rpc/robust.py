"""A gRPC server that a stranger's request cannot end.

grpcio's asyncio server decodes the path of a call that is none of its registered methods in the very loop that accepts
calls. A path that is not UTF-8 raises there, and the loop's end shuts the whole server down (grpcio 1.85.1). Here such
calls never get to that loop: whatever it is they call, it is none of our methods, and they are answered so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc
from grpc.aio import _server

log = logging.getLogger(__name__)


class _Core(cygrpc.AioServer):  # type: ignore[misc]  # not typed
    """Hands only calls of registered methods to the loop."""

    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        if method is not None:
            found: asyncio.Future[Any] = super()._make_request_call_future(method)
            return found
        return asyncio.get_running_loop().create_task(self._refuse_others(), name="unknown methods")

    async def _refuse_others(self) -> None:
        """Answer UNIMPLEMENTED to what is no registered method; ends only when it is cancelled."""
        loop = asyncio.get_running_loop()
        nothing = cygrpc._MethodResolver([], {})
        refusals: set[asyncio.Task[None]] = set()
        while True:
            try:
                state = await self._request_call()
            except cygrpc._RequestCallError:
                await asyncio.sleep(0)
                continue
            name = "an unknown method"
            answer = cygrpc._handle_rpc(name, nothing, (), state, loop, False)
            task = loop.create_task(cygrpc._schedule_rpc_coro(answer, state, loop, name))
            refusals.add(task)
            task.add_done_callback(refusals.discard)


class _Server(_server.Server):
    def __init__(self, options: Sequence[tuple[str, Any]]) -> None:
        self._loop = cygrpc.get_working_loop()
        self._server = _Core(self._loop, None, (), (), tuple(options), None)


def robust_server(options: Sequence[tuple[str, Any]]) -> grpc.aio.Server:
    """As `grpc.aio.server`, for services that register their methods."""
    return _Server(options)  # type: ignore[return-value]  # the stubs know only an abstract one
