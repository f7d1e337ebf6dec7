"""A real controller that scales a pool by what a gateway reports; ranks are small scripts, the gateway is the test."""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import ray
import script_engine
from ray import cloudpickle
from ray.actor import ActorHandle

from tandem.config import FleetConfig
from tandem.core.group import Policy
from tandem.core.traffic import BOUNDS, TRAFFIC, TrafficReport
from tandem.core.types import FleetSnapshot, GroupSpec, GroupState, Role
from tandem.fleet.autoscale import autoscale_settings
from tandem.fleet.cluster import LocalCluster, connect, disconnect
from tandem.fleet.controller import Controller, ControllerSettings, start_controller
from tandem.fleet.hands import HandsSettings
from tandem.fleet.rank import RankSettings
from tandem.fleet.snapshot import DESIRED, FleetRecord, watch_snapshots
from tandem.state import Store, open_store

cloudpickle.register_pickle_by_value(script_engine)  # the controller's process cannot import it

pytestmark = pytest.mark.timeout(240)

FLEET = "scaled"
WITHIN_S = 60.0
CONFIG = FleetConfig.model_validate(
    {
        "prefill": {"nodes": 1},
        "decode": {
            "nodes": 1,
            "autoscaling": {
                "min_groups": 0,
                "max_groups": 2,
                "itl_s": 0.05,
                "up_cooldown_s": 1,
                "down_cooldown_s": 5,
                "idle_s": 1,
            },
        },
        "planning": {"tick_s": 0.5, "fast_window_s": 2, "slow_window_s": 10},
    }
)


class Reported:
    """A gateway's reports: with load, its tokens come 100 ms apart."""

    def __init__(self, store: Store, rooms: Path) -> None:
        self._store = store
        self._rooms = rooms
        self._slow = bisect_left(BOUNDS, 0.1)
        self._began = time.time()
        self._tokens = 0
        self._running = 0
        self.waiting = 0
        """Requests for which there is no decode group."""

    def load(self, running: int) -> None:
        self._running = running
        self._rooms.write_text(str(running))

    async def keep(self) -> None:
        while True:
            self._tokens += 10 * self._running
            itl = [0] * (len(BOUNDS) + 1)
            itl[self._slow] = self._tokens
            report = TrafficReport(
                replica="g",
                incarnation="g1",
                started=self._began,
                at=time.time(),
                arrived=self._tokens // 100,
                admitted=self._tokens // 100,
                input_tokens=self._tokens,
                output_tokens=self._tokens,
                itl=tuple(itl),
                running=self._running,
                waiting_decode=self.waiting,
            )
            await self._store.put(f"{TRAFFIC}g", msgspec.json.encode(report), ttl=10)
            await asyncio.sleep(0.2)


@dataclass
class Stage:
    folder: Path
    controller: ActorHandle[Controller]


async def wish(folder: Path) -> None:
    """A group of each role is wished for before the controller starts, as whoever starts a fleet does."""
    store = await open_store("embedded", fleet=FLEET, folder=folder)
    for role in Role:
        spec = GroupSpec(group=f"{role}-0", role=role, nodes=1)
        await store.put(f"{DESIRED}{spec.group}", msgspec.json.encode(spec))
    await store.close()


@pytest.fixture
def stage() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="tandem-") as name:
        folder = Path(name)
        cluster = LocalCluster.start(folder, 3)
        try:
            connect(cluster.address, namespace=FLEET)
            asyncio.run(wish(folder))
            controller = start_controller(
                ControllerSettings(
                    fleet=FleetRecord(name=FLEET, model_path="/first", model_name="script", model_version="1"),
                    store_url="embedded",
                    store_folder=str(folder),
                    engines=script_engine.ScriptEngines(str(folder / "rooms")),
                    hands=HandsSettings(rank=RankSettings(logs=str(folder / "logs"), scratch=str(folder))),
                    policy=Policy(start=30, settle=0.2, backoff=0.1, backoff_most=0.5),
                    control_port=0,
                    autoscale=autoscale_settings(CONFIG),
                    log=str(folder / "logs" / "controller.log"),
                )
            )
            ray.get(controller.ready.remote(WITHIN_S))
            yield Stage(folder, controller)
        finally:
            disconnect()
            cluster.stop()


@pytest.fixture
async def store(stage: Stage) -> AsyncIterator[Store]:
    store = await open_store("embedded", fleet=FLEET, folder=stage.folder)
    yield store
    await store.close()


async def until(store: Store, what: str, holds: Callable[[FleetSnapshot], bool]) -> FleetSnapshot:
    """The fleet as soon as it is so."""
    seen: FleetSnapshot | None = None
    try:
        async with asyncio.timeout(WITHIN_S):
            async for fleet in watch_snapshots(store):
                seen = fleet
                if holds(fleet):
                    return fleet
    except TimeoutError:
        raise AssertionError(f"not within {WITHIN_S:g} s: {what}; the fleet is {seen}") from None
    raise AssertionError("the watch ended")


def serving(fleet: FleetSnapshot) -> list[str]:
    """Decode groups that are ready and stay."""
    staying = {spec.group for spec in fleet.desired if not spec.draining}
    return [
        group.group
        for group in fleet.groups
        if group.role is Role.DECODE and group.state is GroupState.READY and group.group in staying
    ]


async def test_a_load_step_makes_it_go_from_one_group_to_two_and_to_none_and_back_although_the_controller_dies(
    stage: Stage, store: Store
) -> None:
    gateway = Reported(store, stage.folder / "rooms")
    reporting = asyncio.create_task(gateway.keep())
    try:
        await until(store, "one group serves", lambda fleet: serving(fleet) == ["decode-0"])
        gateway.load(6)
        two = await until(store, "two are wanted", lambda fleet: any(plan.wanted == 2 for plan in fleet.plans))
        await until(store, "two groups serve", lambda fleet: len(serving(fleet)) == 2)
        os.kill(await stage.controller.pid.remote(), signal.SIGKILL)
        gateway.load(0)
        one = await until(store, "one is wanted again", lambda fleet: all(plan.wanted == 1 for plan in fleet.plans))
        left = await until(store, "one group is left", lambda fleet: len(fleet.groups) == 2)
        none = await until(
            store, "none is left", lambda fleet: [group.role for group in fleet.groups] == [Role.PREFILL]
        )
        os.kill(await stage.controller.pid.remote(), signal.SIGKILL)
        gateway.waiting = 1
        again = await until(store, "one group serves again", lambda fleet: len(serving(fleet)) == 1)
    finally:
        reporting.cancel()
        await asyncio.wait([reporting])
    assert [plan.role for plan in two.plans] == [Role.DECODE]
    assert "time between tokens" in two.plans[0].reason
    assert one.plans[0].reason
    assert len(serving(left)) == 1
    assert "0 groups instead of 1: nobody has asked anything" in none.plans[0].reason
    assert again.plans[0].reason == "decode: 1 group instead of 0: requests wait and there is no group"
