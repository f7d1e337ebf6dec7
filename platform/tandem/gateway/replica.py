"""One gateway replica: its own thread, its own event loop, its own listening socket. Knows nothing of Ray.

Several replicas on one node share a port (`SO_REUSEPORT`); the kernel spreads the connections.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import http.client
import logging
import os
import resource
import socket
import ssl
import threading
import time
import uuid
from concurrent.futures import Future
from pathlib import Path

import msgspec
import uvloop

from tandem.config import FleetConfig, TlsConfig
from tandem.core.types import GatewayReplica as Record
from tandem.gateway.access.tls import probe_context
from tandem.gateway.assembly import Gateway, Setting
from tandem.gateway.survival.registration import Registration

log = logging.getLogger(__name__)

_M_MMAP_THRESHOLD = -3
"""malloc.h"""
_PROBES = 64
"""Connections until one that shares its port with others counts as not reached."""


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
        address: str = "",
    ) -> None:
        """`folder` is where the embedded store's file lives; `store_url` overrides the configuration's. `address`: the
        node's, which others are told of a replica that listens on all of them; empty = what its host name means."""
        self.replica = replica or f"gateway-{uuid.uuid4().hex[:8]}"
        self._config = config
        self._model_path = model_path
        self._store_url = store_url or config.state.url
        self._folder = folder
        self._node = node
        self._address = address
        self._record: Record | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._grace = self._linger = 0.0
        self._telling = threading.Lock()
        self._told = threading.Event()
        """That it is to stop."""

    @property
    def url(self) -> str:
        """Where it listens; the port is the bound one."""
        if self._record is None:
            raise ReplicaError("the gateway replica has not started")
        return self._record.url

    def start(self, deadline: float = 60.0) -> Record:
        """Listen and register; returns when it answers. Raises ReplicaError within `deadline` seconds."""
        raise_descriptor_limit()
        give_large_blocks_back()
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

    def stop(self, grace: float = 30.0, *, linger: float = 0.0) -> None:
        """Leave the store, take no new connection, let requests end for `grace` seconds, end the rest.

        `linger`: before that it takes requests for so many seconds, while `/health` says 503, for load balancers that
        go by that. Idempotent; who comes second waits for what the first has asked for.
        """
        thread = self._thread
        if thread is None:
            return
        with self._telling:
            if not self._told.is_set():
                self._grace, self._linger = grace, linger
                self._told.set()
                if self._loop is not None and self._stopping is not None:
                    # The loop may have ended by itself meanwhile.
                    with contextlib.suppress(RuntimeError):
                        self._loop.call_soon_threadsafe(self._stopping.set)
        thread.join(self._linger + self._grace + 15)
        if thread.is_alive():
            log.error("the gateway's thread did not end %g s after its grace", 15.0)

    def probe(self, within: float = 1.0, budget: float = 8.0) -> None:
        """Ask our own listener for `/health`, `within` seconds each time, `budget` in all; raises ReplicaError unless
        this very replica answers.

        One that has been told to stop is left to it.
        """
        if self._record is None or self._thread is None or not self._thread.is_alive():
            raise ReplicaError("the gateway's thread is not running")
        if self._told.is_set():
            return
        silent: TimeoutError | None = None
        ends = time.monotonic() + budget
        for _ in range(_PROBES):
            try:
                health = _health(self._record.url, within, self._config.gateway.tls)
            except TimeoutError as error:
                # The kernel may have chosen another one that shares the port, and stands still: not our fault.
                silent = error
                if time.monotonic() + within > ends:
                    break
                continue
            except (ssl.SSLError, ConnectionResetError) as error:
                # It answers: it wants a client's certificate, and ours is none. (uvloop closes without an alert.)
                if not _wants_certificates(self._config.gateway.tls):
                    raise ReplicaError(f"{self._record.url}/health does not answer: {error}") from error
                return
            except (OSError, ValueError, http.client.HTTPException) as error:
                raise ReplicaError(f"{self._record.url}/health does not answer: {error}") from error
            if health.get("replica") == self.replica:
                return
        if silent is not None:
            raise ReplicaError(f"{self._record.url}/health does not answer: {silent}") from silent
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
            health = _health(url, 1.0, self._config.gateway.tls)
        except ConnectionRefusedError:
            # Ours is bound but does not listen yet, so nobody does.
            return listener
        except TimeoutError:
            # Only one of this user's who shares the port, too, can be there: a replica that stands still.
            log.warning("another gateway on %s does not answer; this one listens beside it", url)
            return listener
        except (ssl.SSLError, ConnectionResetError):
            # Somebody does who wants certificates, as we do: it cannot be asked who it is.
            if _wants_certificates(self._config.gateway.tls):
                return listener
            health = {}
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
            alone = self._config.gateway.replicas == 1 and not self._node
            host = self._address or ("127.0.0.1" if alone else _own_address(host))
        scheme = "http" if self._config.gateway.tls is None else "https"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

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
        setting = Setting(
            config=self._config,
            model_path=self._model_path,
            store_url=self._store_url,
            folder=self._folder,
            replica=self.replica,
        )
        async with contextlib.AsyncExitStack() as stack:
            gateway = Gateway(setting, stack)
            await gateway.open()
            self._know(await gateway.listen(listener), gateway.driver.incarnation)
            assert self._record is not None, "it was made before the thread was"
            registration = Registration(gateway.store, self._record)
            registering = asyncio.create_task(registration.keep(lambda: _started(started)), name="registration")
            gateway.watch_over(registration)
            stopping = asyncio.create_task(self._stopping.wait(), name="stopping")
            work = [*gateway.tasks, registering]
            try:
                await asyncio.wait([*work, stopping], return_when=asyncio.FIRST_COMPLETED)
            finally:
                stopping.cancel()
                await registration.retire()
                if self._linger:
                    gateway.leave()
                    await asyncio.sleep(self._linger)
                await gateway.stop(self._grace)
                registering.cancel()
                await asyncio.wait([registering], timeout=5)
                await registration.leave()
            for task in work:
                if task.done() and not task.cancelled():
                    task.result()

    def _know(self, port: int, incarnation: str) -> None:
        """Where it answers gRPC, and what its engine requests begin with."""
        assert self._record is not None, "it was made before the thread was"
        host, _, _ = self._record.url.partition("://")[2].rpartition(":")
        self._record = msgspec.structs.replace(self._record, grpc=f"{host}:{port}", incarnation=incarnation)


def _started(started: Future[None]) -> None:
    """With its entry in the store the replica counts as started."""
    if not started.done():
        started.set_result(None)


def raise_descriptor_limit() -> None:
    """Allow this process as many open files as it may have: each connection is one, and 1,024 are soon gone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def give_large_blocks_back() -> None:
    """Have glibc return each freed block above 1 MiB to the system at once. By itself it raises that limit to 32 MiB as
    soon as one was freed, and what a crowd of large bodies took then stays with the process."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another C library has no such limit
        mallopt(_M_MMAP_THRESHOLD, 2**20)


def spare_the_collector() -> None:
    """Keep Python's cycle collector away from what lives as long as the process: vocabulary, templates, modules.

    A full collection walks all of it, in which no stream goes on: 50 to 200 ms with a vocabulary of 128,000 tokens. To
    be called once per process, when its replica has started. What is made later is collected as ever, less often.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def _health(url: str, within: float, tls: TlsConfig | None) -> dict[str, str]:
    """What the gateway at `url` says of itself. Raises OSError, ValueError, HTTPException."""
    host, _, port = url.partition("://")[2].rpartition(":")
    host = host.strip("[]")
    connection = http.client.HTTPConnection(host, int(port), timeout=within)
    if tls is not None:
        connection = http.client.HTTPSConnection(host, int(port), timeout=within, context=probe_context(tls))
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        return msgspec.json.decode(answer.read(), type=dict[str, str])
    finally:
        connection.close()


def _wants_certificates(tls: TlsConfig | None) -> bool:
    """Whether a gateway speaks to nobody without a client certificate, itself included."""
    return tls is not None and tls.client_ca is not None and tls.client_certificates == "required"


def _own_address(wildcard: str) -> str:
    family = socket.AF_INET6 if ":" in wildcard else socket.AF_INET
    try:
        return str(socket.getaddrinfo(socket.gethostname(), None, family, socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return "::1" if family == socket.AF_INET6 else "127.0.0.1"
