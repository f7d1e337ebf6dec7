"""A fleet of machines that join by themselves: `tandem node head | join | leave`, with the scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import psutil
import pytest
from node_world import TANDEM, World, address, ask, control, until, world

from support.namespaces import needs_root
from support.redis_server import RedisServer
from tandem.config import ControlConfig, FleetConfig, GatewayConfig, ModelConfig, PoolConfig, RayConfig, StateConfig
from tandem.core.types import FleetSnapshot, Group, GroupSpec, GroupState, Role
from tandem.fleet.control_client import ControlClient, ControlError
from tandem.models.tiny import ensure_tiny

pytestmark = [needs_root, pytest.mark.timeout(600)]

HEAD, SECOND_HEAD, GATEWAY = 1, 2, 3
DECODE, OTHER = (4, 5), 6
WITHIN_S = 150.0


class Stage:
    """The machines, and the fleet on them. Starting it takes longer than each test."""

    def __init__(self, made: World, config: FleetConfig) -> None:
        self.world = made
        self.config = config
        self.file = made.folder / "config" / "fleet.json"
        self.file.parent.mkdir()
        self.write(config)
        self.on = HEAD
        made.place_head(self.on)
        self.joined = {number: made.join(number, "--group", "decode-0") for number in DECODE}
        self.joined[OTHER] = made.join(OTHER, "--group", "decode-1")
        self.gateway = made.join(GATEWAY, "--gateway")
        self.head = made.head(self.on, self.file)

    def write(self, config: FleetConfig) -> None:
        """Put the file in place, as Kubernetes does."""
        draft = self.file.with_suffix(".new")
        draft.write_text(config.model_dump_json())
        draft.replace(self.file)

    @property
    def control(self) -> str:
        return f"{address(self.on)}:9000"

    def log(self, name: str) -> str:
        return (self.world.folder / name).read_text()


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    redis = RedisServer()
    redis.start()
    try:
        with world(6) as made:
            none = PoolConfig(groups=0)
            config = FleetConfig(
                name="nodes",
                prefill=none,
                decode=none,
                gateway=GatewayConfig(host="0.0.0.0", auth="off"),
                control=ControlConfig(host="0.0.0.0"),
                state=StateConfig(url=redis.url),
                ray=RayConfig(group_resources=True),
            )
            stage = Stage(made, config)
            try:
                yield stage
            except BaseException:
                print(stage.log("head.log"))
                raise
    finally:
        redis.remove()


@pytest.fixture
async def fleet(stage: Stage) -> AsyncIterator[ControlClient]:
    """The control service, as soon as it answers."""
    async with control(stage.control, WITHIN_S) as client:
        yield client


async def seen(client: ControlClient, holds: Callable[[FleetSnapshot], bool]) -> FleetSnapshot:
    """The fleet as soon as it is as wanted."""
    last: FleetSnapshot | None = None
    try:
        async with asyncio.timeout(WITHIN_S):
            async for last in client.watch():
                if holds(last):
                    return last
    except TimeoutError:
        raise AssertionError(f"the fleet did not get there; it is {last}") from None
    raise AssertionError("the watch ended")


async def ready(client: ControlClient, group: str, epoch: int = 1) -> Group:
    def up(fleet: FleetSnapshot) -> Group | None:
        found = [one for one in fleet.groups if one.group == group]
        return next((one for one in found if one.state is GroupState.READY and one.epoch >= epoch), None)

    found = up(await seen(client, lambda fleet: up(fleet) is not None))
    assert found is not None
    return found


@pytest.fixture
async def decode(fleet: ControlClient) -> Group:
    """decode-0, ready, whatever an earlier test did to it."""
    with contextlib.suppress(ControlError):
        await fleet.put_group(GroupSpec(group="decode-0", role=Role.DECODE, nodes=2, revision="a"))
    return await ready(fleet, "decode-0")


def alive(group: Group) -> bool:
    return all(psutil.pid_exists(rank.pid) for rank in group.ranks)


def readiness(number: int) -> int:
    return ask(f"http://{address(number)}:8090/ready")[0]


async def test_a_group_is_placed_on_the_nodes_that_are_its_own(decode: Group) -> None:
    assert {rank.host for rank in decode.ranks} == {address(number) for number in DECODE}
    assert {rank.pod for rank in decode.ranks} == {f"pod-{number}" for number in DECODE}
    assert {rank.kube_node for rank in decode.ranks} == {f"machine-{number}" for number in DECODE}
    assert decode.revision == "a"
    networks = {os.readlink(f"/proc/{rank.pid}/ns/net") for rank in decode.ranks}
    assert len(networks) == 2


async def test_a_node_that_has_joined_says_so(decode: Group) -> None:
    assert [readiness(number) for number in (*DECODE, HEAD)] == [200, 200, 200]
    assert ask(f"http://{address(DECODE[0])}:8090/live")[0] == 200


async def test_the_gateway_is_on_its_own_node_and_tells_its_address(fleet: ControlClient) -> None:
    snapshot = await seen(fleet, lambda fleet: len(fleet.gateways) == 1)
    assert snapshot.gateways[0].url == f"http://{address(GATEWAY)}:8000"
    assert snapshot.gateways[0].grpc == f"{address(GATEWAY)}:9001"
    status, body = await asyncio.to_thread(ask, f"{snapshot.gateways[0].url}/health")
    assert (status, '"fleet":"nodes"' in body.replace(" ", "")) == (200, True)


async def test_a_node_that_is_killed_and_joins_again_brings_its_group_back(
    stage: Stage, fleet: ControlClient, decode: Group
) -> None:
    number = DECODE[0]
    stage.joined[number].kill()
    stage.joined[number].wait(10)
    await seen(fleet, lambda fleet: any(one.state is not GroupState.READY for one in fleet.groups))
    stage.joined[number] = stage.world.join(number, "--group", "decode-0")
    again = await ready(fleet, "decode-0", decode.epoch + 1)
    assert again.epoch == decode.epoch + 1


async def test_a_raylet_that_dies_is_followed_by_another(stage: Stage, fleet: ControlClient, decode: Group) -> None:
    raylet = next(child for child in psutil.Process(stage.joined[DECODE[1]].pid).children() if child.name() == "raylet")
    raylet.kill()
    await ready(fleet, "decode-0", decode.epoch + 1)
    assert readiness(DECODE[1]) == 200


async def test_groups_and_gateways_live_on_while_the_head_is_restarted_elsewhere(
    stage: Stage, fleet: ControlClient, decode: Group
) -> None:
    gateways = (await seen(fleet, lambda fleet: len(fleet.gateways) == 1)).gateways
    stage.head.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(stage.head.wait, 60) == 0
    assert alive(decode)
    stage.on = SECOND_HEAD
    stage.world.place_head(stage.on)
    stage.head = stage.world.head(stage.on, stage.file)
    await asyncio.to_thread(until, lambda: readiness(SECOND_HEAD) == 200, WITHIN_S, what="the new head")
    async with ControlClient(stage.control) as control:
        assert await ready(control, "decode-0") == decode
        assert (await control.fleet()).gateways == gateways
        # It is the controller of what lives, and of what comes.
        await control.put_group(GroupSpec(group="decode-1", role=Role.DECODE, nodes=1))
        assert (await ready(control, "decode-1")).ranks[0].host == address(OTHER)


async def test_a_head_that_is_killed_loses_nothing(stage: Stage, fleet: ControlClient, decode: Group) -> None:
    gateways = (await seen(fleet, lambda fleet: len(fleet.gateways) == 1)).gateways
    stage.head.kill()
    stage.head.wait(10)
    stage.head = stage.world.head(stage.on, stage.file)
    await asyncio.to_thread(until, lambda: readiness(stage.on) == 200, WITHIN_S, what="the new head")
    async with ControlClient(stage.control) as control:
        assert await ready(control, "decode-0") == decode
        assert (await control.fleet()).gateways == gateways


async def test_another_number_of_gateways_leaves_those_that_run_alone(stage: Stage, fleet: ControlClient) -> None:
    first = (await seen(fleet, lambda fleet: len(fleet.gateways) == 1)).gateways
    wider = stage.config.model_copy(update={"gateway": stage.config.gateway.model_copy(update={"replicas": 2})})
    number = SECOND_HEAD if stage.on == HEAD else HEAD
    second = stage.world.join(number, "--gateway")
    stage.write(wider)
    both = (await seen(fleet, lambda fleet: len(fleet.gateways) == 2)).gateways
    assert set(first) < set(both)
    assert {one.url for one in both} == {f"http://{address(each)}:8000" for each in (GATEWAY, number)}
    # Back again: its node goes first, as a pod does, and its gateway leaves in order.
    second.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(second.wait, 90) == 0
    assert "the gateway has stopped" in stage.log(f"join-{number}.log")
    stage.write(stage.config)
    await seen(fleet, lambda fleet: fleet.gateways == first)


async def test_leaving_drains_the_group_and_says_so(stage: Stage, fleet: ControlClient, decode: Group) -> None:
    def leave() -> str:
        done = subprocess.run(
            [*TANDEM, "node", "leave", "--control", stage.control, "--group", "decode-0", "--within", "30"],
            capture_output=True,
            text=True,
            timeout=50,
            check=True,
        )
        return done.stdout

    said = await asyncio.to_thread(leave)
    assert said.splitlines()[-1] in ("decode-0 is gone", "decode-0 is gone: no request runs there")
    assert all(one.group != "decode-0" for one in (await fleet.fleet()).desired)
    assert await asyncio.to_thread(leave) == "decode-0 is gone\n"


async def test_gateways_read_another_model_where_the_configuration_names_one_that_fits(
    stage: Stage, fleet: ControlClient, decode: Group
) -> None:
    def naming(path: Path) -> FleetConfig:
        return stage.config.model_copy(update={"model": ModelConfig(path=path, name="tiny", version="2")})

    first = (await seen(fleet, lambda fleet: len(fleet.gateways) == 1)).gateways
    stage.write(naming(Path("/none")))
    why = "model.path names weights that the fleet cannot take: the checkpoint in /none cannot be read"
    await asyncio.to_thread(until, lambda: why in stage.log("head.log"), WITHIN_S, what="the head's word")
    other = stage.world.folder / "other"
    ensure_tiny(other, seed=1)
    stage.write(naming(other))
    # The controller reads there as well, so another one takes over; what it serves ends with the old one.
    again = first
    while again == first or len(again) != 1:
        with contextlib.suppress(ControlError):
            async with control(stage.control, WITHIN_S) as client:
                again = (
                    await seen(client, lambda fleet: len(fleet.gateways) == 1 and fleet.gateways != first)
                ).gateways
    async with control(stage.control, WITHIN_S) as client:
        assert await ready(client, "decode-0") == decode
    assert (await asyncio.to_thread(ask, f"{again[0].url}/health"))[0] == 200
    # A head that starts while the configuration names what is not there goes by what the fleet has.
    stage.write(naming(Path("/none")))
    stage.head.kill()
    stage.head.wait(10)
    stage.head = stage.world.head(stage.on, stage.file)
    await asyncio.to_thread(until, lambda: readiness(stage.on) == 200, WITHIN_S, what="the new head")
    assert "the fleet goes on with the weights that it has: version 1 in" in stage.log("head.log")
    async with ControlClient(stage.control) as client:
        assert await ready(client, "decode-0") == decode


async def test_a_node_that_is_told_to_ends_with_code_0_and_leaves_no_process(stage: Stage) -> None:
    process = stage.joined[DECODE[0]]
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    assert await asyncio.to_thread(process.wait, 60) == 0
    assert not [one for one in below if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
