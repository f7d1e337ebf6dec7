"""`tandem node head`: Ray's GCS, the controller and the gateways' deployment, for a fleet whose nodes join it.

It belongs to nobody's life but its own: groups and gateways live on while it is away, and it finds them again by what
the GCS and the store remember. It starts no group: who runs the fleet says which there are (`FleetControl`).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Collection
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tandem.config import FleetConfig
from tandem.core.heartbeat import Limits
from tandem.fleet.engines import Engines
from tandem.fleet.host_steps import (
    HostError,
    ServedModel,
    check_model,
    controller_settings,
    fleet_record,
    run_controller,
)
from tandem.fleet.node_cluster import HeadCluster, joined_cluster, own_cluster, scope_of
from tandem.fleet.node_config import read_config
from tandem.fleet.node_follow import follow
from tandem.fleet.node_gateways import Gateways
from tandem.fleet.node_model import ModelFollower, what_serves
from tandem.fleet.node_probe import Probe
from tandem.fleet.node_process import RUN_FOLDER, make_folder
from tandem.fleet.node_ray import NodeOrders
from tandem.fleet.plan import wanted_groups
from tandem.fleet.ray_guest import head_resource, ranks_folder
from tandem.fleet.snapshot import DESIRED, FLEET_KEY, GROUPS
from tandem.state import Store, StoreError, open_store

log = logging.getLogger(__name__)

_STORE_AGAIN_S = 2.0
_LEAVE_S = 15.0


@dataclass(frozen=True, kw_only=True)
class HeadSettings:
    """What the head is told."""

    config: Path
    """`fleet.json`; read again whenever it changes."""
    host: str
    """Its address."""
    data: Path
    """What Ray remembers, and logs; on a volume, a head that is moved goes on with what was."""
    name: str = ""
    """What Ray calls it in a cluster that is not its own; empty = its address."""
    gcs_port: int = 6380
    run: Path = RUN_FOLDER
    state_url: str = ""
    """In place of the configuration's, where that must hold no secret."""
    tenants: Path | None = None
    """YAML file of further tenants, by name; followed as well."""
    probe_host: str = ""
    """Empty = all addresses."""
    probe_port: int = 8090


class Head:
    """The parts of a head, in the order of their start."""

    def __init__(self, settings: HeadSettings, *, engines: Engines | None = None) -> None:
        """`engines`: None = SGLang."""
        self._settings = settings
        self._engines = engines
        # A thread that still asks Ray something when the head ends must not start a cluster for it.
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
        self._folder = make_folder(settings.run, settings.host)
        self._missing = "it has just been started"
        self._cluster: HeadCluster | None = None

    def own(self) -> Collection[int]:
        """PIDs of the children that somebody waits for."""
        return self._cluster.pids if self._cluster else []

    async def run(self, stop: asyncio.Event) -> None:
        """Be the head until `stop`. Raises HostError."""
        probe = Probe(lambda: self._missing)
        try:
            await probe.open(self._settings.probe_host, self._settings.probe_port)
        except OSError as error:
            raise HostError(f"cannot listen on port {self._settings.probe_port}: {error}") from error
        work = asyncio.create_task(self._work(), name="head")
        stopped = asyncio.create_task(stop.wait(), name="stop")
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        self._missing = "it ends"
        for task in (work, stopped):
            task.cancel()
        await asyncio.gather(work, stopped, return_exceptions=True)
        await probe.close()
        if not work.cancelled() and (error_ := work.exception()) is not None:
            raise error_

    async def _work(self) -> None:
        from tandem.fleet.controller_watch import keep_controller_moving

        config = self._read()
        model = ServedModel.of(config, self._settings.run)
        wrong: HostError | None = None
        try:
            await check_model(config, model)
        except HostError as error:
            log.error("%s", error)
            wrong = error
        async with AsyncExitStack() as stack:
            cluster = await stack.enter_async_context(self._ray(config, model))
            store = await self._open_store(stack, config)
            if wrong is not None:
                config, model = await what_serves(store, config, self._settings.run, wrong)
            if config.ray.address is not None:
                stack.push_async_callback(self._leave_nothing, store, config)
            await self._remember(store, config, model)
            self._missing = "the controller has not answered yet"
            await self._run_controller(config, model)
            gateways = Gateways(folder=self._folder / "store")
            gateways.want(config, model.path)
            self._missing = ""
            log.info("the head is up: control service on port %d", config.control.port)
            tasks = [
                asyncio.create_task(self._tend(cluster), name="cluster"),
                asyncio.create_task(keep_controller_moving(), name="controller"),
                asyncio.create_task(gateways.keep(), name="gateways"),
                asyncio.create_task(self._follow(store, config, model, gateways), name="configuration"),
            ]
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    # -- the configuration

    def _read(self) -> FleetConfig:
        settings = self._settings
        return read_config(settings.config, tenants=settings.tenants, state_url=settings.state_url)

    async def _follow(self, store: Store, config: FleetConfig, model: ServedModel, gateways: Gateways) -> None:
        """Carry out each change of the configuration."""
        follower = ModelFollower(
            store,
            config,
            model,
            folder=self._settings.run,
            engines=self._engines,
            gateways=gateways.want,
            controller=self._run_controller,
        )
        await follow(self._read, follower.carry_out, config)

    # -- the parts

    def _ray(self, config: FleetConfig, model: ServedModel) -> AbstractAsyncContextManager[HeadCluster]:
        settings, folder = self._settings, self._folder / "r"
        settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
        tiny = "" if config.model.path else str(model.path)
        forked = config.device == "cpu" and self._engines is None
        orders = NodeOrders(device=config.device, nursery=forked, tiny=tiny)
        if config.ray.address is None:
            return own_cluster(
                config,
                orders,
                folder=folder,
                host=settings.host,
                port=settings.gcs_port,
                memory=settings.data / "gcs",
                began=self._began,
            )
        return joined_cluster(
            config,
            orders,
            folder=folder,
            host=settings.host,
            name=settings.name or settings.host,
            told=self._tell,
            began=self._began,
        )

    def _began(self, cluster: HeadCluster) -> None:
        self._cluster = cluster

    def _tell(self, why: str) -> None:
        self._missing = why or "the controller has not answered yet"

    async def _tend(self, cluster: HeadCluster) -> None:
        raise HostError(await cluster.tend())

    async def _open_store(self, stack: AsyncExitStack, config: FleetConfig) -> Store:
        while True:
            try:
                store = await open_store(config.state.url, fleet=config.name, folder=self._folder)
                stack.push_async_callback(store.close)
                await store.get(FLEET_KEY)
                return store
            except StoreError as error:
                self._missing = str(error)
                log.warning("%s", error)
                await asyncio.sleep(_STORE_AGAIN_S)

    async def _leave_nothing(self, store: Store, config: FleetConfig) -> None:
        """Take the gateways out of another's Serve when the fleet ends: when it has been left without a group, and
        wants none. Otherwise the next head goes on with them."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        from tandem.gateway.deployment import remove

        try:
            async with asyncio.timeout(_LEAVE_S):
                if await store.list(DESIRED) or await store.list(GROUPS):
                    return
                await asyncio.to_thread(remove, config)
                log.info("the fleet has no group any more: its gateways are taken out of Ray Serve")
        except (StoreError, RayError, RayServeException, RuntimeError, TimeoutError) as error:
            log.warning("Ray Serve may still list the gateways of fleet %s: %s", config.name, error)

    async def _remember(self, store: Store, config: FleetConfig, model: ServedModel) -> None:
        """At the fleet's very first start, note what it has in common and the groups that it begins with. Later these
        are others' to change, and the weights may have been."""
        if await store.get(FLEET_KEY) is not None:
            return
        record = fleet_record(config, model)
        for spec in wanted_groups(config):
            # By their path: the configuration may come to name other weights, and these are the ones of that version.
            own = msgspec.structs.replace(spec, weights_path=record.model_path, weight_version=record.model_version)
            await store.compare_and_set(f"{DESIRED}{spec.group}", msgspec.json.encode(own), version=0)
        await store.put(FLEET_KEY, msgspec.json.encode(record))

    async def _run_controller(self, config: FleetConfig, model: ServedModel) -> None:
        from tandem.fleet.rank import RankSettings

        self._logs.mkdir(exist_ok=True)
        ranks = RankSettings(limits=Limits.within(config.timeouts.hang_s, config.device))
        if scope := scope_of(config):  # others may have ranks of the same name on those nodes
            folder = ranks_folder(scope)
            ranks = msgspec.structs.replace(ranks, logs=str(folder / "logs"), scratch=str(folder))
        settings = controller_settings(
            config,
            model,
            ranks,
            store_folder=self._folder,
            log=self._logs / "controller.log",
            engines=self._engines,
            place=head_resource(scope),
            version=_digest(config.model_dump(mode="json", exclude={"gateway", "tenants", "default_tenant", "oidc"})),
        )
        await run_controller(settings)

    @property
    def _logs(self) -> Path:
        return self._settings.data / "logs"


def _digest(value: Any) -> str:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()[:16]
