"""A whole gateway in one event loop: stand-in engines on sockets, and the ASGI application called directly."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from engine_standin import Engine, engine
from gateway_model import CARD, tokenizer, vocabulary

from tandem.config import GatewayConfig
from tandem.core.types import FleetSnapshot, Group, GroupState, Role
from tandem.engine.client import EngineClient
from tandem.gateway.app import App
from tandem.gateway.metrics import Metrics
from tandem.gateway.pages import Pages
from tandem.gateway.pairs import PairDriver
from tandem.gateway.service import Service


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
        texts = [text.removeprefix("data: ") for text in self.body.decode().split("\n\n") if text]
        return [text if text == "[DONE]" else json.loads(text) for text in texts]

    def text(self) -> str:
        """The text of a streamed completion."""
        return "".join(choice["text"] for event in self.events()[:-1] for choice in event["choices"])


class Call:
    """One HTTP request to the application."""

    def __init__(self, app: App, method: str, path: str, body: bytes, headers: dict[str, str]) -> None:
        self.answer = Answer()
        self._app = app
        self._scope = {
            "type": "http",
            "method": method,
            "path": path,
            "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
        }
        self._incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._incoming.put_nowait({"type": "http.request", "body": body, "more_body": False})
        self._news = asyncio.Event()
        self.slow = asyncio.Event()
        self.slow.set()
        """Cleared, the client does not read."""

    async def run(self) -> Answer:
        async with asyncio.timeout(5):
            await self._app(self._scope, self._incoming.get, self._send)
        return self.answer

    def leave(self) -> None:
        """Close the client's connection."""
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def until_body(self) -> None:
        """Wait until something of the answer has come."""
        await self._news.wait()

    async def _send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.answer.status = message["status"]
            self.answer.headers = {key.decode(): value.decode() for key, value in message["headers"]}
            return
        await self.slow.wait()
        self.answer.body += message["body"]
        self.answer.complete = not message.get("more_body", False)
        self._news.set()


@dataclass
class World:
    """The engines by group name, and the gateway."""

    engines: dict[str, Engine]
    driver: PairDriver
    service: Service
    app: App

    def call(self, path: str, body: object = None, headers: dict[str, str] | None = None, method: str = "") -> Call:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return Call(self.app, method or ("GET" if body is None else "POST"), path, data, headers or {})

    async def get(self, path: str) -> Answer:
        return await self.call(path).run()

    async def complete(self, **fields: Any) -> Answer:
        return await self.call("/v1/completions", {"model": "tiny", "prompt": [5, 6], **fields}).run()

    async def chat(self, **fields: Any) -> Answer:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], **fields}
        return await self.call("/v1/chat/completions", body).run()

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

    def metric(self, name: str, **labels: str) -> float:
        return self.service.metrics.registry.get_sample_value(name, labels) or 0.0


@contextlib.asynccontextmanager
async def world(*names: str, **config: Any) -> AsyncIterator[World]:
    """A gateway with groups of these names ("p…" prefill, "d…" decode), all ready."""
    async with contextlib.AsyncExitStack() as stack:
        engines = {
            name: await stack.enter_async_context(engine("prefill" if name.startswith("p") else "decode"))
            for name in names
        }
        client = EngineClient(connect_s=2)
        stack.push_async_callback(client.close)
        metrics = Metrics()
        driver = PairDriver(client, metrics)
        service = Service(GatewayConfig(**config), CARD, tokenizer(), vocabulary(), driver, metrics)
        stack.callback(service.close)
        pages = Pages("g1", "test", CARD, driver, metrics, lambda: FleetSnapshot(name="test"))
        made = World(engines, driver, service, App(service, pages))
        for name in names:
            made.group(name)
        yield made
        await made.quiet()
