"""A Ray cluster of several logical nodes on one machine, made for a fleet: quick, small, and gone without a trace.

The processes belong to whoever starts them: they die when that process dies, also by SIGKILL, and Ray's workers die
with their raylet.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tandem.engine import guard
from tandem.fleet.ray_children import RayProcess, end, held, kill
from tandem.fleet.ray_processes import (
    GCS_PORT_FILE,
    HEAD_RESOURCE,
    RANK_RESOURCE,
    RAY_VERSION,
    ClusterError,
    GcsSettings,
    NodePlace,
    Session,
    gcs_command,
    raylet_command,
)

log = logging.getLogger(__name__)

__all__ = ["ClusterError", "LocalCluster", "NodePlace", "connect", "disconnect", "nodes_for"]

_LOOK_S = 0.01
"""Ray tells that a process is up by a file, or by an answer; this is how often we look."""
_REPLACE_S = 0.5
_GCS_STARTS = 3
"""A GCS that dies so often within a minute will not live."""
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(eq=False)
class LocalCluster:
    """A running cluster. Make it with `start`; look after it with `tend`; end it with `stop`."""

    address: str
    """Of the GCS, "host:port"; `connect` takes it."""
    session: Session
    _cluster_id: str
    _gcs: RayProcess
    _client: Any
    _settings: GcsSettings
    _nodes: dict[str, tuple[NodePlace, RayProcess]] = field(default_factory=dict)
    _grown: asyncio.Event = field(default_factory=asyncio.Event)
    """There are nodes that `tend` does not know yet."""
    _started: int = 0

    @classmethod
    def start(
        cls,
        folder: Path,
        nodes: int | Sequence[NodePlace],
        *,
        gcs: GcsSettings = GcsSettings(),  # noqa: B008 - it is frozen
        deadline: float = 30.0,
    ) -> LocalCluster:
        """Start GCS and raylets and wait until all nodes are there (0.6 s on an idle machine).

        Call it in the main thread: Ray's processes die with the thread that started them.

        Args:
            folder: for Ray's session, of a short path; it may exist.
            nodes: how many, or where each lives. The first is the head; each has room for one rank, unless it says so.
            gcs: its port, and where it keeps what it knows.
            deadline: in seconds.

        Raises:
            ClusterError: it did not come up; nothing is left.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ClusterError("a local cluster must be started by the main thread, with which it dies")
        places = [NodePlace()] * nodes if isinstance(nodes, int) else list(nodes)
        if not places:
            raise ClusterError("a cluster needs at least one node")
        ends = time.monotonic() + deadline
        shutil.rmtree(folder / "ray", ignore_errors=True)
        session = Session(folder)
        session.make()
        server = RayProcess("gcs_server", places[0], gcs_command(session, places[0], gcs), session)
        try:
            # Ray's own import takes half a second: let the GCS start meanwhile.
            from ray._common.usage import usage_lib
            from ray._raylet import GcsClient  # type: ignore[attr-defined]

            address = f"{places[0].host}:{_wait_for_port(session, server, ends)}"
            client = GcsClient(address=address)
            # What `ray.init` asks of any cluster.
            client.internal_kv_put(b"session_name", session.name.encode(), True, b"session")
            usage_lib.put_cluster_metadata(client, ray_init_cluster=False)
            cluster = cls(address, session, client.cluster_id.hex(), server, client, gcs)
        except BaseException:
            end([server])
            shutil.rmtree(session.folder, ignore_errors=True)
            raise
        try:
            for place in places:
                cluster._add(place, session.head if not cluster._nodes else secrets.token_hex(28))
            cluster._wait_for_nodes(ends)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    @property
    def pids(self) -> list[int]:
        """PIDs of Ray's own processes, the GCS first."""
        return [self._gcs.pid, *(process.pid for _, process in self._nodes.values())]

    @property
    def nodes(self) -> dict[str, int]:
        """PIDs of the raylets by node id (hex), the head first."""
        return {node: process.pid for node, (_, process) in self._nodes.items()}

    def tell_nodes(self, tell: Callable[[Any], None]) -> None:
        """Give `tell` Ray's GcsClient, to leave something there that every node can read."""
        tell(self._client)

    def grow(self, nodes: int) -> None:
        """Add nodes, of the head's kind and place, until there are `nodes`. Call it in the main thread, where `tend` is
        awaited in its event loop."""
        head, _ = self._nodes[self.session.head]
        while len(self._nodes) < nodes:
            self._add(head, secrets.token_hex(28))
            self._grown.set()

    async def tend(self) -> str:
        """Replace what dies; return one sentence when the cluster cannot go on. Await it in the main thread.

        A new GCS goes on where the old one was: nodes, workers and actors live on, and find it at the same address.
        """
        deaths: deque[float] = deque(maxlen=_GCS_STARTS)
        while True:
            self._grown.clear()
            await self._death_or_growth()
            if self._gcs.ended.done():
                deaths.append(time.monotonic())
                if len(deaths) == _GCS_STARTS and deaths[-1] - deaths[0] < 60:
                    return f"{self._gcs.epitaph()}, for the {_GCS_STARTS}rd time within a minute"
                log.warning("%s; another one goes on", self._gcs.epitaph())
                await asyncio.sleep(_REPLACE_S)
                self._start_gcs()
            for node, (place, process) in list(self._nodes.items()):
                if process.ended.done() and not self._gcs.ended.done():
                    if node == self.session.head:
                        return f"{process.epitaph()}, and it was the head"
                    await asyncio.sleep(_REPLACE_S)  # one that cannot live must not keep the machine busy
                    del self._nodes[node]  # only now: `grow` would add one for it
                    self._add(place, secrets.token_hex(28))

    async def _death_or_growth(self) -> None:
        """Wait until a process has ended, or there is another one to wait for."""
        watched = [self._gcs, *(process for _, process in self._nodes.values())]
        grown = asyncio.ensure_future(self._grown.wait())
        try:
            news: list[asyncio.Future[Any]] = [grown, *(asyncio.wrap_future(process.ended) for process in watched)]
            await asyncio.wait(news, return_when=asyncio.FIRST_COMPLETED)
        finally:
            grown.cancel()

    def stop(self) -> None:
        """End every process of the cluster, workers included, and remove its folder. Harmless when repeated."""
        raylets = [process for _, process in self._nodes.values()]
        with held(
            pid for raylet in raylets if not raylet.ended.done() for pid in guard.descendants(raylet.pid)
        ) as below:
            # A raylet that has lost its GCS waits a minute for it: so the GCS goes last, or nothing is asked politely.
            if self._gcs.ended.done():
                end(raylets, grace=0.0)
            else:
                end(raylets)
            end([self._gcs])
            kill(below)
        self._nodes.clear()
        shutil.rmtree(self.session.folder, ignore_errors=True)
        (self.session.temp / "session_latest").unlink(missing_ok=True)  # drivers and workers make it

    def _start_gcs(self) -> None:
        place, _ = self._nodes[self.session.head]
        settings = replace(self._settings, port=int(self.address.rpartition(":")[2]))
        command = gcs_command(self.session, place, settings)
        self._gcs = RayProcess("gcs_server", place, command, self.session)

    def _add(self, place: NodePlace, node: str) -> None:
        number = self._started
        self._started += 1
        head = node == self.session.head
        # A CPU count, for actors that ask for none: elsewhere only ranks are placed.
        resources: dict[str, float] = {"CPU": float(os.cpu_count() or 1) if head else 0.0}
        resources |= {RANK_RESOURCE: 1.0} if place.offers is None else place.offers
        if head:
            resources[HEAD_RESOURCE] = 1.0
        if place.gpus:
            resources["GPU"] = float(len(place.gpus))
        command = raylet_command(
            self.session,
            place,
            number=number,
            node=node,
            gcs=self.address,
            cluster=self._cluster_id,
            resources=resources,
        )
        self._nodes[node] = (place, RayProcess(f"raylet_{number}", place, command, self.session))

    def _wait_for_nodes(self, ends: float) -> None:
        while True:
            infos = self._client.get_all_node_info(timeout=max(0.1, ends - time.monotonic()))
            up = {node.hex() for node, info in infos.items() if info.state == 0}
            if up >= self._nodes.keys():
                return
            for _, process in self._nodes.values():
                if process.ended.done():
                    raise ClusterError(process.epitaph())
            _look_again(ends, f"{len(self._nodes) - len(up)} of Ray's {len(self._nodes)} nodes", self.session)


def connect(address: str, *, namespace: str, host: str | None = None) -> None:
    """Make this process a driver of the cluster at `address`. Raises ClusterError.

    Args:
        address: "host:port" of the GCS, or whatever else `ray.init` takes.
        namespace: where the fleet's actors have their names.
        host: address of the node to be on; None = one that is on this machine.
    """
    import ray
    from ray._private import ray_constants

    if address.rpartition(":")[0] in _LOOPBACK:
        # Ray would replace a loopback address by the machine's own, where a cluster on loopback does not listen.
        ray_constants.ENABLE_RAY_CLUSTER = False
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _node_ip_address=host,
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        raise ClusterError(
            f"cannot reach the Ray cluster at {address}: {error}. Does it run Ray {RAY_VERSION}?"
        ) from error
    finally:
        # Ray takes SIGTERM over, to exit at once.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def disconnect() -> None:
    """Undo `connect`."""
    import ray

    ray.shutdown()


def nodes_for(groups: Mapping[str, int]) -> int:
    """Logical nodes that a laptop needs for groups of so many ranks each: one for every rank."""
    return max(1, sum(groups.values()))


def _wait_for_port(session: Session, gcs: RayProcess, ends: float) -> int:
    path = session.folder / GCS_PORT_FILE.format(node=session.head)
    while True:
        with contextlib.suppress(FileNotFoundError):
            if (text := path.read_text().strip()).isdecimal():
                return int(text)
        if gcs.ended.done():
            raise ClusterError(gcs.epitaph())
        _look_again(ends, "Ray's GCS", session)


def _look_again(ends: float, missing: str, session: Session) -> None:
    if time.monotonic() >= ends:
        raise ClusterError(f"{missing} did not come up in time; the logs are in {session.logs}")
    time.sleep(_LOOK_S)
