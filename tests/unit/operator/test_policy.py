"""The planner is told the same by the operator as by the laptop's controller."""

from __future__ import annotations

from typing import Any

from tandem.config import FleetConfig
from tandem.core.planning_types import PlanPolicy
from tandem.core.types import Role
from tandem.planning_policy import policy_of
from tandem_operator.api.pool import PoolSpec
from tandem_operator.render.policy import plan_policy
from unit.operator import objects

SCHEDULE = {"days": ["sat"], "begin": "22:30", "end": "06:00"}


def policy(prefill: dict[str, Any] | None = None, decode: dict[str, Any] | None = None, **fleet: Any) -> PlanPolicy:
    """Of a Fleet, whose pools somebody has changed so."""
    made = objects.fleet(**fleet)
    live = {role: objects.pool(made, role)[0]["spec"] for role in Role}
    pools = {Role.PREFILL: prefill or {}, Role.DECODE: decode or {}}
    specs = {role: PoolSpec.model_validate({**live[role], **change}) for role, change in pools.items()}
    return plan_policy(objects.spec_of(made), specs[Role.PREFILL], specs[Role.DECODE])


def test_a_fleet_is_planned_as_the_same_configuration_on_a_laptop() -> None:
    made = policy(
        prefill={"nodes": 4, "autoscaling": {"ttftSeconds": 1.5, "percentile": 0.9, "idleSeconds": 33}},
        decode={"autoscaling": {"minGroups": 2, "schedule": [{**SCHEDULE, "minGroups": 3}]}},
        slo={"ttftSeconds": 3.0, "itlSeconds": 0.07},
        planning={"gpuBudget": 256, "tickSeconds": 5, "fastWindowSeconds": 12, "slowWindowSeconds": 90},
        timeouts={"groupStartSeconds": 77},
    )
    config = FleetConfig.model_validate(
        {
            "prefill": {
                "nodes": 4,
                "gpus_per_node": 8,
                "autoscaling": {"ttft_s": 1.5, "percentile": 0.9, "idle_s": 33},
            },
            "decode": {
                "gpus_per_node": 8,
                "autoscaling": {"min_groups": 2, "schedule": [{**SCHEDULE, "min_groups": 3}]},
            },
            "routing": {"ttft_s": 3.0, "itl_s": 0.07},
            "planning": {"gpu_budget": 256, "tick_s": 5, "fast_window_s": 12, "slow_window_s": 90},
            "timeouts": {"group_start_s": 77},
        }
    )
    assert made == policy_of(config)


def test_a_load_is_good_for_three_ticks_where_those_are_longer_than_10_s() -> None:
    assert [policy(planning={"tickSeconds": tick}).stale_s for tick in (2, 5)] == [10.0, 15.0]


def test_pools_that_were_changed_beyond_the_budget_are_still_planned() -> None:
    made = policy(decode={"autoscaling": {"minGroups": 4}}, planning={"gpuBudget": 32})
    assert (made.gpu_budget, made.decode.min_groups * made.decode.gpus_per_group) == (32, 64)


def test_a_pool_is_paused_with_its_fleet() -> None:
    changes: tuple[dict[str, Any], ...] = ({}, {"paused": True}, {"decode": {"paused": True}})
    assert [policy(**change).decode.paused for change in changes] == [False, True, True]
