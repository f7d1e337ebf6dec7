"""Least, most, none at all, and the budget of GPUs: case by case."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tandem.core.planning_types import PlanState, Queue
from tandem.core.types import GroupState, Role
from unit.core.planning_fleet import IDLE, QUIET, SLOW_TOKENS, Paper, learned

PREFILL, DECODE = Role.PREFILL, Role.DECODE


# -- bounds


def test_a_higher_least_comes_at_once() -> None:
    paper = Paper.of()
    paper.tick()
    paper.pool(DECODE, min_groups=4)
    decision = paper.tick()
    assert decision.decode.reason == "decode: 4 groups instead of 1: at least 4 are wanted"


def test_a_lower_most_is_reached_one_group_a_cool_down() -> None:
    paper = Paper.of(decode=4)
    paper.ticks(100)
    paper.pool(DECODE, max_groups=2)
    assert paper.tick().decode.reason == "decode: 3 groups instead of 4: at most 2 are wanted"
    paper.settle()
    assert paper.ticks(50).decode.wanted == 3
    assert paper.ticks(30).decode.wanted == 2


def test_the_only_group_that_is_ready_stays_while_others_start() -> None:
    paper = Paper.of(decode=1, fast=IDLE, slow=IDLE, running=0, kv=0)
    paper.wanted[DECODE] = 2
    paper.add(DECODE)
    decision = paper.ticks(90, settle=False)
    assert decision.decode.wanted == 2
    assert "awaited" in decision.decode.held


def idle_to_zero() -> Paper:
    paper = Paper.of(fast=IDLE, slow=IDLE, running=0, kv=0)
    for role in Role:
        paper.pool(role, min_groups=0, idle_s=200)
    return paper


def test_the_last_group_goes_when_nobody_has_asked_for_long() -> None:
    paper = idle_to_zero()
    assert paper.ticks(190).decode.wanted == 1
    decision = paper.ticks(20)
    assert (decision.prefill.wanted, decision.decode.wanted) == (0, 0)
    assert decision.prefill.reason == "prefill: 0 groups instead of 1: nobody has asked anything for 200 s"


def test_a_single_request_starts_the_wait_for_the_last_group_anew() -> None:
    paper = idle_to_zero()
    paper.ticks(190)
    paper.fast = QUIET
    paper.tick()
    paper.fast = IDLE
    assert paper.ticks(100).decode.wanted == 1


@pytest.mark.parametrize("queue", [Queue(queued=1), Queue(waiting_prefill=1), Queue(waiting_decode=1)])
def test_a_request_that_waits_brings_both_pools_from_zero_to_one_at_once(queue: Queue) -> None:
    paper = idle_to_zero()
    paper.ticks(220)
    paper.queue = queue
    decision = paper.tick()
    assert (decision.prefill.wanted, decision.decode.wanted) == (1, 1)
    assert decision.decode.reason == "decode: 1 group instead of 0: requests wait and there is no group"


def woken(**pool: float) -> Paper:
    """A request has come when there was no group, and was told to come again later: groups start for longer."""
    paper = idle_to_zero()
    for role in Role:
        paper.pool(role, start_s=1000, **pool)
    paper.ticks(220)
    paper.queue = Queue(waiting_prefill=1, waiting_decode=1)
    paper.tick()
    paper.queue = Queue()
    return paper


def test_groups_that_somebody_was_waiting_for_stay_until_they_could_have_been_asked() -> None:
    paper = woken()
    decision = paper.ticks(600, settle=False)
    assert (decision.prefill.wanted, decision.decode.wanted) == (1, 1)
    paper.put("prefill-2", GroupState.READY)
    decision = paper.ticks(300, settle=False)
    assert (decision.prefill.wanted, decision.decode.wanted) == (1, 1)
    assert decision.prefill.held == (
        "prefill: nobody asks; the last group goes 200 s after both pools serve; decode: 1 group is awaited for 900 s"
    )
    paper.put("decode-3", GroupState.READY)
    assert paper.ticks(200).prefill.wanted == 1
    decision = paper.ticks(4)
    assert (decision.prefill.wanted, decision.decode.wanted) == (0, 0)


def test_groups_that_are_overdue_are_not_waited_for() -> None:
    paper = woken()
    for role in Role:
        paper.pool(role, start_s=100)
    assert paper.ticks(150, settle=False).decode.wanted == 1
    assert paper.ticks(60, settle=False).decode.wanted == 0


def test_a_pool_whose_groups_all_fail_goes_to_none_when_nobody_asks_any_more() -> None:
    paper = woken()
    paper.pool(DECODE, start_s=100)
    paper.queue = Queue(waiting_decode=1)
    paper.put("decode-3", GroupState.FAILED)
    assert paper.ticks(400, settle=False).decode.wanted == 2
    paper.queue = Queue()
    assert paper.ticks(1000, settle=False).decode.wanted == 0


def test_somebody_who_comes_again_and_again_keeps_the_last_group() -> None:
    paper = woken()
    for _ in range(9):
        paper.ticks(98, settle=False)
        paper.fast = QUIET
        paper.tick()
        paper.fast = IDLE
    assert paper.wanted == {PREFILL: 1, DECODE: 1}


def test_a_pool_that_goes_down_to_its_last_group_does_not_make_the_other_wait_anew() -> None:
    paper = idle_to_zero()
    paper.pool(DECODE, min_groups=1)
    paper.wanted[DECODE] = 3
    for _ in range(2):
        paper.add(DECODE, GroupState.READY)
    paper.ticks(198)
    assert paper.wanted == {PREFILL: 1, DECODE: 1}
    assert paper.ticks(10).prefill.wanted == 0


def test_one_pool_alone_may_have_none_and_gets_one_for_a_request_that_waits() -> None:
    paper = idle_to_zero()
    paper.pool(PREFILL, min_groups=1)
    decision = paper.ticks(400)
    assert (decision.prefill.wanted, decision.decode.wanted) == (1, 0)
    paper.queue = Queue(waiting_decode=1)
    assert paper.tick().decode.wanted == 1


def test_none_by_hand_stands_although_requests_wait() -> None:
    paper = idle_to_zero()
    paper.tick()
    paper.scale(DECODE, 0)
    paper.queue = Queue(waiting_decode=1)
    decision = paper.ticks(800)
    assert decision.decode.wanted == 0
    assert "0 groups were set by hand, which stands for another" in decision.decode.held
    assert paper.ticks(200).decode.wanted == 1


def test_without_memory_none_stay_none_until_somebody_asks() -> None:
    paper = idle_to_zero()
    paper.ticks(220)
    paper.state = PlanState()
    assert paper.ticks(1000).decode.wanted == 0
    paper.queue = Queue(waiting_decode=1)
    assert paper.tick().decode.wanted == 1


# -- the budget


def test_the_budget_is_shared_by_need_and_says_so() -> None:
    both = replace(SLOW_TOKENS, ttft_s=5.0, ttft_kept=0.5)
    paper = Paper.of(prefill=2, decode=2, fast=both, backlog=9000)
    paper.policy = replace(paper.policy, gpu_budget=48)
    decision = paper.ticks(4)
    assert (decision.prefill.wanted, decision.decode.wanted) == (3, 3)
    assert "the budget of 48 GPUs, of which 32 are taken, has room for 1" in decision.prefill.reason
    assert decision.gpus == 48


def test_a_budget_that_is_used_up_holds_and_says_so() -> None:
    paper = Paper.of(fast=SLOW_TOKENS)
    paper.policy = replace(paper.policy, gpu_budget=16)
    decision = paper.ticks(10)
    assert decision.decode.wanted == 1
    assert "but the budget of 16 GPUs, of which 16 are taken, has room for 0" in decision.decode.held


def test_groups_that_drain_still_hold_their_gpus() -> None:
    paper = Paper.of(fast=SLOW_TOKENS)
    paper.policy = replace(paper.policy, gpu_budget=24)
    paper.add(PREFILL, GroupState.DRAINING, leaving=True)
    assert paper.ticks(10, settle=False).decode.wanted == 1
    paper.settle()
    assert paper.ticks(2).decode.wanted == 2


def test_a_pool_with_a_surplus_gives_a_group_to_the_one_that_needs_it() -> None:
    paper = Paper.of(prefill=3, decode=1)
    paper.policy = replace(paper.policy, gpu_budget=32)
    paper.tick()
    learned(paper, PREFILL, broke=3000)
    paper.ticks(40)
    paper.state = replace(paper.state, prefill=replace(paper.state.prefill, needs=()))
    learned(paper, PREFILL, broke=600)
    paper.ticks(30)
    learned(paper, PREFILL, broke=3000)
    paper.fast = SLOW_TOKENS
    paper.ticks(4)
    assert paper.wanted[PREFILL] == 2
    assert "decode needs the GPUs" in paper.state.prefill.reason
    paper.ticks(4)
    assert paper.wanted[DECODE] == 2


def test_a_pool_without_a_surplus_gives_nothing() -> None:
    paper = Paper.of(prefill=3, decode=1)
    paper.policy = replace(paper.policy, gpu_budget=32)
    paper.tick()
    learned(paper, PREFILL, broke=720)
    paper.ticks(100)
    paper.fast = SLOW_TOKENS
    paper.ticks(200)
    assert (paper.wanted[PREFILL], paper.wanted[DECODE]) == (3, 1)


def test_a_lower_budget_takes_groups_back_one_at_a_time_but_not_below_the_least() -> None:
    paper = Paper.of(prefill=2, decode=2)
    paper.ticks(80)
    paper.policy = replace(paper.policy, gpu_budget=8)
    decision = paper.ticks(200)
    assert (decision.prefill.wanted, decision.decode.wanted) == (1, 1)
    assert "16 GPUs are taken, the budget is 8" in decision.decode.held
