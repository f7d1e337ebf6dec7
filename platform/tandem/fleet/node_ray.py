"""A node that joins a fleet's Ray cluster: one raylet, which comes back whenever it ends.

It waits for the head as long as that takes. A head that is away for a while, or comes back at another address, is found
again under its name by the raylet itself; a raylet that has given up, or was given up, is followed by another one.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from tandem.engine import guard
from tandem.fleet.ray_children import RayProcess, end, held, kill
from tandem.fleet.ray_guest import guest_command, has_raylet
from tandem.fleet.ray_processes import ClusterError, NodePlace, Session, raylet_command

log = logging.getLogger(__name__)

ORDERS_NAMESPACE, ORDERS_KEY = b"tandem", b"node"
"""Where the GCS holds the orders."""

_PREEMPTION = 2
"""DRAIN_NODE_REASON_PREEMPTION in Ray's autoscaler.proto: the node takes nothing new, and ends by a deadline."""
_LOOK_S = 0.1
_GUEST_LOOK_S = 2.0
"""`ray start` goes on without a raylet that ended in order, so we look for it ourselves."""
_CONNECT_S = 5.0
_AGAIN_S = 1.0
_SAY_S = 30.0
_REGISTER_S = 60.0


class NodeOrders(msgspec.Struct, frozen=True, kw_only=True):
    """What the head tells every node that joins."""

    device: str
    """"cpu" or "cuda"."""
    nursery: bool = False
    """Whether engines are forked from a process that has imported them once."""
    tiny: str = ""
    """Folder in which the node makes the tiny model; empty = the model is there already."""


def give_orders(client: Any, orders: NodeOrders, fleet: str = "") -> None:
    """Leave the orders where nodes find them. `client`: Ray's GcsClient. `fleet`: as of JoinedNode."""
    client.internal_kv_put(_orders_key(fleet), msgspec.json.encode(orders), True, ORDERS_NAMESPACE)


def _orders_key(fleet: str) -> bytes:
    return ORDERS_KEY + b"/" + fleet.encode() if fleet else ORDERS_KEY


class JoinedNode:
    """This machine as a node of the cluster whose GCS is at `gcs`."""

    def __init__(
        self, folder: Path, place: NodePlace, gcs: str, *, name: str, told: Callable[[str], None], fleet: str = ""
    ) -> None:
        """`folder`: for Ray's session, of a short path; emptied first. `name`: what Ray calls the node. `told` hears in
        one sentence why the node is not there; empty = it is. `fleet`: Ray namespace of the fleet, where the cluster is
        not its own; empty = it is."""
        shutil.rmtree(folder / "ray", ignore_errors=True)
        self._folder = folder
        self._fleet = fleet
        self._session = Session(folder)
        self._session.make()
        self._place = place
        self._gcs = gcs
        self._name = name
        self._told = told
        self._starts = 0
        self._raylet: RayProcess | None = None
        self.node = ""
        """Id of the node (hex); empty = it is none now."""

    @property
    def pids(self) -> list[int]:
        """PID of the raylet, if it is there."""
        return [self._raylet.pid] if self._raylet is not None else []

    async def orders(self) -> NodeOrders:
        """Wait for the head, then return what it says."""
        while True:
            await self._reach()
            try:
                return await asyncio.to_thread(self._ask_orders)
            except ClusterError as error:
                self._say(str(error))
            await asyncio.sleep(_AGAIN_S)

    async def keep(self, resources: Mapping[str, float]) -> None:
        """Be a node for ever. Await it in the main thread, with which Ray's processes die."""
        while True:
            await self.join(resources)
            self._say(f"{await self.lost()}; another one is started")
            await self.leave()
            await asyncio.sleep(_AGAIN_S)

    async def join(self, resources: Mapping[str, float]) -> None:
        """Become a node, as long as that takes. Await it in the main thread."""
        while True:
            await self._reach()
            try:
                await self._join(resources)
                return
            except ClusterError as error:
                self._say(str(error))
                await self.leave()
                await asyncio.sleep(_AGAIN_S)

    async def lost(self) -> str:
        """Wait until this machine, which has joined, is no node any more; return how that came about."""
        raylet = self._raylet
        assert raylet is not None
        ended = asyncio.wrap_future(raylet.ended)
        while self._fleet and not ended.done():
            await asyncio.wait({ended}, timeout=_GUEST_LOOK_S)
            if not ended.done() and not has_raylet(raylet.pid):
                return f"the raylet of `ray start` (PID {raylet.pid}) ended; its logs are in {raylet.log}"
        await ended
        return raylet.epitaph()

    def tell_nodes(self, tell: Callable[[Any], None]) -> None:
        """Give `tell` Ray's GcsClient, to leave something there that every node can read. Raises ClusterError."""
        client, _ = self._connect()
        tell(client)

    async def leave(self) -> None:
        """End the raylet and all that it started."""
        self.node = ""
        if (raylet := self._raylet) is None:
            return

        def stop() -> None:
            with held(guard.descendants(raylet.pid) if not raylet.ended.done() else ()) as below:
                end([raylet])
                kill(below)

        await asyncio.to_thread(stop)
        self._raylet = None

    async def drain(self, within: float) -> bool:
        """Ask Ray to place nothing more here; return whether it agreed."""
        if not self.node:
            return False
        try:
            async with asyncio.timeout(_CONNECT_S):
                return await asyncio.to_thread(self._ask_drain, self.node, within)
        except TimeoutError:
            log.warning("Ray cannot be told that this node ends: no answer within %.0f s", _CONNECT_S)
            return False

    # -- inside

    async def _reach(self) -> None:
        """Wait until the GCS takes connections."""
        host, _, port = self._gcs.rpartition(":")
        waited, said = 0.0, -_SAY_S
        while True:
            began = time.monotonic()
            try:
                async with asyncio.timeout(_CONNECT_S):
                    _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
                writer.close()
                return
            except (OSError, TimeoutError) as error:
                why = str(error) or "no answer"
            if waited - said >= _SAY_S:
                said = waited
                self._say(f"waits for the fleet's head at {self._gcs}: {why}")
            await asyncio.sleep(_AGAIN_S)
            waited += time.monotonic() - began

    def _say(self, why: str) -> None:
        log.warning("%s", why)
        self._told(why)

    async def _join(self, resources: Mapping[str, float]) -> None:
        client, cluster = await asyncio.to_thread(self._connect)
        self._starts += 1
        node, name = secrets.token_hex(28), self._name
        if self._fleet:  # `ray start` draws the id itself: there the node is found by a name that no other has
            name = f"{self._name}-{node[:8]}"
            command = guest_command(
                self._place, gcs=self._gcs, name=name, folder=self._folder / "ray", resources=resources
            )
        else:
            command = raylet_command(
                self._session,
                self._place,
                number=self._starts,
                node=node,
                gcs=self._gcs,
                cluster=cluster,
                resources=resources,
                name=name,
            )
        # Here, not in a thread: the raylet dies with the thread that started it.
        self._raylet = RayProcess(f"raylet_{self._starts}", self._place, command, self._session)
        known = (lambda _, info: info.node_name == name) if self._fleet else (lambda found, _: found == node)
        self.node = await asyncio.to_thread(self._wait_registered, client, known, self._raylet)
        log.info("joined the fleet at %s as node %s (PID %d)", self._gcs, self.node, self._raylet.pid)
        self._told("")

    def _connect(self) -> tuple[Any, str]:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]

        try:
            client = GcsClient(address=self._gcs)
            return client, client.cluster_id.hex()
        except Exception as error:  # Ray has many kinds, some its own, some not
            raise ClusterError(f"the GCS at {self._gcs} does not answer: {error}") from error

    def _wait_registered(self, client: Any, known: Callable[[str, Any], bool], raylet: RayProcess) -> str:
        """Wait until Ray has the node that is `known` by its id (hex) and what Ray says of it; return its id."""
        ends = time.monotonic() + _REGISTER_S
        while time.monotonic() < ends:
            if raylet.ended.done():
                raise ClusterError(raylet.epitaph())
            try:
                infos = client.get_all_node_info(timeout=_CONNECT_S)
            except Exception as error:
                raise ClusterError(f"the GCS at {self._gcs} does not answer: {error}") from error
            for node, info in infos.items():
                if info.state == 0 and known(node.hex(), info):
                    return str(node.hex())
            time.sleep(_LOOK_S)
        raise ClusterError(f"Ray did not take this node within {_REGISTER_S:.0f} s; the logs are in {raylet.log}")

    def _ask_orders(self) -> NodeOrders:
        client, _ = self._connect()
        try:
            value = client.internal_kv_get(_orders_key(self._fleet), ORDERS_NAMESPACE, timeout=_CONNECT_S)
        except Exception as error:
            raise ClusterError(f"the GCS at {self._gcs} does not answer: {error}") from error
        if value is None:
            raise ClusterError(f"waits for orders from the fleet's head at {self._gcs}")
        try:
            return msgspec.json.decode(value, type=NodeOrders)
        except msgspec.DecodeError as error:
            raise ClusterError(f"the head at {self._gcs} is of another version of Tandem: {error}") from error

    def _ask_drain(self, node: str, within: float) -> bool:
        try:
            client, _ = self._connect()
            deadline_ms = int((time.time() + within) * 1000)
            accepted, why = client.drain_node(node, _PREEMPTION, "its pod ends", deadline_ms)
        except Exception as error:  # noqa: BLE001 - without the head there is nobody to tell
            log.warning("Ray cannot be told that this node ends: %s", error)
            return False
        if not accepted:
            log.warning("Ray does not let this node end: %s", why)
        return bool(accepted)
