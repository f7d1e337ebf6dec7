"""One gateway replica: its own thread, its own event loop, its own listening socket. Knows nothing of Ray.

Several replicas on one node share a port (`SO_REUSEPORT`); the kernel spreads the connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import msgspec
import uvicorn
import uvloop

from tandem.config import FleetConfig
from tandem.core.layout import CPU_KV_TOKENS
from tandem.core.types import GatewayReplica as Record
from tandem.engine.client import EngineClient
from tandem.gateway.app import App
from tandem.gateway.detokenize import Vocabulary
from tandem.gateway.fleet_view import FleetView
from tandem.gateway.metrics import Metrics
from tandem.gateway.model_card import load_card
from tandem.gateway.pages import Pages
from tandem.gateway.pairs import PairDriver
from tandem.gateway.service import Service
from tandem.gateway.tokenize import Tokenizer
from tandem.state import Store, StoreError, open_store

log = logging.getLogger(__name__)

REGISTRATION_S = 10.0
"""A replica that does not renew its entry in the store for so long is taken for dead."""
BACKLOG = 4096


class ReplicaError(RuntimeError):
    """The replica could not start, or does not answer; the message says why."""


class GatewayReplica:
    """`start`, then it listens until `stop`. `probe` tells whether it really answers."""

    def __init__(
        self,
        config: FleetConfig,
        *,
        model_path: Path,
        store_url: str | None = None,
        folder: Path,
        replica: str | None = None,
        node: str = "",
    ) -> None:
        """`folder` is where the embedded store's file lives; `store_url` overrides the configuration's."""
        self.replica = replica or f"gateway-{uuid.uuid4().hex[:8]}"
        self._config = config
        self._model_path = model_path
        self._store_url = store_url or config.state.url
        self._folder = folder
        self._node = node
        self._record: Record | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._grace = 0.0

    @property
    def url(self) -> str:
        """Where it listens; the port is the bound one."""
        if self._record is None:
            raise ReplicaError("the gateway replica has not started")
        return self._record.url

    def start(self, deadline: float = 60.0) -> Record:
        """Listen and register; returns when it answers. Raises ReplicaError within `deadline` seconds."""
        listener = self._bind()
        started: Future[None] = Future()
        self._record = Record(replica=self.replica, url=self._url(listener), pid=os.getpid(), node=self._node)
        self._thread = threading.Thread(
            target=self._run, args=(listener, started), name=f"tandem-{self.replica}", daemon=True
        )
        self._thread.start()
        try:
            started.result(deadline)
        except TimeoutError:
            self.stop(grace=0)
            raise ReplicaError(f"the gateway did not start within {deadline:g} s") from None
        except Exception as error:
            self._thread.join(deadline)
            raise ReplicaError(f"the gateway could not start: {error}") from error
        return self._record

    def stop(self, grace: float = 30.0) -> None:
        """Leave the store, take no new connection, let requests end for `grace` seconds, end the rest. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._grace = grace
        if self._loop is not None and self._stopping is not None:
            # The loop may have ended by itself meanwhile.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stopping.set)
        thread.join(grace + 15)
        if thread.is_alive():
            log.error("the gateway's thread did not end %g s after its grace", 15.0)

    def probe(self, within: float = 2.0) -> None:
        """Ask our own listener for `/health`; raises ReplicaError unless this very replica answers in time."""
        if self._record is None or self._thread is None or not self._thread.is_alive():
            raise ReplicaError("the gateway's thread is not running")
        for _ in range(32):
            try:
                health = _health(self._record.url, within)
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise ReplicaError(f"{self._record.url}/health does not answer: {error}") from error
            if health.get("replica") == self.replica:
                return
        # Others share the port, and the kernel chose them each time: the listener's health is theirs to tell.
        log.debug("%s was not reached on its shared port", self.replica)

    def _bind(self) -> socket.socket:
        host, port = self._config.gateway.host, self._config.gateway.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind((host, port))
        except OSError as error:
            listener.close()
            raise ReplicaError(
                f"the gateway cannot listen on {host}:{port}: {error.strerror}; choose another gateway.port"
            ) from error
        url = self._url(listener)
        try:
            health = _health(url, 1.0)
        except ConnectionRefusedError:
            # Ours is bound but does not listen yet, so nobody does.
            return listener
        except (OSError, ValueError, http.client.HTTPException):
            health = {}
        if health.get("fleet") == self._config.name:
            return listener
        listener.close()
        other = f"the gateway of fleet {health['fleet']!r}" if "fleet" in health else "something else"
        raise ReplicaError(f"the gateway cannot listen on {url}: {other} does; choose another gateway.port")

    def _url(self, listener: socket.socket) -> str:
        host, port = listener.getsockname()[:2]
        if host in ("0.0.0.0", "::"):
            # What others are told must be an address of this node.
            host = "127.0.0.1" if self._config.gateway.replicas == 1 and not self._node else _own_address(host)
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    # In the thread

    def _run(self, listener: socket.socket, started: Future[None]) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve(listener, started))
        except Exception as error:  # the boundary of the thread: whoever waits for the start must hear of it
            if started.done():
                log.exception("the gateway stopped")
            else:
                started.set_exception(error)
        finally:
            listener.close()

    async def _serve(self, listener: socket.socket, started: Future[None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        async with contextlib.AsyncExitStack() as stack:
            store = await open_store(self._store_url, fleet=self._config.name, folder=self._folder)
            stack.push_async_callback(store.close)
            client = EngineClient()
            stack.push_async_callback(client.close)
            metrics = Metrics()
            driver = PairDriver(client, metrics)
            view = FleetView(store, driver)
            await view.load()
            service = self._service(driver, metrics)
            stack.callback(service.close)
            pages = Pages(self.replica, self._config.name, service.card, driver, metrics, view.snapshot)
            listening = asyncio.Event()
            server = _Server(App(service, pages), listening.set)
            work = [
                asyncio.create_task(view.follow(), name="fleet-view"),
                asyncio.create_task(self._register(store, listening, started), name="registration"),
                asyncio.create_task(server.serve(sockets=[listener]), name="http"),
            ]
            stopping = asyncio.create_task(self._stopping.wait(), name="stopping")
            try:
                await asyncio.wait([*work, stopping], return_when=asyncio.FIRST_COMPLETED)
            finally:
                stopping.cancel()
                await self._close(work, store, server, driver)
            for task in work:
                if task.done() and not task.cancelled():
                    task.result()

    def _service(self, driver: PairDriver, metrics: Metrics) -> Service:
        card = load_card(self._model_path, self._config.model.name, self._smallest_pool())
        tokenizer = Tokenizer.load(self._model_path)
        return Service(self._config.gateway, card, tokenizer, Vocabulary(tokenizer.inner), driver, metrics)

    def _smallest_pool(self) -> int | None:
        """KV tokens of the DP ranks with the fewest; None where SGLang measures a GPU's memory itself."""
        on_cpu = CPU_KV_TOKENS if self._config.device == "cpu" else None
        pools = [pool.max_total_tokens or on_cpu for pool in (self._config.prefill, self._config.decode)]
        return min((tokens for tokens in pools if tokens), default=None)

    async def _close(self, work: list[asyncio.Task[None]], store: Store, server: _Server, driver: PairDriver) -> None:
        follow, register, serve = work
        register.cancel()
        await asyncio.wait([register], timeout=5)
        await self._deregister(store)
        server.should_exit = True
        done, _ = await asyncio.wait([serve], timeout=self._grace)
        if not done:
            driver.withdraw_all()
            await asyncio.wait([serve], timeout=5)
        server.force_exit = True
        await driver.drain(within=1.0)
        follow.cancel()
        serve.cancel()
        await asyncio.wait(work, timeout=5)

    async def _register(self, store: Store, listening: asyncio.Event, started: Future[None]) -> None:
        """Keep the entry in the store, from when the listener answers; then the replica counts as started."""
        assert self._record is not None, "it was made before the thread was"
        await listening.wait()
        key, value = f"gateways/{self.replica}", msgspec.json.encode(self._record)
        while True:
            try:
                if not await store.touch(key, REGISTRATION_S):
                    await store.put(key, value, ttl=REGISTRATION_S)
            except StoreError as error:
                # Requests go on without the store; the entry is made again when it is back.
                log.warning("could not renew the gateway's registration: %s", error)
            if not started.done():
                started.set_result(None)
            await asyncio.sleep(REGISTRATION_S / 3)

    async def _deregister(self, store: Store) -> None:
        try:
            await store.delete(f"gateways/{self.replica}")
        except StoreError as error:
            log.warning("could not remove the gateway's registration, it expires by itself: %s", error)


class _Server(uvicorn.Server):
    """uvicorn on a socket that is bound already; says when it listens."""

    def __init__(self, app: App, on_started: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                interface="asgi3",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=75,
                server_header=False,
            )
        )
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_started()


def _health(url: str, within: float) -> dict[str, str]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=within)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        return msgspec.json.decode(answer.read(), type=dict[str, str])
    finally:
        connection.close()


def _own_address(wildcard: str) -> str:
    family = socket.AF_INET6 if ":" in wildcard else socket.AF_INET
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None, family, socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return "::1" if family == socket.AF_INET6 else "127.0.0.1"
