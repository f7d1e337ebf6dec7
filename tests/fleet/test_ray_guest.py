"""A fleet in a Ray cluster that is somebody else's, as KubeRay starts one: `ray start`, with Ray's own settings."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.request
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

RAY, WORKER, HEAD, GATEWAY, LATER = 1, 2, 3, 4, 5
MEMORY = f"{address(RAY)}:6390"
"""Redis, in which Ray's head keeps what it knows: on KubeRay, GCS fault tolerance."""
WITHIN_S = 150.0
SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "only-for-this-test",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
}
"""Without the token nobody is let in: `ray start` asks for one unless it is told not to. And all wait longer for a head
that is away than Ray's 60 s, as pods that the operator makes."""
STARTED = "Ray runtime started"
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
        host, port = MEMORY.split(":")
        made.start(
            RAY, "redis-server", "--bind", host, "--port", port, "--protected-mode", "no", "--save", "", log="memory"
        )
        self.start_ray()
        # As KubeRay's workers: Ray takes no node before its head is there.
        self.join_ray(WORKER)
        place = {"TANDEM_GCS": f"{address(RAY)}:6379", "TANDEM_RAY_NAMESPACE": self.name}
        self.gateway = made.join(GATEWAY, "--gateway", **place, **SETTINGS)
        self.start_head()

    def start_ray(self) -> None:
        """Ray's head; again after another has died. Returns when it is there."""
        log = self.world.folder / f"ray-{RAY}.log"
        times = log.read_text().count(STARTED) if log.exists() else 0
        self.ray = self._ray_head()

        def there() -> bool:
            if self.ray.poll() is not None:
                # Ray gives its agents 15 s to start. On a busy machine it may need another try, as a kubelet gives it.
                self.ray = self._ray_head()
            return log.read_text().count(STARTED) > times

        until(there, WITHIN_S, what="Ray's head")

    def _ray_head(self) -> subprocess.Popen[bytes]:
        return self._ray(RAY, "--head", "--port=6379", "--include-dashboard=false", ranks=0)

    def kill_ray(self) -> None:
        """All of Ray's head: the GCS, its raylet, whatever Ray has started there."""
        every = [psutil.Process(self.ray.pid), *psutil.Process(self.ray.pid).children(recursive=True)]
        self.ray.kill()
        assert not psutil.wait_procs(every, timeout=10)[1], "some of Ray's head lives on"

    def join_ray(self, number: int) -> None:
        """A worker of Ray's, with room for one rank."""
        self._ray(number, f"--address={address(RAY)}:6379", ranks=1)

    def start_head(self) -> None:
        """The fleet's head; again after another has ended."""
        self.head = self.world.head(HEAD, self.file, **SETTINGS)

    @property
    def name(self) -> str:
        """Ray namespace of the fleet."""
        assert self.config.ray.namespace is not None
        return self.config.ray.namespace

    def _ray(self, number: int, *flags: str, ranks: int) -> subprocess.Popen[bytes]:
        own = Path(self.world.folder) / f"ray-{number}"
        flags += (f"--temp-dir={own}", f"--plasma-directory={self.world.folder}", "--object-store-memory=80000000")
        resources = {RANK_RESOURCE: ranks} if ranks else {}
        place = (f"--node-ip-address={address(number)}", "--num-cpus=2", f"--resources={json.dumps(resources)}")
        quick = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # at the end of the tests
        known = {"RAY_REDIS_ADDRESS": MEMORY} if number == RAY else {}
        # `ray start --head` looks for other heads among all processes that it sees, by the flags of raylets.
        alone = number == RAY
        command = (*RAY_START, *place, *flags)
        return self.world.start(number, *command, log=f"ray-{number}.log", alone=alone, **SETTINGS, **quick, **known)

    def asked(self, what: str) -> str:
        """What Ray itself says, asked on its head: `applications` of Serve, `actors` or `placements`, by name."""
        script = (sys.executable, str(Path(__file__).parent / "ask_ray.py"), f"{address(RAY)}:6379")
        done = self.world.start(RAY, *script, log="asked.log", **SETTINGS)
        assert done.wait(60) == 0, (self.world.folder / "asked.log").read_text()
        found: dict[str, list[str]] = json.loads((self.world.folder / "asked.log").read_text().splitlines()[-1])
        return " ".join(found[what])


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    redis = RedisServer()
    redis.start()
    try:
        with world(5) as made:
            stage = Stage(made, redis.url)
            try:
                yield stage
            except BaseException:
                print((made.folder / "head.log").read_text())
                print((made.folder / f"ray-{RAY}.log").read_text())
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


def answers() -> bool:
    """Whether the gateway answers a request, by prefill and decode."""
    body = json.dumps({"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 4, "return_token_ids": True}).encode()
    url = f"http://{address(GATEWAY)}:8000/v1/completions"
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=WITHIN_S) as answer:
            return bool(json.load(answer)["choices"][0]["finish_reason"] == "length")
    except OSError:  # HTTPError is one, too
        return False


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


async def test_all_of_rays_head_dies_and_what_it_knew_is_in_redis(stage: Stage, fleet: ControlClient) -> None:
    stage.join_ray(LATER)
    await fleet.put_group(GroupSpec(group="prefill-0", role=Role.PREFILL, nodes=1))
    before = [await seen(fleet, name, GroupState.READY) for name in ("prefill-0", "decode-0")]
    gateways = (await fleet.fleet()).gateways
    await asyncio.to_thread(until, answers, WITHIN_S, what="an answer")

    await asyncio.to_thread(stage.kill_ray)
    assert answers(), "requests do not go on without Ray's head"
    await asyncio.to_thread(stage.start_ray)

    assert [await seen(fleet, one.group, GroupState.READY) for one in before] == before
    assert (await fleet.fleet()).gateways == gateways
    assert answers()
    # It knows the actors and the placements, and the controller goes on.
    decode = before[1]
    os.kill(decode.ranks[0].pid, signal.SIGKILL)
    async with asyncio.timeout(WITHIN_S):
        async for snapshot in fleet.watch():
            if any(
                (one.group, one.epoch, one.state) == ("decode-0", decode.epoch + 1, "ready") for one in snapshot.groups
            ):
                break
    assert await seen(fleet, "prefill-0", GroupState.READY) == before[0]
    await asyncio.to_thread(until, answers, WITHIN_S, what="an answer of the new epoch")


async def test_a_head_without_groups_leaves_nothing_of_the_fleet_in_ray(stage: Stage, fleet: ControlClient) -> None:
    for group in (await fleet.fleet()).groups:
        await fleet.remove(group.group)
    async with asyncio.timeout(WITHIN_S):
        async for snapshot in fleet.watch():
            if not snapshot.groups and not snapshot.desired:
                break
    stage.head.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(stage.head.wait, 60) == 0
    assert [stage.asked(what) for what in ("applications", "actors", "placements")] == ["", "", ""]
