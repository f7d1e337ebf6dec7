"""A small HTTP server in an engine's place, and what the controller needs to start it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tandem.core.group_events import Service
from tandem.core.types import GroupSpec
from tandem.engine.launch import RankEndpoints
from tandem.fleet.engines import Command, NoEngineError, url_of
from tandem.fleet.ray_processes import RANK_RESOURCE

SCRIPT = """
import http.server, json, pathlib, sys, time
host, port, rooms = sys.argv[1], int(sys.argv[2]), pathlib.Path(sys.argv[3])
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        running = int(rooms.read_text()) if rooms.exists() else 0
        self.answer({"loads": [{"dp_rank": 0, "timestamp": time.time(),
            "num_running_reqs": running, "num_waiting_reqs": 0,
            "num_waiting_uncached_tokens": 0, "token_usage": 0, "num_used_tokens": 0, "max_total_num_tokens": 8}]})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers.get("content-length", 0))) or "{}")
        if self.path == "/generate":
            self.generate(asked)
        elif self.path == "/update_weights_from_disk" and "bad" in asked["model_path"]:
            self.answer({"success": False, "message": "Failed to get weights iterator: bad"}, 400)
        else:
            weights["path"] = asked.get("model_path", weights["path"])
            self.answer({"success": True, "message": "well"})
    def generate(self, asked):
        first = 1000 if "second" in weights["path"] else 500
        count = asked["sampling_params"]["max_new_tokens"]
        ids = list(range(first, first + count))
        meta = {"completion_tokens": count, "finish_reason": {"type": "length"},
            "output_token_logprobs": [[-1.0, one, None] for one in ids] if asked.get("return_logprob") else None}
        event = "data: " + json.dumps({"output_ids": ids, "meta_info": meta}) + "\\n\\ndata: [DONE]\\n\\n"
        self.send(event.encode(), 200)
    def answer(self, value, status=200):
        self.send(json.dumps(value).encode(), status)
    def send(self, body, status):
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *args):
        pass
weights = {"path": sys.argv[4]}
print("serving on", port, "with", weights["path"], flush=True)
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
        given = (endpoints.host, str(endpoints.http_port), self.rooms, self.folder(spec.weights_path))
        return Command((sys.executable, "-S", "-E", "-c", SCRIPT, *given), {})

    def service(self, spec: GroupSpec, leader: RankEndpoints) -> Service:
        return Service(
            url=url_of(leader),
            bootstrap_host=leader.host,
            bootstrap_port=leader.bootstrap_port,
            dp_size=spec.nodes,
            weight_version=spec.weight_version or "1",
        )

    def folder(self, path: str) -> str:
        return path or "/first"

    def check_weights(self, path: str) -> None:
        if path == "/none":
            raise NoEngineError("the checkpoint in /none cannot be read")

    def encode(self, path: str, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, path: str, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))
