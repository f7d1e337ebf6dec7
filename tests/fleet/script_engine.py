"""A small HTTP server in an engine's place, and what the controller needs to start it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from tandem.core.group_events import Service
from tandem.core.types import GroupSpec
from tandem.engine.launch import RankEndpoints
from tandem.fleet.engines import Command, NoEngineError, url_of
from tandem.fleet.ray_processes import RANK_RESOURCE

SCRIPT = """
import http.server, json, pathlib, sys
host, port, rooms = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        running = int(rooms.read_text()) if rooms.exists() else 0
        body = json.dumps({"loads": [{"dp_rank": 0, "num_running_reqs": running, "num_waiting_reqs": 0,
            "num_waiting_uncached_tokens": 0, "token_usage": 0, "num_used_tokens": 0, "max_total_num_tokens": 8}]})
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())
    def log_message(self, *args):
        pass
print("serving on", port, flush=True)
http.server.ThreadingHTTPServer((host, port), Handler).serve_forever()
"""


@dataclass(frozen=True)
class ScriptEngines:
    """`Engines` whose ranks answer at once. The file `rooms` holds the number of requests that they claim to have."""

    rooms: str

    def bundle(self, spec: GroupSpec) -> Mapping[str, float]:
        return {RANK_RESOURCE: 1.0}

    def check(self, spec: GroupSpec) -> None:
        if spec.gpus_per_node > 1:
            raise NoEngineError(f"{spec.group} cannot run: the script has no GPUs")

    def command(self, spec: GroupSpec, rank: int, endpoints: RankEndpoints) -> Command:
        port = str(endpoints.http_port)
        return Command((sys.executable, "-S", "-E", "-c", SCRIPT, endpoints.host, port, self.rooms), {})

    def service(self, spec: GroupSpec, leader: RankEndpoints) -> Service:
        return Service(
            url=url_of(leader),
            bootstrap_host=leader.host,
            bootstrap_port=leader.bootstrap_port,
            dp_size=spec.nodes,
            weight_version="1",
        )
