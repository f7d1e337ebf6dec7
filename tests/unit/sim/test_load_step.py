"""The planner on a fleet of queues: what a load step looks like, and what a day costs."""

from __future__ import annotations

import math

from tandem.core.planning_types import PlanPolicy, PoolPolicy
from tandem.core.types import Role
from tandem.sim.load_step import FleetShape, LoadModel, oracle_gpu_s, table

SHAPE = FleetShape()
POLICY = PlanPolicy(
    prefill=PoolPolicy(gpus_per_group=8, aim_s=2.0, down_cooldown_s=120),
    decode=PoolPolicy(gpus_per_group=16, aim_s=0.05, down_cooldown_s=120),
)
ONE = {Role.PREFILL: 1, Role.DECODE: 1}


def step(at: float) -> float:
    """Requests per second: four times as many for ten minutes."""
    return 8.0 if 200 <= at < 800 else 2.0


def test_a_load_step_makes_decode_go_from_one_to_two_to_one() -> None:
    model = LoadModel(POLICY, SHAPE, groups=ONE, seed=1)
    rows = model.run(1300, step)
    numbers = [row.wanted[Role.DECODE] for row in rows]
    changes = [numbers[at] for at in range(len(numbers)) if at == 0 or numbers[at] != numbers[at - 1]]
    assert changes == [1, 2, 1], table(rows)
    assert {row.wanted[Role.PREFILL] for row in rows} == {1}


def test_the_decision_comes_within_ten_seconds_of_the_breach() -> None:
    rows = LoadModel(POLICY, SHAPE, groups=ONE, seed=2).run(300, step)
    breach = next(row.at for row in rows if row.itl_s is not None and row.itl_s > POLICY.decode.aim_s)
    decision = next(row.at for row in rows if row.changes)
    assert 0 <= decision - breach <= 10


def test_the_table_shows_each_change_with_its_reason() -> None:
    model = LoadModel(POLICY, SHAPE, groups=ONE, seed=1)
    lines = table(model.run(300, step)).splitlines()
    assert len(lines) == 2
    assert "decode: 2 groups instead of 1: time between tokens p95 was" in lines[1]


def test_an_oracle_pays_for_the_groups_that_the_load_needs_and_their_start() -> None:
    spare = oracle_gpu_s(POLICY, SHAPE, 1300, step, spare=0.0)
    bears = SHAPE.streams(POLICY.decode.aim_s)
    groups = math.ceil(8 * SHAPE.answer_tokens * POLICY.decode.aim_s / bears)
    assert spare == 1300 * (8 + 16) + (groups - 1) * 16 * (600 + SHAPE.start_s)
