"""The planner's hands: what it decides is written once, told, and never over somebody else's head."""

from __future__ import annotations

from typing import Any

import pytest

from tandem.core.types import DpLoad
from tandem.fleet.control_client import FleetLoad
from tandem_operator.kube import KubeError
from tandem_operator.names import EP_GROUP, POOL, Key
from tandem_operator.reconcile.scaling import FleetPlanner
from unit.operator.world import World

DECODE = Key(POOL, "ai", "r1-decode")
SCALING = {"minGroups": 2, "maxGroups": 4}


class Told:
    """What the control service tells of the load."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def __call__(self) -> FleetLoad:
        ranks = (DpLoad(dp_rank=0, running=3, token_usage=0.12345),)
        return FleetLoad(dict.fromkeys(self._world.control.groups, ranks), ())


async def planned(**decode: Any) -> tuple[World, FleetPlanner]:
    world = World(decode={"rollout": {"canarySeconds": 0}, **decode})
    await world.look()
    world.link.load = Told(world)  # type: ignore[attr-defined]
    return world, FleetPlanner(world.ctx, "ai", "r1")


async def test_a_decision_is_written_through_the_scale_subresource_and_told() -> None:
    world, planner = await planned(autoscaling=SCALING)
    await planner.tick()
    assert "patch ExpertParallelPool/r1-decode scale" in world.server.writes
    pool = world.server.objects[DECODE]
    assert pool["spec"]["replicas"] == 2
    assert pool["status"]["scaling"]["wanted"] == 2
    assert any(told.startswith("ScaledUp: ") for told in world.recorder.told)
    await world.look()
    assert "decode-1" in world.groups()


async def test_a_decision_is_made_for_the_pool_that_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    world, planner = await planned(autoscaling=SCALING)
    said: list[Any] = []

    async def refuse(key: Key, change: Any, *, part: str = "") -> Any:
        said.append(change["metadata"]["resourceVersion"])
        raise KubeError("somebody was faster", 409)

    monkeypatch.setattr(world.server, "patch", refuse)
    await planner.tick()  # the error is logged, and the next tick sees what is there
    assert said == [world.server.objects[DECODE]["metadata"]["resourceVersion"]]


async def test_a_pool_without_autoscaling_is_left_alone() -> None:
    world, planner = await planned()
    world.server.writes.clear()
    await planner.tick()
    assert [write for write in world.server.writes if "scale" in write] == []


async def test_a_second_tick_writes_nothing() -> None:
    world, planner = await planned(autoscaling=SCALING)
    await planner.tick()
    await world.look()
    await planner.tick()
    world.server.writes.clear()
    await planner.tick()
    assert world.server.writes == []


async def test_the_load_is_told_rounded() -> None:
    world, planner = await planned()
    await planner.tick()
    status = world.server.objects[Key(EP_GROUP, "ai", "r1-decode-0")]["status"]
    assert status["load"] == {"running": 3, "waiting": 0, "kvUse": 0.123}
