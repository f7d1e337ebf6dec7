"""What the planner is told to aim at, from the specs of a fleet and its pools."""

from __future__ import annotations

from tandem import planning_policy
from tandem.core.planning_types import PlanPolicy, PoolPolicy
from tandem_operator.api.fleet import FleetSpec
from tandem_operator.api.pool import PoolSpec


def plan_policy(fleet: FleetSpec, prefill: PoolSpec, decode: PoolSpec) -> PlanPolicy:
    """The policy of both pools: the laptop's, of what the fleet and the pools say now."""
    return planning_policy.plan_policy(_pool(fleet, prefill), _pool(fleet, decode), fleet.planning)


def _pool(fleet: FleetSpec, pool: PoolSpec) -> PoolPolicy:
    return planning_policy.pool_policy(
        pool.role,
        pool.autoscaling,
        gpus_per_group=pool.nodes * pool.gpus_per_node,
        ttft_s=fleet.slo.ttft_s,
        itl_s=fleet.slo.itl_s,
        start_s=fleet.timeouts.group_start_s,
        paused=pool.paused or fleet.paused,
    )
