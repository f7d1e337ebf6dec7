"""The planner's smaller parts: schedules, the budget, and what the drivers hand in."""

from __future__ import annotations

import calendar

import pytest

from tandem.config import AutoscalingConfig, FleetConfig, PlanningConfig
from tandem.core.planning_budget import share
from tandem.core.planning_schedule import least_groups
from tandem.core.planning_types import GroupLoad, ScheduleWindow
from tandem.core.planning_view import pool_view, queue_of, window_of
from tandem.core.traffic import BOUNDS, Traffic
from tandem.core.types import DpLoad, Group, GroupSpec, GroupState, Role
from tandem.planning_policy import policy_of, pool_policy
from unit.core.planning_fleet import IDLE, POLICY, Paper

PREFILL, DECODE = Role.PREFILL, Role.DECODE
OFFICE = ScheduleWindow(days=(0, 1, 2, 3, 4), begin_min=8 * 60, end_min=18 * 60, min_groups=3)
NIGHT = ScheduleWindow(days=(4,), begin_min=22 * 60, end_min=6 * 60, min_groups=2)


def utc(day: int, hour: int, minute: int = 0) -> float:
    """A moment of January 2026; the 5th is a Monday."""
    return float(calendar.timegm((2026, 1, day, hour, minute, 0)))


@pytest.mark.parametrize(
    ("now", "least"),
    [
        (utc(5, 7, 59), 0),
        (utc(5, 8), 3),
        (utc(9, 17, 59), 3),
        (utc(9, 18), 0),
        (utc(10, 12), 0),
        (utc(9, 22), 2),
        (utc(10, 5, 59), 2),
        (utc(10, 6), 0),
        (utc(10, 22), 0),
        (utc(9, 5), 0),
    ],
)
def test_a_schedule_opens_and_closes_in_utc_also_past_midnight(now: float, least: int) -> None:
    assert least_groups((OFFICE, NIGHT), now) == least


def test_a_window_that_ends_when_it_begins_is_a_whole_day() -> None:
    window = ScheduleWindow(days=(0,), begin_min=480, end_min=480, min_groups=1)
    assert [least_groups((window,), at) for at in (utc(5, 7), utc(5, 8), utc(6, 7), utc(6, 8))] == [0, 1, 1, 0]


def test_the_schedule_brings_groups_when_it_opens_and_lets_them_go_after_it_closes() -> None:
    paper = Paper.of(now=utc(5, 7, 59))
    paper.pool(DECODE, schedule=(OFFICE,))
    paper.ticks(30)
    assert paper.wanted[DECODE] == 1
    decision = paper.ticks(32)
    assert decision.decode.reason == "decode: 3 groups instead of 1: at least 3 are wanted by the schedule"
    paper.now, paper.fast, paper.slow, paper.running, paper.kv = utc(5, 17, 59), IDLE, IDLE, 0, 0.0
    assert paper.ticks(58).decode.wanted == 3
    assert paper.ticks(200).decode.wanted == 1


def test_the_budget_goes_to_the_pool_that_lacks_the_larger_share() -> None:
    size, have = {PREFILL: 8, DECODE: 8}, {PREFILL: 2, DECODE: 2}
    assert share(56, 32, size, have, {PREFILL: 3, DECODE: 9}) == {PREFILL: 2, DECODE: 5}
    assert share(40, 32, size, have, {PREFILL: 3, DECODE: 3}) == {PREFILL: 3, DECODE: 2}


def test_a_pool_of_large_groups_does_not_keep_the_other_from_what_is_left() -> None:
    assert share(40, 32, {PREFILL: 8, DECODE: 16}, {PREFILL: 2, DECODE: 1}, {PREFILL: 3, DECODE: 4}) == {
        PREFILL: 3,
        DECODE: 1,
    }


def test_no_budget_grants_all() -> None:
    assert share(None, 99, {PREFILL: 8, DECODE: 8}, {PREFILL: 1, DECODE: 2}, {PREFILL: 9, DECODE: 1}) == {
        PREFILL: 9,
        DECODE: 2,
    }


def test_the_policy_of_a_configuration_has_the_fleets_aims_where_the_pool_has_none() -> None:
    config = FleetConfig.model_validate(
        {
            "prefill": {"nodes": 4, "gpus_per_node": 8, "autoscaling": {"ttft_s": 1.5}},
            "decode": {
                "autoscaling": {
                    "min_groups": 2,
                    "schedule": [{"days": ["sat"], "begin": "22:30", "end": "06:00", "min_groups": 3}],
                }
            },
            "planning": {"gpu_budget": 256, "tick_s": 5},
        }
    )
    policy = policy_of(config)
    assert (policy.prefill.aim_s, policy.prefill.gpus_per_group) == (1.5, 32)
    assert (policy.decode.aim_s, policy.decode.min_groups) == (config.routing.itl_s, 2)
    assert policy.decode.schedule == (ScheduleWindow(days=(5,), begin_min=1350, end_min=360, min_groups=3),)
    assert (policy.gpu_budget, policy.stale_s) == (256, 15.0)
    assert policy.prefill.start_s == config.timeouts.group_start_s


def test_a_pool_without_autoscaling_is_somebody_elses() -> None:
    policy = policy_of(FleetConfig())
    assert not policy.prefill.automatic
    assert not policy.decode.automatic


def test_a_budget_below_the_least_is_refused_with_both_numbers() -> None:
    scaled = AutoscalingConfig(min_groups=2)
    config = FleetConfig().model_copy(
        update={
            "decode": FleetConfig().decode.model_copy(update={"autoscaling": scaled, "gpus_per_node": 8}),
            "planning": PlanningConfig(gpu_budget=16),
        }
    )
    with pytest.raises(ValueError, match=r"gpu_budget \(16\) cannot hold the pools' min_groups, which take 32 GPUs"):
        policy_of(config)


def test_a_paused_pool_stays_paused_in_its_policy() -> None:
    policy = pool_policy(DECODE, AutoscalingConfig(), gpus_per_group=8, ttft_s=2, itl_s=0.05, start_s=60, paused=True)
    assert policy.paused


def test_a_window_of_traffic_has_the_rates_and_the_pools_percentiles() -> None:
    counts = [0] * (len(BOUNDS) + 1)
    counts[BOUNDS.index(0.05)] = 90
    counts[BOUNDS.index(0.1)] = 10
    traffic = Traffic(
        seconds=10,
        arrived=50,
        refused_limit=10,
        refused_busy=5,
        input_tokens=1000,
        cached_tokens=400,
        output_tokens=2000,
        itl=tuple(counts),
        queue_length=3,
        queue_oldest_s=1.5,
        waiting_decode=2,
    )
    window = window_of(traffic, POLICY)
    assert window is not None
    assert (window.requests_per_s, window.output_tokens_per_s, window.refused_per_s) == (4.0, 200.0, 0.5)
    assert (window.input_tokens_per_s, window.cached_tokens_per_s) == (100.0, 40.0)
    assert (window.ttft_s, window.ttft_count) == (None, 0)
    assert window.itl_s == pytest.approx(0.1, rel=0.1)
    assert (window.itl_kept, window.itl_count) == (0.9, 100)
    queue = queue_of(traffic)
    assert queue is not None
    assert (queue.queued, queue.oldest_wait_s, queue.waiting_decode, queue.anyone) == (3, 1.5, 2, True)
    assert (window_of(None, POLICY), queue_of(None)) == (None, None)


def test_a_pool_is_seen_from_the_snapshot_wishes_that_do_not_exist_yet_included() -> None:
    def group(number: int, state: GroupState) -> Group:
        return Group(group=f"decode-{number}", role=DECODE, epoch=1, state=state, since=5.0)

    specs = [GroupSpec(group=f"decode-{number}", role=DECODE, nodes=1, draining=number == 1) for number in (0, 1, 3)]
    groups = [group(0, GroupState.READY), group(1, GroupState.DRAINING), group(2, GroupState.GONE)]
    load = GroupLoad(at=9.0, ranks=(DpLoad(dp_rank=0, running=3), DpLoad(dp_rank=1, running=2, token_usage=0.5)))
    view = pool_view(DECODE, groups, specs, {"decode-0": load}, asked_at={"decode-3": 7.0})
    assert view.wanted == 2
    assert [(one.group, one.state, one.since, one.leaving) for one in view.groups] == [
        ("decode-0", GroupState.READY, 5.0, False),
        ("decode-1", GroupState.DRAINING, 5.0, True),
        ("decode-3", GroupState.STARTING, 7.0, False),
    ]
    assert view.groups[0].load is not None
    assert (view.groups[0].load.running, view.groups[0].load.kv_use) == (5, 0.5)


def test_groups_that_take_other_weights_are_on_their_way_back() -> None:
    """A refresh drains a group in place: nobody is to replace it."""
    paper = Paper.of(decode=2)
    paper.tick()
    paper.put("decode-1", GroupState.DRAINING)
    assert paper.ticks(90, settle=False).decode.wanted == 2
