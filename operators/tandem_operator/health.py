"""/healthz, /readyz and /metrics of the operator, also while it is a standby."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

_SILENT_S = 180.0
"""A leader that has not heard from the API server for so long is started anew: relisting alone asks every 30 s."""


class Health:
    """What the probes are told."""

    def __init__(self) -> None:
        self.ready = False
        self.beat: Callable[[], float] | None = None
        """When the API server last answered, on the loop's clock; None = nothing is expected of it."""

    def alive(self) -> bool:
        """Whether it works."""
        return self.beat is None or asyncio.get_running_loop().time() - self.beat() < _SILENT_S


@contextlib.asynccontextmanager
async def serve_health(health: Health, port: int) -> AsyncIterator[int]:
    """Serve them while the block runs; yields the port (0 = any free one). Raises OSError if it is taken."""

    async def healthz(_: web.Request) -> web.Response:
        alive = health.alive()
        return web.Response(text="ok\n" if alive else "The API server has been silent.\n", status=200 if alive else 503)

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n" if health.ready else "starting\n", status=200 if health.ready else 503)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, None, port)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
