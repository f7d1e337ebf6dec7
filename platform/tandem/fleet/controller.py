"""The controller: a named, restartable Ray actor that owns the set of groups of a fleet, and serves its control API.

All it knows is in the store and in the ranks' actors. So it may die at any time: Ray starts it again, and it takes over
what lives.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, cast

import grpc
import msgspec
import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError

from tandem.core.group import Policy
from tandem.fleet.autoscale import Autoscaler, AutoscaleSettings
from tandem.fleet.backend import StoreBackend
from tandem.fleet.bound import die_with_parent
from tandem.fleet.control_service import serve_control
from tandem.fleet.engines import Engines
from tandem.fleet.hands import HandsSettings
from tandem.fleet.rank_actors import counters_of_all, named_ranks
from tandem.fleet.ray_processes import HEAD_RESOURCE
from tandem.fleet.reconcile import ConflictError, Reconciler, failures
from tandem.fleet.refresh import RefreshDriver
from tandem.fleet.snapshot import FLEET_KEY, GROUPS, FleetRecord
from tandem.state import Store, StoreError, open_store

CONTROLLER_NAME = "controller"
"""Of the actor, in the fleet's Ray namespace."""
CONTROL_KEY = "control"
"""In the store: `{"address": "host:port"}` of the control service."""

_BACKOFF_S = (0.5, 1.0, 2.0, 5.0)
_STABLE_S = 60.0
_MEMORY_S = 30.0
_GONE_S, _LOOK_S = 0.05, 0.2
_log = logging.getLogger(__name__)


class ControlAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the control service listens. The store holds it under `control`."""

    address: str


class ControllerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """All that a controller is told. Times in seconds."""

    fleet: FleetRecord
    store_url: str
    store_folder: str
    """Where the embedded store's file lives."""
    engines: Any
    """An `Engines`."""
    hands: HandsSettings
    policy: Policy = Policy()
    drain: float = 120.0
    refresh_drain: float = 660.0
    """A group whose weights are to change may take so long to be empty."""
    control_host: str = "127.0.0.1"
    control_port: int = 9000
    """0 = any free port, another one after each restart; the store tells it."""
    autoscale: AutoscaleSettings | None = None
    """None = somebody else says how many groups there are."""
    log: str = ""
    """The controller's log file; empty = Ray's own."""
    version: str = ""
    """Tells settings apart (`renew_controller`)."""
    place: str = HEAD_RESOURCE
    """Ray resource of the node that it lives on."""


class Controller:
    """Runs in a process of its own, as an async Ray actor; see the module."""

    def __init__(self, settings: ControllerSettings) -> None:
        die_with_parent()
        if settings.log:
            _log_to(Path(settings.log))
        self._settings = settings
        self._engines: Engines = settings.engines
        self._address = ""
        self._serving = asyncio.Event()
        self._reconciling = asyncio.Event()
        self._trouble = "it has just been started"
        self._task = asyncio.get_running_loop().create_task(self._live(), name="controller")
        self._task.add_done_callback(_die)

    async def ready(self, within: float) -> str:
        """Wait until the control service answers and every stored group was taken over; returns its address.

        Raises TimeoutError, which says what is in the way.
        """
        try:
            async with asyncio.timeout(within):
                await self._serving.wait()
                await self._reconciling.wait()
        except TimeoutError:
            raise TimeoutError(f"the controller was not ready after {within:.0f} s: {self._trouble}") from None
        return self._address

    async def pid(self) -> int:
        """PID of the controller's process."""
        return os.getpid()

    async def version(self) -> str:
        """Which settings it works by."""
        return self._settings.version

    async def counters(self) -> dict[str, dict[int, dict[str, float]]]:
        """What the engines have counted: group → rank → Prometheus sample → value. Ranks that are away are left out."""
        return await counters_of_all()

    async def _live(self) -> None:
        """Open the store, then keep the service and the reconciliation going."""
        settings = self._settings
        store: Store | None = None
        while store is None:
            try:
                folder = Path(settings.store_folder)
                store = await open_store(settings.store_url, fleet=settings.fleet.name, folder=folder)
            except StoreError as error:
                self._trouble = str(error)
                _log.error("%s", error)
                await asyncio.sleep(_BACKOFF_S[-1])
        await self._await_memory(store)
        # One for whoever changes the set of groups: it sees to it that no two of them drain the last ones at once.
        backend = StoreBackend(store, self._engines, drain_s=settings.drain, refresh_drain_s=settings.refresh_drain)
        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            stack.push_async_callback(backend.close)
            tasks.create_task(store.keep(), name="keep")
            tasks.create_task(self._persist("the control service", lambda: self._serve(store, backend)))
            tasks.create_task(self._persist("the reconciliation", lambda: self._reconcile(store)))
            tasks.create_task(self._persist("the refresh of weights", lambda: RefreshDriver(store).run()))
            if settings.autoscale is not None:
                scaler = Autoscaler(store, backend, settings.autoscale)
                tasks.create_task(self._persist("the autoscaling", scaler.run))

    async def _await_memory(self, store: Store) -> None:
        """Where ranks live and the store knows of no group, it has come back empty: a gateway puts back what it held.
        Taken as it is, it would end all of them."""
        try:
            ranks = await named_ranks()
        except RayError as error:
            _log.warning("ranks that live already cannot be looked for: %s", error)
            return
        if not ranks:
            return
        self._trouble = f"{len(ranks)} ranks live, and the store knows of no group"
        try:
            async with asyncio.timeout(_MEMORY_S):
                async for _ in store.watch(GROUPS):
                    return
        except TimeoutError:
            _log.error("%s; nobody has put one back in %.0f s", self._trouble, _MEMORY_S)

    async def _serve(self, store: Store, backend: StoreBackend) -> None:
        settings = self._settings
        server: grpc.aio.Server | None = None
        try:
            server, port = await serve_control(backend, settings.control_host, settings.control_port)
            host = f"[{settings.control_host}]" if ":" in settings.control_host else settings.control_host
            address = f"{host}:{port}"
            await store.put(CONTROL_KEY, msgspec.json.encode(ControlAddress(address=address)))
            if await store.get(FLEET_KEY) is None:  # what is there may tell of weights that were refreshed since
                await store.put(FLEET_KEY, msgspec.json.encode(settings.fleet))
            self._address = address
            self._serving.set()
            _log.info("the control service listens on %s", address)
            await server.wait_for_termination()
        finally:
            self._serving.clear()
            if server is not None:
                await server.stop(None)

    async def _reconcile(self, store: Store) -> None:
        settings = self._settings
        reconciler = Reconciler(store, self._engines, settings.hands, settings.policy)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(reconciler.run())
                await reconciler.loaded.wait()
                self._reconciling.set()
        finally:
            self._reconciling.clear()

    async def _persist(self, what: str, work: Callable[[], Awaitable[None]]) -> None:
        """Do `work` again whenever it fails or ends, and say so each time."""
        failed = 0
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                await work()
                self._trouble = f"{what} ended"
                _log.error("%s", self._trouble)
            except Exception as error:  # noqa: BLE001 - the boundary of a task that must not die; it is reported
                causes = failures(error)
                self._trouble = f"{what} failed: {'; '.join(f'{type(cause).__name__}: {cause}' for cause in causes)}"
                foreseen = all(isinstance(cause, ConflictError | StoreError | OSError) for cause in causes)
                _log.error("%s", self._trouble, exc_info=None if foreseen else error)
            failed = 1 if loop.time() - began > _STABLE_S else failed + 1
            await asyncio.sleep(_BACKOFF_S[min(failed, len(_BACKOFF_S)) - 1])


def start_controller(settings: ControllerSettings) -> ActorHandle[Controller]:
    """Start the fleet's controller, unless it runs already. This process must be connected to the cluster."""
    options: dict[str, Any] = {
        "name": CONTROLLER_NAME,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "num_cpus": 0,
        # With the GCS, without which there is no fleet anyway: so no other node's death is the controller's.
        "resources": {settings.place: 0.001},
    }
    return cast("ActorHandle[Controller]", ray.remote(Controller).options(**options).remote(settings))


def renew_controller(settings: ControllerSettings, within: float) -> ActorHandle[Controller]:
    """Start the controller; one that works by settings of another version is ended first, and the new one takes over
    what lives. Raises RayError, TimeoutError when the old one's name is not free within so many seconds."""
    ends = time.monotonic() + within
    while (old := find_controller()) is not None:
        try:
            version: str = ray.get(cast("Any", old).version.remote(), timeout=max(0.1, ends - time.monotonic()))
            if version == settings.version:
                return old
        except ActorUnavailableError:
            if time.monotonic() < ends:
                time.sleep(_LOOK_S)  # it is being started again; Ray tells nobody when it is there
                continue
        except (RayActorError, GetTimeoutError) as error:
            _log.warning("the old controller does not answer, and is replaced: %s", error)
        ray.kill(old, no_restart=True)
        if time.monotonic() >= ends:
            raise TimeoutError(f"the old controller was still there after {within:.0f} s")
        time.sleep(_GONE_S)  # Ray forgets a killed actor's name soon, and tells nobody when
    return start_controller(settings)


def find_controller() -> ActorHandle[Controller] | None:
    """The running controller, None if there is none."""
    try:
        return cast("ActorHandle[Controller]", ray.get_actor(CONTROLLER_NAME))
    except ValueError:
        return None


def _die(task: asyncio.Task[None]) -> None:
    """End the process, so that Ray starts another one: an actor without its task would only look alive."""
    error = None if task.cancelled() else task.exception()
    _log.critical("the controller's task ended", exc_info=error)
    logging.shutdown()
    os._exit(1)


def _log_to(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger = logging.getLogger("tandem")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
