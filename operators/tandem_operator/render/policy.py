"""What the planner is told to aim at, from the specs of a fleet and its pools."""

from __future__ import annotations

from tandem.config import AutoscalingConfig, ScheduleConfig
from tandem.core.planning_types import PlanPolicy, PoolPolicy, ScheduleWindow
from tandem.core.types import Role
from tandem_operator.api.fleet import FleetSpec
from tandem_operator.api.pool import PoolSpec

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def plan_policy(fleet: FleetSpec, prefill: PoolSpec, decode: PoolSpec) -> PlanPolicy:
    """The policy of both pools."""
    planning = fleet.planning
    return PlanPolicy(
        prefill=_pool(fleet, prefill),
        decode=_pool(fleet, decode),
        gpu_budget=planning.gpu_budget,
        tick_s=planning.tick_s,
        fast_window_s=planning.fast_window_s,
        slow_window_s=planning.slow_window_s,
    )


def _pool(fleet: FleetSpec, pool: PoolSpec) -> PoolPolicy:
    scaling = pool.autoscaling or AutoscalingConfig()
    if pool.role is Role.PREFILL:
        aim = scaling.ttft_s if scaling.ttft_s is not None else fleet.slo.ttft_s
    else:
        aim = scaling.itl_s if scaling.itl_s is not None else fleet.slo.itl_s
    return PoolPolicy(
        gpus_per_group=pool.nodes * pool.gpus_per_node,
        aim_s=aim,
        automatic=pool.autoscaling is not None,
        paused=pool.paused or fleet.paused,
        min_groups=scaling.min_groups,
        max_groups=scaling.max_groups,
        percentile=scaling.percentile,
        target_use=scaling.target_use,
        up_cooldown_s=scaling.up_cooldown_s,
        down_cooldown_s=scaling.down_cooldown_s,
        idle_s=scaling.idle_s,
        manual_hold_s=scaling.manual_hold_s,
        schedule=tuple(_window(window) for window in scaling.schedule),
        start_s=fleet.timeouts.group_start_s,
    )


def _window(window: ScheduleConfig) -> ScheduleWindow:
    return ScheduleWindow(
        days=tuple(_DAYS.index(day) for day in window.days),
        begin_min=_minutes(window.begin),
        end_min=_minutes(window.end),
        min_groups=window.min_groups,
    )


def _minutes(time: str) -> int:
    hours, minutes = time.split(":")
    return 60 * int(hours) + int(minutes)
