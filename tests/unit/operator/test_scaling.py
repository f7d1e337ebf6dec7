"""The planner's hands: what it decides is written once, told, and never over somebody else's head."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from tandem.core.planning_types import Capacity
from tandem.core.types import DpLoad
from tandem.fleet.control_client import FleetLoad
from tandem_operator.api.pool import PoolSpec
from tandem_operator.kube import KubeError
from tandem_operator.names import CONFIG_MAP, EP_GROUP, FLEET, POOL, Key
from tandem_operator.reconcile.planning_memory import PlanningMemory
from tandem_operator.reconcile.scaling import FleetPlanner
from tandem_operator.render.policy import plan_policy
from unit.operator.objects import spec_of
from unit.operator.world import NOW, World

DECODE = Key(POOL, "ai", "r1-decode")
PREFILL = Key(POOL, "ai", "r1-prefill")
POOLS = (PREFILL, DECODE)
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


MEMORY = Key(CONFIG_MAP, "ai", "r1-planning")


async def test_a_number_set_by_hand_stands_through_another_operator() -> None:
    world, planner = await planned(autoscaling=SCALING)
    for _ in range(2):
        await planner.tick()
        await world.look()
    world.scale("decode", 4)
    await planner.tick()
    await world.look()
    world.ctx.at += 400  # past the cool-down, and within the time that it stands
    after = FleetPlanner(world.ctx, "ai", "r1")
    for _ in range(3):
        await after.tick()
        world.ctx.at += 2
    scaling = world.server.objects[DECODE]["status"]["scaling"]
    assert (scaling["wanted"], "set by hand, which stands for another" in scaling["held"]) == (4, True)


async def test_a_number_set_while_no_operator_ran_stands_as_well() -> None:
    world, planner = await planned(autoscaling=SCALING)
    await planner.tick()
    await world.look()
    world.scale("decode", 3)
    world.ctx.at += 60
    await FleetPlanner(world.ctx, "ai", "r1").tick()
    assert "set by hand" in world.server.objects[DECODE]["status"]["scaling"]["reason"]


async def test_the_planning_of_a_fleet_without_autoscaling_is_not_written_down() -> None:
    world, planner = await planned()
    await planner.tick()
    assert MEMORY not in world.server.objects


async def test_what_belongs_to_an_earlier_fleet_of_the_name_is_not_read() -> None:
    world, planner = await planned(autoscaling=SCALING)
    await planner.tick()
    kept = world.server.objects[MEMORY]
    owner = {**kept["metadata"]["ownerReferences"][0], "uid": "another"}
    world.server.put(MEMORY, {**kept, "metadata": {**kept["metadata"], "ownerReferences": [owner]}})
    world.scale("decode", 3)
    await FleetPlanner(world.ctx, "ai", "r1").tick()  # that it cannot write its own yet is logged
    assert "as found" in world.server.objects[DECODE]["status"]["scaling"]["reason"]


async def test_what_is_learned_is_written_at_most_every_30_s() -> None:
    world, planner = await planned(autoscaling=SCALING)
    await planner.tick()
    fleet = world.server.objects[Key(FLEET, "ai", "r1")]
    policy = plan_policy(
        spec_of(fleet), *(PoolSpec.model_validate(world.server.objects[pool]["spec"]) for pool in POOLS)
    )
    memory = PlanningMemory(world.ctx)
    state = memory.read(fleet, NOW)

    async def kept(capacity: float, at: float) -> bool:
        learned = replace(state.decode, capacity=Capacity(kept=capacity))
        return await memory.write(fleet, replace(state, decode=learned), policy, at)

    assert not await kept(100.0, NOW + 29)
    assert await kept(100.0, NOW + 30)
    assert not await kept(100.4, NOW + 100)  # no news
    assert await kept(140.0, NOW + 100)


async def test_the_load_is_told_rounded() -> None:
    world, planner = await planned()
    await planner.tick()
    status = world.server.objects[Key(EP_GROUP, "ai", "r1-decode-0")]["status"]
    assert status["load"] == {"running": 3, "waiting": 0, "kvUse": 0.123}
