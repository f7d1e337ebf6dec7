"""The Ray cluster that a head works in: one of its own, or another's that it joins as a node (`ray.address`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

from tandem.config import FleetConfig
from tandem.fleet.cluster import LocalCluster, connect, disconnect
from tandem.fleet.node_ray import JoinedNode, NodeOrders, give_orders
from tandem.fleet.ray_guest import gateway_resource, head_resource
from tandem.fleet.ray_processes import GcsSettings, NodePlace

log = logging.getLogger(__name__)

_PATIENCE_S = 1800.0
"""A head may be away for so long, while its pod and its volume are moved, before nodes give up and start anew."""

_END_S = 5.0
"""For Ray to end the controller with its head."""


def scope_of(config: FleetConfig) -> str:
    """Ray namespace by which the fleet is told apart in a cluster that is not its own; empty = it has its own."""
    return namespace_of(config) if config.ray.address is not None else ""


def namespace_of(config: FleetConfig) -> str:
    """Ray namespace of the fleet's actors."""
    return config.ray.namespace or f"tandem-{config.name}"


def gateway_place(config: FleetConfig) -> dict[str, float] | None:
    """What the nodes offer that gateways are placed on; None = any node will do."""
    belongs = config.ray.group_resources or config.ray.address is not None
    return {gateway_resource(scope_of(config)): 1.0} if belongs else None


class HeadCluster(Protocol):
    """What a head needs of its cluster."""

    @property
    def pids(self) -> list[int]:
        """PIDs of the children that somebody waits for."""

    async def tend(self) -> str:
        """Keep it; return one sentence when it cannot go on. Await it in the main thread."""


class _Joined:
    def __init__(self, node: JoinedNode) -> None:
        self._node = node

    @property
    def pids(self) -> list[int]:
        return self._node.pids

    async def tend(self) -> str:
        # What this process has of Ray went with it: begin anew.
        return await self._node.lost()


@asynccontextmanager
async def own_cluster(
    config: FleetConfig,
    orders: NodeOrders,
    *,
    folder: Path,
    host: str,
    port: int,
    memory: Path,
    began: Callable[[HeadCluster], None],
) -> AsyncIterator[HeadCluster]:
    """Start a cluster, whose nodes join it, and connect to it. Raises ClusterError.

    `memory`: folder of what the GCS knows. `began` hears of the cluster as soon as it is there. In the end only this
    node goes: ranks and gateways live on elsewhere.
    """
    gcs = GcsSettings(port=port, memory=memory, patience=_PATIENCE_S)
    # No rank is placed here, and no gateway.
    cluster = LocalCluster.start(folder, [NodePlace(host=host, offers={})], gcs=gcs)
    began(cluster)
    log.info("Ray's GCS is at %s", cluster.address)
    try:
        cluster.tell_nodes(lambda client: give_orders(client, orders))
        connect(cluster.address, namespace=namespace_of(config), host=host)
        yield cluster
    finally:
        log.info("the head ends")
        disconnect()
        cluster.stop()


@asynccontextmanager
async def joined_cluster(
    config: FleetConfig,
    orders: NodeOrders,
    *,
    folder: Path,
    host: str,
    name: str,
    told: Callable[[str], None],
    began: Callable[[HeadCluster], None],
) -> AsyncIterator[HeadCluster]:
    """Join the cluster at `ray.address`, as long as that takes, and connect to it. Raises ClusterError.

    `told` hears what it waits for, and `began` what it is to be once it has joined. In the end the controller goes with
    this node; the next head starts another.
    """
    address, scope = config.ray.address, scope_of(config)
    assert address is not None
    node = JoinedNode(folder, NodePlace(host=host), address, name=name, told=told, fleet=scope)
    cluster = _Joined(node)
    began(cluster)
    try:
        await node.join({head_resource(scope): 1.0})
        await asyncio.to_thread(node.tell_nodes, lambda client: give_orders(client, orders, scope))
        connect(address, namespace=namespace_of(config), host=host)
        try:
            yield cluster
        finally:
            try:
                async with asyncio.timeout(_END_S):
                    await asyncio.to_thread(_end_controller)
            except TimeoutError:
                log.warning("Ray does not answer: the controller may stay there until the next head replaces it")
    finally:
        disconnect()
        await node.leave()


def _end_controller() -> None:
    """End our controller: without its node Ray would go on trying to place it, also when the fleet is no more."""
    import ray

    from tandem.fleet.controller import find_controller

    with contextlib.suppress(ray.exceptions.RayError, ConnectionError, RuntimeError):
        if (controller := find_controller()) is not None:
            ray.kill(controller, no_restart=True)
