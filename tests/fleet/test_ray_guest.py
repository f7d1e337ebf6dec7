"""A fleet in a Ray cluster that is somebody else's, as KubeRay starts one: `ray start`, with Ray's own settings."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest
from node_world import World, address, ask, control, until, world

from support.namespaces import needs_root
from support.redis_server import RedisServer
from tandem.config import ControlConfig, FleetConfig, GatewayConfig, ModelConfig, PoolConfig, RayConfig, StateConfig
from tandem.core.types import FleetSnapshot, Group, GroupSpec, GroupState, Role
from tandem.fleet.control_client import ControlClient
from tandem.fleet.ray_processes import RANK_RESOURCE
from tandem.models.tiny import ensure_tiny

pytestmark = [needs_root, pytest.mark.timeout(600)]

RAY, WORKER, HEAD, GATEWAY = 1, 2, 3, 4
WITHIN_S = 150.0
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "only-for-this-test"}
"""Without it nobody is let in: `ray start` asks for one unless it is told not to."""
RAY_START = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats")


class Stage:
    """Somebody's Ray cluster of two nodes, one with room for ranks, and a fleet that comes to it."""

    def __init__(self, made: World, redis: str) -> None:
        self.world = made
        model = made.folder / "tiny"
        ensure_tiny(model)
        none = PoolConfig(groups=0)
        self.config = FleetConfig(
            name="guest",
            model=ModelConfig(path=model),
            prefill=none,
            decode=none,
            gateway=GatewayConfig(host="0.0.0.0", auth="off"),
            control=ControlConfig(host="0.0.0.0"),
            state=StateConfig(url=redis),
            ray=RayConfig(address=f"{address(RAY)}:6379", namespace="tandem-ai.guest"),
        )
        self.file = made.folder / "fleet.json"
        self.file.write_text(self.config.model_dump_json())
        self.ray = self._ray(RAY, "--head", "--port=6379", "--include-dashboard=false", ranks=0)
        # As KubeRay's workers: Ray takes no node before its head is there.
        log = made.folder / f"ray-{RAY}.log"
        until(lambda: "Ray runtime started" in log.read_text(), WITHIN_S, what="Ray's head")
        self._ray(WORKER, f"--address={address(RAY)}:6379", ranks=1)
        place = {"TANDEM_GCS": f"{address(RAY)}:6379", "TANDEM_RAY_NAMESPACE": self.name}
        self.gateway = made.join(GATEWAY, "--gateway", **place, **TOKEN)
        self.start_head()

    def start_head(self) -> None:
        """The fleet's head; again after another has ended."""
        self.head = self.world.head(HEAD, self.file, **TOKEN)

    @property
    def name(self) -> str:
        """Ray namespace of the fleet."""
        assert self.config.ray.namespace is not None
        return self.config.ray.namespace

    def _ray(self, number: int, *flags: str, ranks: int) -> object:
        own = Path(self.world.folder) / f"ray-{number}"
        flags += (f"--temp-dir={own}", f"--plasma-directory={self.world.folder}", "--object-store-memory=80000000")
        resources = {RANK_RESOURCE: ranks} if ranks else {}
        place = (f"--node-ip-address={address(number)}", "--num-cpus=2", f"--resources={json.dumps(resources)}")
        quick = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # at the end of the tests
        return self.world.start(number, *RAY_START, *place, *flags, log=f"ray-{number}.log", **TOKEN, **quick)

    def asked(self, what: str) -> str:
        """What Ray itself says, asked on its head: `applications` of Serve, `actors` or `placements`, by name."""
        script = (sys.executable, str(Path(__file__).parent / "ask_ray.py"), f"{address(RAY)}:6379")
        done = self.world.start(RAY, *script, log="asked.log", **TOKEN)
        assert done.wait(60) == 0, (self.world.folder / "asked.log").read_text()
        found: dict[str, list[str]] = json.loads((self.world.folder / "asked.log").read_text().splitlines()[-1])
        return " ".join(found[what])


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    redis = RedisServer()
    redis.start()
    try:
        with world(4) as made:
            stage = Stage(made, redis.url)
            try:
                yield stage
            except BaseException:
                print((made.folder / "head.log").read_text())
                raise
    finally:
        redis.remove()


@pytest.fixture
async def fleet(stage: Stage) -> AsyncIterator[ControlClient]:
    """The control service, as soon as it answers."""
    async with control(f"{address(HEAD)}:9000", WITHIN_S) as client:
        yield client


async def seen(client: ControlClient, group: str, state: GroupState) -> Group:
    """The group as soon as it is so."""
    last: FleetSnapshot | None = None
    try:
        async with asyncio.timeout(WITHIN_S):
            async for last in client.watch():
                for one in last.groups:
                    if one.group == group and one.state is state:
                        return one
    except TimeoutError:
        raise AssertionError(f"{group} is not {state}; the fleet is {last}") from None
    raise AssertionError("the watch ended")


async def test_rays_own_nodes_get_the_ranks(fleet: ControlClient) -> None:
    await fleet.put_group(GroupSpec(group="decode-0", role=Role.DECODE, nodes=1))
    group = await seen(fleet, "decode-0", GroupState.READY)
    assert [rank.host for rank in group.ranks] == [address(WORKER)]


async def test_a_group_for_which_ray_has_no_node_says_so(fleet: ControlClient) -> None:
    await seen(fleet, "decode-0", GroupState.READY)
    await fleet.put_group(GroupSpec(group="decode-1", role=Role.DECODE, nodes=1))
    async with asyncio.timeout(WITHIN_S):
        async for snapshot in fleet.watch():
            told = [one.reason for one in snapshot.groups if one.group == "decode-1"]
            if told and told[0].startswith("waits for nodes: 1 with 1 tandem-rank"):
                break
    await fleet.remove("decode-1")


async def test_the_gateway_is_on_the_node_that_came_for_it(stage: Stage, fleet: ControlClient) -> None:
    url = f"http://{address(GATEWAY)}:8000"
    await asyncio.to_thread(until, lambda: ask(f"{url}/health")[0] == 200, WITHIN_S, what="the gateway")
    assert [one.url for one in (await fleet.fleet()).gateways] == [url]
    assert stage.asked("applications") == "tandem-gateway-tandem-ai.guest"


async def test_a_raylet_that_ends_in_order_is_followed_by_another(stage: Stage, fleet: ControlClient) -> None:
    (before,) = (await fleet.fleet()).gateways
    below = psutil.Process(stage.gateway.pid).children(recursive=True)
    next(one for one in below if one.name() == "raylet").terminate()
    async with asyncio.timeout(WITHIN_S):
        async for snapshot in fleet.watch():
            if [one.node != before.node for one in snapshot.gateways] == [True]:
                break
    url = f"http://{address(GATEWAY)}:8000/health"
    await asyncio.to_thread(until, lambda: ask(url)[0] == 200, WITHIN_S, what="a gateway on the new node")


async def test_groups_and_gateways_live_on_while_the_head_is_restarted(stage: Stage, fleet: ControlClient) -> None:
    before = await seen(fleet, "decode-0", GroupState.READY)
    gateways = (await fleet.fleet()).gateways
    stage.head.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(stage.head.wait, 60) == 0
    stage.start_head()
    await asyncio.to_thread(
        until, lambda: ask(f"http://{address(HEAD)}:8090/ready")[0] == 200, WITHIN_S, what="the head"
    )
    async with ControlClient(f"{address(HEAD)}:9000") as control:
        assert await seen(control, "decode-0", GroupState.READY) == before
        assert (await control.fleet()).gateways == gateways


async def test_a_head_without_groups_leaves_nothing_of_the_fleet_in_ray(stage: Stage, fleet: ControlClient) -> None:
    await fleet.remove("decode-0")
    async with asyncio.timeout(WITHIN_S):
        async for snapshot in fleet.watch():
            if not snapshot.groups and not snapshot.desired:
                break
    stage.head.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(stage.head.wait, 60) == 0
    assert [stage.asked(what) for what in ("applications", "actors", "placements")] == ["", "", ""]
