"""gRPC's standard health service: it says SERVING as long as the fleet can answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]
_Response = health_pb2.HealthCheckResponse

LOOK_S = 1.0
"""How often a watch looks again, for what changes without anybody saying so."""


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # it has no types
    """Health of some services, which are all as healthy as the fleet. The empty name stands for the server as a whole.

    grpcio's own servicer holds a lock while it writes to a watcher, so that one who does not read stops all the others.
    """

    def __init__(self, services: Iterable[str], shortage: Callable[[], str | None]) -> None:
        """`shortage` says why the fleet cannot answer, None if it can; it must be quick."""
        self._services = ("", *services)
        self._shortage = shortage
        self._stopping = False
        self._watchers: set[asyncio.Event] = set()

    def changed(self) -> None:
        """Something that `shortage` tells of may be different: let the watches look now."""
        for event in self._watchers:
            event.set()

    def stop(self) -> None:
        """From now on nothing is served; every watch is told and ends."""
        self._stopping = True
        self.changed()

    async def Check(self, request: health_pb2.HealthCheckRequest, context: _Context) -> Any:
        status = self._status(request.service)
        if status == _Response.SERVICE_UNKNOWN:
            message = f"This server has no service {request.service[:200]!r}; List names those that it has."
            await context.abort(grpc.StatusCode.NOT_FOUND, message)
        return _Response(status=status)

    async def List(self, _: health_pb2.HealthListRequest, context: _Context) -> Any:
        return health_pb2.HealthListResponse(
            statuses={service: _Response(status=self._status(service)) for service in self._services}
        )

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: _Context) -> None:
        told = None
        event = asyncio.Event()
        self._watchers.add(event)
        try:
            while not context.done():
                event.clear()
                last = self._stopping
                status = self._status(request.service)
                if status != told:
                    await context.write(_Response(status=status))
                    told = status
                if last:
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await event.wait()
        finally:
            self._watchers.discard(event)

    def _status(self, service: str) -> int:
        """A `ServingStatus`."""
        if service not in self._services:
            return int(_Response.SERVICE_UNKNOWN)
        serving = not self._stopping and self._shortage() is None
        return int(_Response.SERVING if serving else _Response.NOT_SERVING)
