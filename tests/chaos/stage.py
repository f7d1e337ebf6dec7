"""A running fleet with everything around it: Redis, the side gateway, disks that can be filled, machines."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec

from chaos.side_gateway import SideGateway, fake_time
from chaos.watch import FleetWatch
from support.fleet import Fleet, ephemeral
from support.namespaces import address, machines, name
from support.redis_server import RedisServer
from tandem.config import ControlConfig, FleetConfig, GatewayConfig, MeteringConfig, PoolConfig, RayConfig, StateConfig
from tandem.core.types import GroupSpec, GroupState, Role
from tandem.fleet.cluster import LocalCluster
from tandem.fleet.control_client import ControlClient
from tandem.fleet.ray_processes import NodePlace
from tandem.fleet.run_folder import RunFolder, make_scratch
from tandem.fleet.snapshot import DESIRED
from tandem.models.tiny import ensure_tiny
from tandem.state import open_store

log = logging.getLogger(__name__)

WHOLE_S = 150.0
_TIMEOUTS = {"first_token_timeout_s": 15, "stall_timeout_s": 10, "request_timeout_s": 120}
"""Shorter than the defaults, so that what hangs is given up while the test waits for it."""


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What fleet a scenario wants. Groups that `further` adds have another number of ranks than their pool."""

    name: str
    groups: int = 1
    nodes: int = 2
    further: tuple[GroupSpec, ...] = ()
    replicas: int = 2
    redis: bool = False
    side: bool = True
    apart: bool = False
    """Each rank on a machine of its own (network namespaces; needs root). Then there is no side gateway."""


class Stage:
    """What runs, for faults and checks to take hold of."""

    def __init__(self, shape: Shape, fleet: Fleet, watch: FleetWatch, folder: Path, model: Path) -> None:
        self.shape = shape
        self.fleet = fleet
        self.watch = watch
        self.folder = folder
        self.model = model
        self.redis: RedisServer | None = None
        self.side: SideGateway | None = None
        self.disks: dict[str, Path] = {}
        """Small disks by what is on them: "logs", "usage"."""
        self._hits: dict[str, float] = {}
        self._last: dict[str, float] = {}

    @contextlib.contextmanager
    def hitting(self, group: str) -> Iterator[None]:
        """Note that a fault takes a group, for the length of a `with` block: it may restart of right."""
        self._hits[group] = math.inf
        try:
            yield
        finally:
            self._hits[group] = time.monotonic()

    def hit_since(self, group: str, at: float) -> bool:
        """Whether a fault has taken a group after `at`, on the monotonic clock, or did so then."""
        return self._hits.get(group, -math.inf) > at

    async def pause_after(self, what: str, seconds: float) -> None:
        """Return once `seconds` have passed since this last returned for `what`."""
        left = self._last.get(what, -math.inf) + seconds - time.monotonic()
        await asyncio.sleep(max(0.0, left))
        self._last[what] = time.monotonic()

    @property
    def ready_urls(self) -> dict[str, str]:
        """URLs of the groups that are ready, by name."""
        return {name: group.url for name, group in self.watch.groups.items() if group.state is GroupState.READY}

    @property
    def bases(self) -> dict[bool, str]:
        """URLs that clients use; True = the side gateway's."""
        return {False: self.fleet.base} | ({True: self.side.url} if self.side is not None else {})

    @property
    def usage_folders(self) -> list[Path]:
        return [self.fleet.folder.path / "usage"] + ([self.side.usage] if self.side is not None else [])

    @property
    def has_clock(self) -> bool:
        """Whether the side gateway's clock can be moved."""
        return self.side is not None and fake_time() is not None

    @property
    def drain_s(self) -> float:
        """How long a scale-down may take to empty a group."""
        return self.fleet.config.timeouts.drain_s

    def control(self) -> ControlClient:
        return ControlClient(self.watch.control, deadline=20)

    async def whole(self, within: float = WHOLE_S) -> None:
        """Wait until every wanted group is ready and every replica listens."""
        replicas = self.shape.replicas
        await self.watch.until(
            "the fleet is whole", lambda: self.watch.ready() and len(self.watch.gateways) >= replicas, within
        )


@contextlib.contextmanager
def home() -> Iterator[Path]:
    """A folder for the files of all fleets, instead of the user's own."""
    folder = Path(tempfile.mkdtemp(prefix="tandem-chaos-"))
    before = os.environ.get("TANDEM_HOME")
    os.environ["TANDEM_HOME"] = str(folder)
    try:
        yield folder
    finally:
        os.environ.pop("TANDEM_HOME")
        if before is not None:
            os.environ["TANDEM_HOME"] = before
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.asynccontextmanager
async def staged(shape: Shape, folder: Path) -> AsyncIterator[Stage]:
    """Start what `shape` asks for; stop it in the opposite order. `folder` is `TANDEM_HOME`."""
    model = folder / "tiny"
    await asyncio.to_thread(ensure_tiny, model)
    async with contextlib.AsyncExitStack() as stack:
        config = ephemeral(shape.name, model)
        redis = None
        if shape.redis:
            redis = RedisServer()
            redis.start()
            stack.callback(redis.remove)
            config = config.model_copy(update={"state": StateConfig(url=redis.url)})
        config, cluster = _shaped(config, shape, stack)
        disks = {what: stack.enter_context(small_disk(path)) for what, path in _disks(shape, folder).items()}
        if cluster is not None:
            # Raylets that end are replaced, as on a real cluster: one whose GCS was cut off is declared dead, and ends.
            stack.callback(asyncio.create_task(_tend(cluster), name="tend").cancel)
        fleet = await asyncio.to_thread(Fleet, config)
        stack.push_async_callback(asyncio.to_thread, fleet.stop)
        store = await open_store(config.state.url, fleet=config.name, folder=fleet.folder.store)
        stack.push_async_callback(store.close)
        watch = FleetWatch(store)
        following = asyncio.create_task(watch.follow(), name="watch")
        stack.callback(following.cancel)
        stage = Stage(shape, fleet, watch, folder, model)
        stage.redis, stage.disks = redis, disks
        await _add_groups(stage)
        await stage.whole()
        if shape.side:
            stage.side = SideGateway(config, model, folder / "side")
            stack.push_async_callback(stage.side.close)
            await stage.side.start(store)
        yield stage


def _shaped(
    config: FleetConfig, shape: Shape, stack: contextlib.AsyncExitStack
) -> tuple[FleetConfig, LocalCluster | None]:
    """The fleet's configuration, and the machines' cluster where each rank has a machine of its own."""
    pool = PoolConfig(groups=shape.groups, nodes=shape.nodes)
    update = {"prefill": pool, "decode": pool, "metering": MeteringConfig(sink="file")}
    # Replicas share one port, as they do in production: with port 0 each would have its own.
    gateway = {"port": _free_port(), "grpc_port": 0, "replicas": shape.replicas, **_TIMEOUTS}
    if not shape.apart:
        return config.model_copy(update={**update, "gateway": GatewayConfig.model_validate(gateway)}), None
    addresses = stack.enter_context(machines(2 * shape.groups * shape.nodes))
    places = [
        NodePlace(host=host, prefix=("ip", "netns", "exec", name(number))) for number, host in enumerate(addresses, 1)
    ]
    scratch = make_scratch()
    stack.callback(shutil.rmtree, scratch)
    cluster = LocalCluster.start(scratch, places)
    stack.callback(cluster.stop)
    return config.model_copy(
        update={
            **update,
            "gateway": GatewayConfig.model_validate({**gateway, "host": address(1), "auth": "off"}),
            "control": ControlConfig(host=address(1), port=0),
            "ray": RayConfig(address=cluster.address),
        }
    ), cluster


async def _tend(cluster: LocalCluster) -> None:
    log.error("the machines' cluster cannot go on: %s", await cluster.tend())


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def _disks(shape: Shape, folder: Path) -> dict[str, Path]:
    """Where small disks are to be; needs root."""
    side = folder / "side"
    side.mkdir(exist_ok=True)
    if os.geteuid() != 0:
        return {}
    logs = RunFolder(shape.name)
    logs.make()
    return {"logs": logs.logs} | ({"usage": side / "usage"} if shape.side else {})


@contextlib.contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    """A disk of 64 MiB at `path`. Needs root."""
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(path)], check=True, timeout=10)
    try:
        yield path
    finally:
        # Lazily: whoever still has a file open there keeps it until he ends.
        subprocess.run(["umount", "--lazy", str(path)], check=True, timeout=10)


async def _add_groups(stage: Stage) -> None:
    if not stage.shape.further:
        return
    for spec in stage.shape.further:
        await stage.watch.store.put(f"{DESIRED}{spec.group}", msgspec.json.encode(spec))
    wanted = {spec.group for spec in stage.shape.further}
    await stage.watch.until("the further groups are wanted", lambda: wanted <= stage.watch.desired.keys(), 20)


def spare(role: Role, nodes: int) -> GroupSpec:
    """A second group of a role."""
    return GroupSpec(group=f"{role}-1", role=role, nodes=nodes)
