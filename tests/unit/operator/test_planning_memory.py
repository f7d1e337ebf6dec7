"""What the planning remembers outlives the operator, and whoever deletes it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from tandem.core.planning_types import Capacity
from tandem_operator.api.pool import PoolSpec
from tandem_operator.names import FLEET, Key
from tandem_operator.reconcile.planning_memory import PlanningMemory
from tandem_operator.reconcile.scaling import FleetPlanner
from tandem_operator.render.policy import plan_policy
from unit.operator.objects import spec_of
from unit.operator.planned import DECODE, MEMORY, PREFILL, SCALING, planned
from unit.operator.world import NOW, World


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


def edited(world: World) -> None:
    kept = world.server.objects[MEMORY]
    world.server.put(MEMORY, {**kept, "data": {"planning.json": "{}"}})


def deleted(world: World) -> None:
    world.server.drop(MEMORY)


@pytest.mark.parametrize("lost", [deleted, edited])
async def test_what_somebody_takes_away_is_there_again_after_a_tick(lost: Callable[[World], None]) -> None:
    world, planner = await planned(autoscaling=SCALING)
    await planner.tick()
    kept = world.server.objects[MEMORY]["data"]
    lost(world)
    await planner.tick()
    assert world.server.objects[MEMORY]["data"] == kept


async def test_a_number_set_by_hand_stands_through_another_operator_after_its_memory_was_deleted() -> None:
    world, planner = await planned(autoscaling=SCALING)
    await planner.tick()
    await world.look()
    world.scale("decode", 4)
    await planner.tick()
    world.server.drop(MEMORY)
    await planner.tick()
    await FleetPlanner(world.ctx, "ai", "r1").tick()
    assert "set by hand, which stands for another" in world.server.objects[DECODE]["status"]["scaling"]["held"]


async def test_an_operator_that_takes_over_does_not_write_again_what_it_has_read() -> None:
    world, planner = await planned(autoscaling=SCALING)
    for _ in range(2):
        await planner.tick()
        await world.look()
    world.server.writes.clear()
    await FleetPlanner(world.ctx, "ai", "r1").tick()
    assert [write for write in world.server.writes if MEMORY.name in write] == []


async def test_what_is_learned_is_written_at_most_every_30_s() -> None:
    world, planner = await planned(autoscaling=SCALING)
    await planner.tick()
    fleet = world.server.objects[Key(FLEET, "ai", "r1")]
    policy = plan_policy(
        spec_of(fleet), *(PoolSpec.model_validate(world.server.objects[pool]["spec"]) for pool in (PREFILL, DECODE))
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
