"""A whole gateway in one event loop: stand-in engines and clients, all on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from engine_standin import Engine, Script, engine
from gateway_model import CARD, ids_of, tokenizer, vocabulary
from opentelemetry.sdk.trace.export import SpanExporter

from tandem.config import FleetConfig
from tandem.core.types import FleetSnapshot, Group, GroupState, Role
from tandem.core.usage import UsageRecord
from tandem.engine.client import EngineClient
from tandem.gateway.access.admission import Admission
from tandem.gateway.access.admission_metrics import AdmissionMetrics
from tandem.gateway.access.auth import Authenticator
from tandem.gateway.access.keys import KeyRing, keep, mint, revoke
from tandem.gateway.access.limits import LocalLimits
from tandem.gateway.http.app import App
from tandem.gateway.http.pages import Pages
from tandem.gateway.http.server import HttpServer
from tandem.gateway.observe.logs import RequestLog
from tandem.gateway.observe.metrics import Metrics
from tandem.gateway.observe.tracing import Tracing
from tandem.gateway.pairing.pairs import PairDriver
from tandem.gateway.service import Service
from tandem.gateway.usage.metering import Meter
from tandem.models.tokenizer import EOS_ID
from tandem.state import Store, open_store

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where a file waits for no disk; the store's own tests are elsewhere."""


def saying(text: str, **fields: Any) -> Script:
    """An engine that says this, and ends as a model does."""
    return Script(ids=[*ids_of(text), EOS_ID], finish={"type": "stop", "matched": EOS_ID}, **fields)


@dataclass
class Answer:
    """What a client got."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """Server-sent events; `[DONE]` as the string."""
        texts = [line.removeprefix("data: ") for line in self.body.decode().split("\n") if line.startswith("data: ")]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]

    def comments(self) -> int:
        """Comments among the events: nothing but signs of life."""
        return sum(text.startswith(":") for text in self.body.decode().split("\n\n"))

    def text(self) -> str:
        """The text of a streamed completion."""
        return "".join(choice["text"] for event in self.events()[:-1] for choice in event["choices"])


class Call:
    """One HTTP request on a connection of its own."""

    def __init__(self, address: tuple[str, int], method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
        self.answer = Answer()
        self._address = address
        lines = [f"{method} {path} HTTP/1.1", "host: test", *(f"{key}: {value}" for key, value in headers.items())]
        self._head = method == "HEAD"
        if self._head:
            lines.append("connection: close")
        elif method != "GET" and "content-length" not in headers and "transfer-encoding" not in headers:
            lines.append(f"content-length: {len(body)}")
        self._request = "\r\n".join(lines).encode() + b"\r\n\r\n" + body
        self._news = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self.slow = asyncio.Event()
        self.slow.set()
        """Cleared, the client does not read."""

    async def run(self) -> Answer:
        async with asyncio.timeout(5):
            reader, self._writer = await asyncio.open_connection(*self._address, limit=2**16)
            try:
                self._writer.write(self._request)
                await self._read(reader)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass  # the answer is what has come; `complete` tells that it is not whole
            finally:
                self._writer.close()
        return self.answer

    def leave(self) -> None:
        """Close the client's connection."""
        assert self._writer is not None
        self._writer.transport.abort()

    async def until_body(self, part: bytes = b"") -> None:
        """Wait until something of the answer has come, with `part` in it."""
        while not self.answer.body or part not in self.answer.body:
            self._news.clear()
            await self._news.wait()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        self.answer.status = int(status.split(" ")[1])
        self.answer.headers = dict(line.split(": ", 1) for line in lines)
        if self._head:
            self._add(await reader.read())
            self.answer.complete = True
            return
        if "content-length" in self.answer.headers:
            self._add(await reader.readexactly(int(self.answer.headers["content-length"])))
            self.answer.complete = True
            return
        while True:
            await self.slow.wait()
            size = int(await reader.readuntil(b"\r\n"), 16)
            data = (await reader.readexactly(size + 2))[:-2]
            if not data:
                self.answer.complete = True
                return
            self._add(data)

    def _add(self, data: bytes) -> None:
        self.answer.body += data
        self._news.set()


class Notes(Meter):
    """A meter that keeps its records."""

    def __init__(self) -> None:
        self.records: list[UsageRecord] = []
        self.disk = asyncio.Event()
        self.disk.set()
        """Cleared, no record is safe."""

    def record(self, record: UsageRecord) -> bool:
        self.records.append(record)
        return False

    async def written(self, record: UsageRecord, within: float = 0.5) -> None:
        self.record(record)
        await self.disk.wait()


@dataclass
class World:
    """The engines by group name, and the gateway."""

    engines: dict[str, Engine]
    driver: PairDriver
    service: Service
    address: tuple[str, int]
    records: list[UsageRecord]
    store: Store
    keys: KeyRing
    meter: Notes

    def call(self, path: str, body: object = None, headers: dict[str, str] | None = None, method: str = "") -> Call:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        return Call(self.address, method or ("GET" if body is None else "POST"), path, data, headers or {})

    async def get(self, path: str) -> Answer:
        return await self.call(path).run()

    async def complete(self, **fields: Any) -> Answer:
        return await self.call("/v1/completions", {"model": "tiny", "prompt": [5, 6], **fields}).run()

    async def chat(self, **fields: Any) -> Answer:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.call("/v1/chat/completions", body).run()

    async def messages(self, **fields: Any) -> Answer:
        body = {"model": "tiny", "max_tokens": 100, "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.call("/v1/messages", body).run()

    async def responses(self, **fields: Any) -> Answer:
        return await self.call("/v1/responses", {"model": "tiny", "input": "hi", **fields}).run()

    async def key(self, tenant: str) -> dict[str, str]:
        """A new key of the tenant, as a client sends it."""
        record, key = mint(tenant, now=time.time())
        assert await keep(self.store, record)
        await self.keys.loaded()
        return {"authorization": f"Bearer {key}"}

    async def revoke(self, key: dict[str, str]) -> None:
        assert await revoke(self.store, key["authorization"].split("-")[1], now=time.time())
        await self.keys.loaded()

    def group(self, name: str, **fields: Any) -> None:
        """Let the gateway see the group (so)."""
        made = self.engines[name]
        values: dict[str, Any] = {
            "group": name,
            "role": Role(made.role),
            "epoch": 1,
            "state": GroupState.READY,
            "url": made.url,
            "bootstrap_host": "10.0.0.1",
            "bootstrap_port": 8998,
            "dp_size": 2,
            **fields,
        }
        self.driver.put_group(Group(**values))

    async def quiet(self) -> None:
        """Wait until nothing is open: no request, no room, no load, and nothing runs in any engine."""
        await self.driver.drain(within=5)
        for one in self.engines.values():
            await one.idle()
        assert (self.driver.table.open_requests, self.driver.table.open_rooms) == (0, 0)
        assert self.driver.router.open_legs == 0

    async def until(self, true: Callable[[], bool]) -> None:
        """Let the gateway work until it is so."""
        async with asyncio.timeout(5):
            while not true():
                await asyncio.sleep(0.001)

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0


@contextlib.asynccontextmanager
async def world(
    *names: str, fleet: dict[str, Any] | None = None, exporter: SpanExporter | None = None, **config: Any
) -> AsyncIterator[World]:
    """A gateway with groups of these names ("p…" prefill, "d…" decode), all ready.

    `config`: fields of the gateway's configuration; `fleet`: others of the fleet's; `exporter` gets its traces.
    """
    whole = FleetConfig.model_validate({"name": "test", "gateway": config, **(fleet or {})})
    async with contextlib.AsyncExitStack() as stack:
        engines = {
            name: await stack.enter_async_context(engine("prefill" if name.startswith("p") else "decode"))
            for name in names
        }
        client = EngineClient(connect_s=2)
        stack.push_async_callback(client.close)
        metrics = Metrics()
        driver = PairDriver(client, metrics)
        meter = Notes()
        folder = Path(stack.enter_context(TemporaryDirectory(dir=MEMORY)))
        store = await open_store("embedded", fleet="test", folder=folder)
        stack.push_async_callback(store.close)
        keys = KeyRing(store)
        following = asyncio.create_task(keys.follow())
        stack.callback(following.cancel)
        await keys.loaded()
        service = Service(
            whole.gateway,
            CARD,
            tokenizer(),
            vocabulary(),
            driver,
            metrics,
            authenticator=Authenticator(whole, keys),
            admission=Admission(
                LocalLimits("g1", lambda: 1),
                max_waiting=whole.admission.max_waiting,
                observer=AdmissionMetrics(metrics),
            ),
            meter=meter,
            tracing=Tracing(None, exporter=exporter),
            log=RequestLog(log_prompts=whole.observability.log_prompts),
            queue_s=whole.admission.queue_s,
            replica="g1",
        )
        stack.callback(service.close)
        stack.push_async_callback(service.tracing.close)
        pages = Pages("g1", "test", service, lambda: FleetSnapshot(name="test"))
        server = HttpServer(App(service, pages))
        listener = socket.create_server(("127.0.0.1", 0))
        await server.start(listener)
        stack.callback(server.abort)
        made = World(engines, driver, service, listener.getsockname(), meter.records, store, keys, meter)
        for name in names:
            made.group(name)
        yield made
        assert await server.stop(grace=5)
        await made.quiet()
