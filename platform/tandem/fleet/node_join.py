"""`tandem node join`: this machine (a pod) is a node of a fleet, for the ranks of one group or for a gateway."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from tandem.fleet.host_steps import HostError
from tandem.fleet.node_logs import LogCopier
from tandem.fleet.node_probe import Probe
from tandem.fleet.node_process import RUN_FOLDER, make_folder
from tandem.fleet.node_ray import JoinedNode, NodeOrders
from tandem.fleet.nursery import NurseryProcess
from tandem.fleet.ray_guest import gateway_resource
from tandem.fleet.ray_processes import RANK_RESOURCE, NodePlace, group_resource
from tandem.gateway.stop_socket import (
    LINGER_VARIABLE,
    NODE_FOLDER_VARIABLE,
    SERVE_PATIENCE_S,
    STOP_SOCKET,
    ask_stop,
)
from tandem.models.tiny import TinyError, ensure_tiny

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class JoinSettings:
    """What the node is told. Times in seconds."""

    host: str
    """Its address."""
    gcs: str
    """"name:port" of the fleet's head; dialled by name, so that a head at another address is found."""
    ray_namespace: str = ""
    """Of the fleet, where `gcs` is a Ray cluster that is not its own; empty = it is."""
    group: str = ""
    """The group whose ranks it is for; empty = it is a gateway's."""
    gpus: int = 0
    """On a cuda fleet, how many it offers."""
    name: str = ""
    """What Ray calls it."""
    run: Path = RUN_FOLDER
    probe_host: str = ""
    """Empty = all addresses."""
    probe_port: int = 8090
    linger: float = 3.0
    """A gateway takes requests for so long after it was told to end: whoever sends them learns of it late."""
    drain: float = 25.0
    """Then its requests may take so long."""


class Joined:
    """The node's parts: a raylet, and on cpu the nursery of its engine."""

    def __init__(self, settings: JoinSettings) -> None:
        self._settings = settings
        self._folder = make_folder(settings.run, settings.host)
        self._missing = "it has just been started"
        self._nursery: NurseryProcess | None = None
        # Its processes look for them there.
        os.environ[NODE_FOLDER_VARIABLE], os.environ[LINGER_VARIABLE] = str(self._folder), str(settings.linger)
        place = NodePlace(host=settings.host)
        self._node = JoinedNode(
            self._folder / "r",
            place,
            settings.gcs,
            name=settings.name or settings.host,
            told=self._tell,
            fleet=settings.ray_namespace,
        )

    def own(self) -> Collection[int]:
        """PIDs of the children that somebody waits for."""
        nursery = [self._nursery.process.pid] if self._nursery else []
        return [*self._node.pids, *nursery]

    async def run(self, stop: asyncio.Event) -> None:
        """Be a node until `stop`. Raises HostError."""
        settings = self._settings
        probe = Probe(lambda: self._missing)
        try:
            await probe.open(settings.probe_host, settings.probe_port)
        except OSError as error:
            raise HostError(f"cannot listen on port {settings.probe_port}: {error}; choose another --probe") from error
        work = asyncio.create_task(self._work(), name="node")
        stopped = asyncio.create_task(stop.wait(), name="stop")
        try:
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done() and not settings.group:
                await self._drain()
        finally:
            stopped.cancel()
            work.cancel()
            await asyncio.gather(work, stopped, return_exceptions=True)
            await self._node.leave()
            if self._nursery is not None:
                await self._nursery.stop()
            await probe.close()
        if not work.cancelled() and (error_ := work.exception()) is not None:
            raise error_

    async def _work(self) -> None:
        orders = await self._node.orders()
        if orders.tiny:
            await self._make_tiny(Path(orders.tiny))
        resources = self._resources(orders)
        async with asyncio.TaskGroup() as tasks:
            if self._settings.group and orders.nursery:
                self._nursery = await self._start_nursery()
                tasks.create_task(self._nursery.keep(), name="nursery")
            tasks.create_task(LogCopier(self._folder / "logs").follow(), name="logs")
            tasks.create_task(self._node.keep(resources), name="raylet")

    def _resources(self, orders: NodeOrders) -> dict[str, float]:
        settings = self._settings
        if not settings.group:
            return {"CPU": 0.0, gateway_resource(settings.ray_namespace): 1.0}
        own = {RANK_RESOURCE: 1.0, group_resource(settings.group): 1.0}
        if orders.device == "cpu":
            return {"CPU": 0.0, **own}
        if settings.gpus < 1:
            raise HostError("the fleet is on cuda, and this node has no GPUs: say how many by --gpus (TANDEM_GPUS)")
        return {"CPU": 1.0, "GPU": float(settings.gpus), **own}

    async def _make_tiny(self, folder: Path) -> None:
        try:
            await asyncio.to_thread(ensure_tiny, folder)
        except (OSError, TinyError) as error:
            raise HostError(f"the tiny model cannot be made in {folder}: {error}") from error

    async def _start_nursery(self) -> NurseryProcess:
        return await NurseryProcess.start(self._folder, self._folder / "logs" / "nursery.log")

    async def _drain(self) -> None:
        """Let the gateway of this node finish what it has."""
        self._tell("it has been told to end")
        settings = self._settings
        # Serve begins to stop a replica so long before its node's end: that is to be later than what is done here.
        await self._node.drain(settings.linger + settings.drain + SERVE_PATIENCE_S)
        log.info("%s", await ask_stop(self._folder / STOP_SOCKET, settings.drain, settings.linger))

    def _tell(self, why: str) -> None:
        self._missing = why
