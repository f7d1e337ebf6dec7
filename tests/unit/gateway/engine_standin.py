"""A stand-in for one SGLang server, for tests only: it speaks `/generate`, `/abort_request`, `/v1/loads` and `/ready`
over real sockets, and does to each request what its next `Script` says."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

LENGTH = {"type": "length", "length": 1}


@dataclass
class Script:
    """What becomes of one `/generate`: `ids` first, each in an event of its own, then the end."""

    ids: list[int] = field(default_factory=lambda: [70, 71, 72])
    finish: dict[str, Any] | None = field(default_factory=lambda: dict(LENGTH))
    """The last event's finish reason; None = hang until aborted."""
    status: int = 200
    error: dict[str, Any] | None = None
    """An `error` event instead of an end."""
    cut: bool = False
    """Close the connection instead of an end."""
    cumulative: bool = False
    deaf: bool = False
    """Ignore the first abort, as SGLang does when the abort overtakes the request."""
    go: asyncio.Event | None = None
    """Wait for it before the last token."""


class Engine:
    """`async with engine(role)` starts it; `url` is where it listens."""

    def __init__(self, role: str) -> None:
        self.role = role
        self.url = ""
        self.scripts: deque[Script] = deque()
        self.default = Script(ids=[]) if role == "prefill" else Script()
        self.choose: Callable[[dict[str, Any]], Script | None] = lambda body: None
        """The script for a request's body, where the order of requests is not certain; None = the next of `scripts`."""
        self.weights = "v1"
        """The version that it says it has."""
        self.bodies: list[dict[str, Any]] = []
        self.traces: list[str] = []
        """The `traceparent` of each of `bodies`; empty = there was none."""
        self.aborted: list[str] = []
        self.connections = 0
        self.running: dict[str, asyncio.Event] = {}
        self.changed = asyncio.Condition()
        self._deaf: set[str] = set()
        self._open: dict[asyncio.StreamWriter, asyncio.Task[None]] = {}

    async def idle(self) -> None:
        """Wait until nothing runs."""
        await self.until(lambda: not self.running)

    async def until(self, true: Any) -> None:
        async with asyncio.timeout(5), self.changed:
            await self.changed.wait_for(true)

    async def _note(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._open[writer] = task
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                method, path, _ = head.split("\r\n")[0].split(" ")
                headers = dict(line.split(": ", 1) for line in head.strip().split("\r\n")[1:])
                body = json.loads(await reader.readexactly(int(headers["content-length"])) or b"{}")
                if path == "/generate":
                    self.traces.append(headers.get("traceparent", ""))
                if not await self._answer(f"{method} {path.partition('?')[0]}", body, reader, writer):
                    break
        writer.close()
        del self._open[writer]

    async def close(self) -> None:
        """Drop every connection."""
        serving = list(self._open.values())
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.gather(*serving)

    async def _answer(
        self, what: str, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        match what:
            case "POST /generate":
                return await self._generate(body, reader, writer)
            case "POST /abort_request":
                self.aborted.append(body["rid"])
                if body["rid"] in self._deaf:
                    self._deaf.discard(body["rid"])
                elif body["rid"] in self.running:
                    self.running[body["rid"]].set()
                _reply(writer, 200, b"")
                await self._note()
            case "GET /v1/loads":
                load = {"dp_rank": 1, "num_running_reqs": 2, "num_waiting_reqs": 3, "token_usage": 0.5, "new": 1}
                _reply(writer, 200, json.dumps({"loads": [load]}).encode())
            case "GET /ready":
                _reply(writer, 200, b"")
            case _:
                _reply(writer, 404, b"{}")
        return True

    async def _generate(self, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        script = self.choose(body) or (self.scripts.popleft() if self.scripts else self.default)
        self.bodies.append(body)
        if script.status != 200:
            _reply(writer, script.status, b'{"error": {"message": "the scheduler is down"}}')
            await self._note()
            return True
        rid = body["rid"]
        aborted = self.running[rid] = asyncio.Event()
        if script.deaf:
            self._deaf.add(rid)
        await self._note()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        left = asyncio.create_task(reader.read(1))
        try:
            return await self._stream(script, body, aborted, left, writer)
        finally:
            left.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await left
            del self.running[rid]
            await self._note()

    async def _stream(
        self,
        script: Script,
        body: dict[str, Any],
        aborted: asyncio.Event,
        left: asyncio.Task[bytes],
        writer: asyncio.StreamWriter,
    ) -> bool:
        for count in range(1, len(script.ids) + (script.finish is None or script.cut)):
            _event(writer, _chunk(script, count, None, body, self.weights))
            await writer.drain()
        ways = [asyncio.create_task(aborted.wait())]
        if script.go is not None:
            ways.append(asyncio.create_task(script.go.wait()))
        if script.finish is None or script.go is not None:
            await asyncio.wait([*ways, left], return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        if script.cut or left.done():
            return False
        if script.error is not None:
            _event(writer, {"error": script.error})
        else:
            finish = {"type": "abort", "message": "Aborted"} if aborted.is_set() else script.finish
            _event(writer, _chunk(script, len(script.ids), finish, body, self.weights))
        _write(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return True


def logprob_of(token: int) -> float:
    """What the stand-in says of any token; those beside it are its likeliest alternatives."""
    return -token / 1024


def _chunk(
    script: Script, count: int, finish: dict[str, Any] | None, body: dict[str, Any], weights: str
) -> dict[str, Any]:
    meta = {
        "id": "x",
        "finish_reason": finish,
        "prompt_tokens": len(body["input_ids"]),
        "completion_tokens": count,
        "cached_tokens": 2,
        "weight_version": weights,
    }
    ids = script.ids[:count] if script.cumulative else script.ids[count - 1 : count]
    if body.get("return_logprob"):
        meta["output_token_logprobs"] = [(logprob_of(token), token, None) for token in ids]
    if top := body.get("top_logprobs_num"):
        meta["output_top_logprobs"] = [[(logprob_of(i), i, None) for i in range(i, i + top)] for i in ids]
    return {"text": "", "output_ids": ids, "meta_info": meta}


def _event(writer: asyncio.StreamWriter, data: dict[str, Any]) -> None:
    _write(writer, b"data: " + json.dumps(data).encode() + b"\n\n")


def _write(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(b"%x\r\n" % len(data) + data + b"\r\n")


def _reply(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
    writer.write(b"HTTP/1.1 %d x\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body)


@contextlib.asynccontextmanager
async def engine(role: str) -> AsyncIterator[Engine]:
    """A running stand-in."""
    made = Engine(role)
    server = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield made
    finally:
        server.close()
        await made.close()
