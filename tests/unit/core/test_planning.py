"""How many groups, case by case: each test is one thing that can happen to a fleet."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from tandem.core.planning_types import PlanState, Queue
from tandem.core.types import GroupState, Role
from unit.core.planning_fleet import IDLE, LATE_TOKENS, QUIET, SLOW_TOKENS, Paper, learned

PREFILL, DECODE = Role.PREFILL, Role.DECODE


# -- the reactive loop


def test_slow_tokens_add_a_decode_group_and_the_reason_has_the_numbers() -> None:
    paper = Paper.of(fast=SLOW_TOKENS)
    paper.tick()
    decision = paper.tick()
    assert (decision.decode.wanted, decision.prefill.wanted) == (2, 1)
    assert decision.decode.reason == (
        "decode: 2 groups instead of 1: time between tokens p95 was 83 ms over 10 s, aim 50 ms"
    )


def test_a_breach_leads_to_a_decision_within_ten_seconds() -> None:
    paper = Paper.of()
    paper.ticks(60)
    paper.fast, began = SLOW_TOKENS, paper.now
    while paper.tick().decode.wanted == 1:
        assert paper.now - began < 10
    assert paper.now - began <= 10


def test_one_bad_tick_is_no_breach() -> None:
    paper = Paper.of(fast=SLOW_TOKENS)
    paper.tick()
    paper.fast = QUIET
    assert paper.ticks(20).decode.wanted == 1


def test_late_first_tokens_add_a_prefill_group_when_prompts_wait_there() -> None:
    decision = Paper.of(fast=LATE_TOKENS, backlog=50_000).ticks(4)
    assert (decision.prefill.wanted, decision.decode.wanted) == (2, 1)
    assert "time to first token p95 was 5.0 s over 10 s, aim 2.0 s" in decision.prefill.reason


def test_late_first_tokens_are_decodes_when_its_cache_is_full_and_no_prompt_waits() -> None:
    decision = Paper.of(fast=LATE_TOKENS, kv=0.95).ticks(4)
    assert (decision.prefill.wanted, decision.decode.wanted) == (1, 2)
    assert "decode is what is short" in decision.prefill.held


def test_late_first_tokens_add_nothing_when_nothing_waits_anywhere() -> None:
    decision = Paper.of(fast=LATE_TOKENS).ticks(10)
    assert (decision.prefill.wanted, decision.decode.wanted) == (1, 1)
    assert "more groups would not help" in decision.prefill.held


def test_slow_tokens_add_nothing_when_each_group_has_but_one_request() -> None:
    decision = Paper.of(fast=SLOW_TOKENS, running=1).ticks(10)
    assert decision.decode.wanted == 1
    assert "more would not help" in decision.decode.held


def test_one_long_prompt_is_no_lack_of_groups() -> None:
    one = replace(LATE_TOKENS, ttft_count=4, ttft_kept=0.75)
    assert Paper.of(fast=one, backlog=50_000).ticks(10).prefill.wanted == 1


def test_a_full_kv_cache_adds_a_decode_group() -> None:
    decision = Paper.of(kv=0.93).ticks(4)
    assert decision.decode.reason == "decode: 2 groups instead of 1: the KV cache is 93% full on 1 group, aim 75%"


def test_a_queue_that_waits_too_long_adds_a_decode_group() -> None:
    decision = Paper.of(queue=Queue(queued=12, oldest_wait_s=3.0)).ticks(4)
    assert decision.decode.wanted == 2
    assert "12 requests wait in the gateways, the first for 3.0 s" in decision.decode.reason


def test_a_large_breach_adds_several_groups_but_at_most_doubles_them() -> None:
    paper = Paper.of(decode=3, fast=replace(SLOW_TOKENS, itl_s=0.5))
    assert paper.ticks(4).decode.wanted == 6


def test_a_breach_never_asks_for_more_than_are_allowed() -> None:
    paper = Paper.of(decode=3, fast=SLOW_TOKENS)
    paper.pool(DECODE, max_groups=3)
    decision = paper.ticks(10)
    assert decision.decode.wanted == 3
    assert "as many as are allowed" in decision.decode.held


# -- pending, failed and missing


def test_pending_groups_count_as_capacity_that_comes() -> None:
    paper = Paper.of(fast=SLOW_TOKENS)
    decision = paper.ticks(80, settle=False)
    assert decision.decode.wanted == 2
    assert "1 group is awaited" in decision.decode.held


def test_a_pending_group_that_is_overdue_no_longer_counts() -> None:
    paper = Paper.of(fast=SLOW_TOKENS)
    assert paper.ticks(100, settle=False).decode.wanted == 2
    decision = paper.ticks(20, settle=False)
    assert decision.decode.wanted == 3
    assert "not counted, since overdue: decode-2 (starting" in decision.decode.reason


def test_a_new_group_may_show_what_it_changes_before_another_one_is_added() -> None:
    paper = Paper.of(fast=SLOW_TOKENS)
    paper.ticks(4)
    paper.fast = replace(SLOW_TOKENS, itl_s=0.06)
    assert paper.ticks(60).decode.wanted == 2


def test_failed_groups_are_made_up_for_when_their_pool_is_too_small() -> None:
    paper = Paper.of(decode=3)
    paper.tick()
    learned(paper, DECODE, broke=200)
    paper.put("decode-1", GroupState.FAILED)
    assert paper.ticks(90).decode.wanted == 3
    decision = paper.ticks(20)
    assert decision.decode.wanted == 4
    assert "not counted, since overdue: decode-1 (failed" in decision.decode.reason


def test_groups_that_all_fail_do_not_grow_without_end() -> None:
    paper = Paper.of(decode=1)
    paper.put("decode-1", GroupState.FAILED)
    assert paper.ticks(3000, settle=False).decode.wanted == 2


def test_a_group_that_fails_again_and_again_stays_overdue() -> None:
    paper = Paper.of(decode=2)
    paper.tick()
    learned(paper, DECODE, broke=400)
    for _ in range(30):
        paper.put("decode-1", GroupState.FAILED)
        paper.ticks(2, settle=False)
        paper.put("decode-1", GroupState.STARTING)
        paper.ticks(2, settle=False)
    assert (paper.wanted[DECODE], "decode-1 (" in paper.state.decode.reason) == (3, True)


def test_missing_metrics_change_nothing_and_say_so() -> None:
    paper = Paper.of(prefill=3, decode=3, fast=None, slow=None, queue=None)
    decision = paper.ticks(300)
    assert (decision.prefill.wanted, decision.decode.wanted) == (3, 3)
    assert "the gateways tell nothing of their traffic yet: no group is removed" in decision.decode.held


def test_a_missing_load_removes_nothing() -> None:
    paper = Paper.of(decode=3, fast=IDLE, slow=IDLE, running=0, kv=0, silent=frozenset({"decode-2"}))
    decision = paper.ticks(300)
    assert decision.decode.wanted == 3
    assert "no load from decode-2" in decision.decode.held


def test_stale_loads_are_missing_ones() -> None:
    paper = Paper.of(decode=3, fast=IDLE, slow=IDLE, running=0, kv=0, stale_s=11)
    assert paper.ticks(300).decode.wanted == 3


def test_a_breach_that_is_seen_counts_although_other_metrics_are_missing() -> None:
    assert Paper.of(fast=SLOW_TOKENS, slow=None, queue=None, silent=frozenset({"decode-1"})).ticks(4).decode.wanted == 2


# -- the rate-based loop


def test_a_load_near_the_known_limit_adds_a_group_before_the_aim_is_missed() -> None:
    paper = Paper.of()
    paper.tick()
    learned(paper, DECODE, broke=420)
    decision = paper.tick()
    assert decision.decode.wanted == 2
    assert "400 tokens of answers/s over 120 s; a group bears 420, to be used to 75%" in decision.decode.reason


def test_a_load_within_the_band_adds_nothing() -> None:
    paper = Paper.of()
    paper.tick()
    learned(paper, DECODE, broke=500)
    assert paper.ticks(30).decode.wanted == 1


def test_a_load_that_grows_is_met_before_it_is_there() -> None:
    paper, calm = Paper.of(), Paper.of()
    for each, step in ((paper, 0.2), (calm, 0.0)):
        each.tick()
        for _ in range(60):
            learned(each, DECODE, broke=530)
            assert each.slow is not None
            each.slow = replace(each.slow, requests_per_s=(each.slow.requests_per_s or 0) + step)
            each.tick()
            each.settle()
    assert "more soon" in paper.state.decode.reason
    assert (paper.wanted[DECODE], calm.wanted[DECODE]) == (2, 1)


def test_pools_are_sized_apart() -> None:
    paper = Paper.of(prefill=4, decode=4)
    paper.tick()
    learned(paper, PREFILL, broke=600)
    learned(paper, DECODE, broke=600)
    paper.ticks(600)
    assert (paper.wanted[PREFILL], paper.wanted[DECODE]) == (4, 1)


def test_zero_traffic_leaves_the_least_and_goes_there_one_group_at_a_time() -> None:
    paper = Paper.of(prefill=3, decode=3, fast=IDLE, slow=IDLE, running=0, kv=0)
    seen = []
    for _ in range(200):
        paper.ticks(2)
        seen.append(paper.wanted[DECODE])
    assert sorted(set(seen)) == [1, 2, 3]
    assert seen.count(2) >= 29
    assert paper.wanted == {PREFILL: 1, DECODE: 1}


def test_nothing_is_removed_on_a_short_lull() -> None:
    paper = Paper.of(decode=2)
    paper.tick()
    learned(paper, DECODE, broke=300)
    for _ in range(10):
        paper.slow = paper.fast = QUIET
        paper.ticks(30)
        paper.slow = replace(QUIET, output_tokens_per_s=100.0)
        paper.ticks(30)
    assert paper.wanted[DECODE] == 2
    assert "within the last 60 s" in paper.decisions[-1].decode.held


def test_a_limit_that_was_seen_is_remembered_so_that_a_removal_is_not_tried_again_and_again() -> None:
    paper = Paper.of()
    paper.ticks(30)
    paper.fast = paper.slow = replace(SLOW_TOKENS, output_tokens_per_s=500.0)
    paper.running = 40
    paper.ticks(4)
    paper.fast = paper.slow = replace(QUIET, output_tokens_per_s=500.0)
    paper.running = 15
    assert paper.ticks(1200).decode.wanted == 2


# -- holds


def test_a_cool_down_keeps_groups_from_being_added_too_soon() -> None:
    paper = Paper.of(decode=2)
    paper.pool(DECODE, up_cooldown_s=60)
    paper.ticks(10)
    paper.fast = SLOW_TOKENS
    paper.ticks(4)
    paper.fast = QUIET
    paper.ticks(4)
    paper.fast = SLOW_TOKENS
    decision = paper.ticks(4)
    assert decision.decode.wanted == 4
    paper.ticks(10)
    assert paper.wanted[DECODE] == 4


def test_without_memory_nothing_is_removed_before_a_whole_cool_down() -> None:
    paper = Paper.of(decode=2, fast=IDLE, slow=IDLE, running=0, kv=0)
    assert paper.ticks(58).decode.wanted == 2
    paper.state = PlanState()
    decision = paper.ticks(58)
    assert decision.decode.wanted == 2
    assert "after the cool-down" in decision.decode.held
    assert paper.ticks(6).decode.wanted == 1


def test_memory_survives_as_json() -> None:
    paper = Paper.of(decode=2, fast=SLOW_TOKENS)
    paper.ticks(30)
    again = msgspec.json.decode(msgspec.json.encode(paper.state), type=PlanState)
    assert again == paper.state


def test_a_number_set_by_hand_stands_for_a_while() -> None:
    paper = Paper.of(fast=SLOW_TOKENS)
    paper.pool(DECODE, manual_hold_s=100)
    paper.ticks(4)
    paper.tick()
    paper.scale(DECODE, 1)
    decision = paper.ticks(50)
    assert decision.decode.wanted == 1
    assert "set by hand" in decision.decode.held
    assert decision.decode.reason == "decode: 1 group instead of 2: set by hand"
    assert paper.ticks(60).decode.wanted == 2


def test_a_number_by_hand_may_lie_outside_the_bounds_while_it_stands() -> None:
    paper = Paper.of()
    paper.tick()
    paper.scale(DECODE, 12)
    assert paper.ticks(800).decode.wanted == 12
    assert paper.ticks(200).decode.wanted < 12


def test_a_decision_that_was_not_written_is_not_taken_for_a_hand() -> None:
    paper = Paper.of(fast=SLOW_TOKENS, obeys=False)
    decision = paper.ticks(20)
    assert (decision.decode.wanted, decision.decode.changed) == (2, True)
    assert "by hand" not in decision.decode.reason


def test_a_hand_that_takes_a_decision_back_at_once_is_one() -> None:
    paper = Paper.of(fast=SLOW_TOKENS)
    paper.ticks(4)
    paper.by_hand = True
    paper.scale(DECODE, 1)
    assert paper.tick().decode.wanted == 1


def test_a_paused_pool_is_left_alone_and_the_other_is_not() -> None:
    paper = Paper.of(fast=replace(SLOW_TOKENS, ttft_s=5.0, ttft_kept=0.5), backlog=9000)
    paper.pool(DECODE, paused=True)
    decision = paper.ticks(10)
    assert (decision.prefill.wanted, decision.decode.wanted) == (2, 1)
    assert decision.decode.held == "decode: scaling is paused"


def test_a_pool_that_does_not_scale_by_itself_is_left_alone() -> None:
    paper = Paper.of(fast=SLOW_TOKENS)
    paper.pool(DECODE, automatic=False, min_groups=3)
    assert paper.ticks(20).decode.wanted == 1
    paper.scale(DECODE, 2)
    assert paper.ticks(2000).decode.wanted == 2
