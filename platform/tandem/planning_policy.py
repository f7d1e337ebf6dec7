"""The planner's policy, made of the configuration. Both drivers use it: the operator and the laptop's controller."""

from __future__ import annotations

from collections.abc import Sequence

from tandem.config import AutoscalingConfig, FleetConfig, PlanningConfig, ScheduleConfig
from tandem.core.planning_types import PlanPolicy, PoolPolicy, ScheduleWindow
from tandem.core.types import Role

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def schedule_window(config: ScheduleConfig) -> ScheduleWindow:
    """One window of a schedule."""
    return ScheduleWindow(
        days=tuple(_DAYS.index(day) for day in config.days),
        begin_min=_minutes(config.begin),
        end_min=_minutes(config.end),
        min_groups=config.min_groups,
    )


def pool_policy(
    role: Role,
    autoscaling: AutoscalingConfig | None,
    *,
    gpus_per_group: int,
    ttft_s: float,
    itl_s: float,
    start_s: float,
    paused: bool = False,
) -> PoolPolicy:
    """Of one pool; `ttft_s` and `itl_s` are the fleet's own aims (a Fleet's `slo`, or `routing`), `start_s` is
    `timeouts.group_start_s`.

    None for `autoscaling` is a pool whose number somebody else decides.
    """
    wanted = autoscaling or AutoscalingConfig()
    aim = (wanted.ttft_s or ttft_s) if role is Role.PREFILL else (wanted.itl_s or itl_s)
    return PoolPolicy(
        gpus_per_group=gpus_per_group,
        aim_s=aim,
        automatic=autoscaling is not None,
        paused=paused,
        min_groups=wanted.min_groups,
        max_groups=wanted.max_groups,
        percentile=wanted.percentile,
        target_use=wanted.target_use,
        up_cooldown_s=wanted.up_cooldown_s,
        down_cooldown_s=wanted.down_cooldown_s,
        idle_s=wanted.idle_s,
        manual_hold_s=wanted.manual_hold_s,
        schedule=_schedule(wanted.schedule),
        start_s=start_s,
    )


def plan_policy(prefill: PoolPolicy, decode: PoolPolicy, planning: PlanningConfig) -> PlanPolicy:
    """Of both pools together."""
    return PlanPolicy(
        prefill=prefill,
        decode=decode,
        gpu_budget=planning.gpu_budget,
        tick_s=planning.tick_s,
        fast_window_s=planning.fast_window_s,
        slow_window_s=planning.slow_window_s,
        stale_s=max(10.0, 3 * planning.tick_s),
    )


def policy_of(config: FleetConfig) -> PlanPolicy:
    """Of a fleet by its `fleet.yaml`.

    Raises ValueError if the budget cannot hold the least groups of the pools that scale by themselves. (Of a Fleet
    the operator says that, and goes on with pools that somebody has changed since.)
    """
    pools = {
        role: pool_policy(
            role,
            pool.autoscaling,
            gpus_per_group=pool.nodes * pool.gpus_per_node,
            ttft_s=config.routing.ttft_s,
            itl_s=config.routing.itl_s,
            start_s=config.timeouts.group_start_s,
        )
        for role, pool in ((Role.PREFILL, config.prefill), (Role.DECODE, config.decode))
    }
    budget = config.planning.gpu_budget
    least = sum(pool.min_groups * pool.gpus_per_group for pool in pools.values() if pool.automatic)
    if budget is not None and least > budget:
        raise ValueError(
            f"planning.gpu_budget ({budget}) cannot hold the pools' min_groups, which take {least} GPUs: "
            "raise the budget or lower min_groups"
        )
    return plan_policy(pools[Role.PREFILL], pools[Role.DECODE], config.planning)


def _schedule(windows: Sequence[ScheduleConfig]) -> tuple[ScheduleWindow, ...]:
    return tuple(schedule_window(window) for window in windows)


def _minutes(text: str) -> int:
    hours, minutes = text.split(":")
    return 60 * int(hours) + int(minutes)
