"""A pool's groups on paper: how many, of which revision, in which order; and what follows from a failure."""

from __future__ import annotations

import pytest
from rollout_world import RULES, D, World, change, member, shrunk, until_canary, world

from tandem.core.rollout_types import Create, Member, Phase, Pool, Remove
from tandem.core.types import GroupState

# -- the number


def test_a_new_pool_gets_all_its_groups_at_once() -> None:
    fleet = World({D: Pool(role=D, groups=3, revision="A", rules=RULES)})
    assert fleet.step() == [Create(group=f"decode-{number}", revision="A") for number in range(3)]


def test_a_new_group_gets_the_lowest_number_that_is_free() -> None:
    fleet = world(decode=3)
    fleet.gone("decode-1")
    assert fleet.step() == [Create(group="decode-1", revision="A")]


def test_the_number_of_a_group_that_still_leaves_is_not_free() -> None:
    fleet = world(decode=3)
    fleet.put("decode-1", leaving=True)
    assert fleet.step() == [Create(group="decode-3", revision="A")]


@pytest.mark.parametrize(
    "loses",
    [
        member("decode-0", state=GroupState.FAILED),
        member("decode-0", state=GroupState.STARTING, running=0),
        member("decode-0", lost=True),
        member("decode-0", canary_failed="it said Rome"),
        member("decode-0", revision="old", running=9),
        member("decode-0", state=GroupState.CORDONED, running=9),
        member("decode-0", running=1, waiting=3),
    ],
)
def test_the_group_goes_that_has_the_least_to_lose(loses: Member) -> None:
    busy = [member(f"decode-{number}", running=5) for number in (1, 2)]
    assert shrunk(*busy, loses, to=2) == ["decode-0"]


def test_among_equals_the_highest_number_goes() -> None:
    assert shrunk(member("decode-2"), member("decode-10"), member("decode-9"), to=1) == ["decode-10", "decode-9"]


def test_one_that_leaves_already_counts_as_gone() -> None:
    assert shrunk(member("decode-0"), member("decode-1", leaving=True), to=1) == []


def test_with_none_wanted_all_go_and_the_last_pair_too() -> None:
    fleet = world(1, 1)
    fleet.want(D, groups=0)
    assert [action.group for action in fleet.step()] == ["decode-0"]
    assert fleet.status(D).reason == "NoGroupWanted"


# -- a change


def test_a_change_begins_with_one_group() -> None:
    fleet = world(decode=3, max_surge=3)
    change(fleet, D)
    assert fleet.step() == [Create(group="decode-3", revision="B", canary=True)]
    assert fleet.status(D).message == "decode-3 is the first group of revision B: starting"


def test_the_others_follow_when_it_has_served_long_enough() -> None:
    fleet = until_canary()
    fleet.now += 29
    assert fleet.step() == []
    fleet.now += 1
    assert fleet.step() == [
        Remove(group="decode-2", reason="has revision A, and B is wanted"),
        Create(group="decode-4", revision="B"),
    ]


def test_a_canary_that_failed_once_begins_to_count_anew() -> None:
    fleet = until_canary()
    fleet.now += 29
    fleet.fail("decode-3")
    fleet.step()
    fleet.serve("decode-3")
    fleet.now += 29
    assert fleet.step() == []


def test_a_canary_whose_known_prompt_is_not_answered_has_not_passed() -> None:
    fleet = until_canary()
    fleet.put("decode-3", checked=False)
    fleet.now += 60
    assert fleet.step() == []
    assert (
        fleet.status(D).message
        == "decode-3 is the first group of revision B, and has not answered the known prompt yet"
    )


def test_in_the_end_all_groups_have_the_new_revision() -> None:
    fleet = world(decode=3)
    change(fleet, D)
    fleet.run()
    assert (fleet.revisions(D), fleet.status(D).phase) == ("B B B", Phase.COMPLETE)


def test_without_surge_a_group_goes_first_and_the_new_one_takes_its_place() -> None:
    fleet = world(decode=3, max_surge=0, max_unavailable=1)
    change(fleet, D)
    assert fleet.step() == [
        Remove(group="decode-2", reason="makes room for the first group of revision B"),
        Create(group="decode-3", revision="B", canary=True),
    ]


def test_more_surge_means_more_groups_at_a_time_once_the_canary_has_passed() -> None:
    fleet = until_canary(max_surge=3)
    fleet.now += 30
    fleet.step()
    assert fleet.revisions(D).split().count("B") == 3


def test_a_lost_group_comes_back_with_the_old_revision_while_the_canary_has_not_passed() -> None:
    fleet = until_canary()
    fleet.gone("decode-1")
    assert fleet.step() == [Create(group="decode-1", revision="A")]


def test_a_scale_up_during_the_canary_adds_groups_of_the_old_revision() -> None:
    fleet = until_canary()
    fleet.want(D, groups=5)
    assert {action.revision for action in fleet.step() if isinstance(action, Create)} == {"A"}


def test_a_scale_down_during_the_canary_leaves_it_alone() -> None:
    fleet = until_canary()
    fleet.want(D, groups=1)
    fleet.step()
    assert fleet.revisions(D) == "A B"


def test_a_second_change_takes_the_place_of_the_first() -> None:
    fleet = until_canary()
    change(fleet, D, to="C")
    fleet.step()
    assert fleet.revisions(D) == "A A A C"


def test_a_change_taken_back_removes_its_canary() -> None:
    fleet = until_canary()
    change(fleet, D, to="A")
    fleet.step()
    assert (fleet.revisions(D), fleet.status(D).phase) == ("A A A", Phase.COMPLETE)


def test_a_pool_that_had_no_group_begins_with_the_canary_alone() -> None:
    fleet = world(decode=3)
    fleet.want(D, groups=0)
    fleet.run(3)
    change(fleet, D)
    fleet.step()
    fleet.want(D, groups=3)
    assert fleet.step() == [Create(group="decode-0", revision="B", canary=True)]
    fleet.run()
    assert fleet.revisions(D) == "B B B"


# -- too few nodes


def test_a_canary_that_finds_no_nodes_says_so_and_waits() -> None:
    fleet = world(decode=3)
    fleet.nodes = 5
    change(fleet, D)
    fleet.step()
    fleet.place()
    fleet.now += 10_000
    assert fleet.step() == []
    assert fleet.status(D).reason == "WaitingForNodes"
    assert "decode-3 waits for 1 node with 1 GPU each; free some, or allow maxUnavailable 1" in fleet.status(D).message


def test_a_canary_that_finds_no_nodes_gets_those_of_another_group_if_one_may_be_missing() -> None:
    fleet = world(decode=3, max_unavailable=1)
    fleet.nodes = 5
    change(fleet, D)
    fleet.step()
    fleet.place()
    assert [action.group for action in fleet.step()] == ["decode-2"]
    fleet.run()
    assert fleet.revisions(D) == "B B B"


# -- failures


@pytest.mark.parametrize("how", ["fails", "late", "wrong"])
def test_a_canary_that_fails_goes_and_the_old_groups_stay(how: str) -> None:
    fleet = until_canary()
    if how == "fails":
        fleet.fail("decode-3", times=3)
    elif how == "late":
        fleet.put("decode-3", state=GroupState.STARTING, ready_since=None)
        fleet.now += 100
    else:
        fleet.put("decode-3", canary_failed="it said Rome")
    assert [action.group for action in fleet.step()] == ["decode-3"]
    assert (fleet.revisions(D), fleet.status(D).phase) == ("A A A", Phase.ROLLED_BACK)


def test_what_has_failed_is_told_with_the_reason_and_the_way_on() -> None:
    fleet = until_canary()
    fleet.fail("decode-3", times=3)
    fleet.step()
    assert fleet.status(D).message == (
        "revision B failed: decode-3 failed 3 times in a row: rank 1 died; 3 groups of revision A again, 3 ready. "
        "It is not tried again: change the template to go on"
    )


def test_without_surge_the_old_group_comes_back() -> None:
    fleet = until_canary(max_surge=0, max_unavailable=1)
    fleet.fail("decode-3", times=3)
    fleet.step()
    fleet.run(5)
    assert fleet.revisions(D) == "A A A"


def test_without_rollback_everything_stays_as_it_is() -> None:
    fleet = until_canary(rollback=False)
    fleet.fail("decode-3", times=3)
    assert fleet.step() == []
    assert (fleet.revisions(D), fleet.status(D).phase) == ("A A A B", Phase.STOPPED)


def test_without_rollback_a_lost_group_still_comes_back() -> None:
    fleet = until_canary(rollback=False)
    fleet.fail("decode-3", times=3)
    fleet.step()
    fleet.gone("decode-0")
    assert fleet.step() == [Create(group="decode-0", revision="A")]


def test_a_lost_node_says_nothing_about_the_revision() -> None:
    fleet = until_canary()
    fleet.fail("decode-3", times=3)
    fleet.put("decode-3", lost=True)
    fleet.step()
    assert fleet.memory(D).failed == ""


def test_a_revision_that_failed_is_not_tried_again() -> None:
    fleet = until_canary()
    fleet.fail("decode-3", times=3)
    fleet.run(5)
    change(fleet, D, to="A")
    fleet.run(5)
    change(fleet, D, to="B")
    assert fleet.step() == []
    assert fleet.status(D).phase is Phase.ROLLED_BACK


def test_another_revision_is_tried_after_one_that_failed() -> None:
    fleet = until_canary()
    fleet.fail("decode-3", times=3)
    fleet.run(5)
    change(fleet, D, to="C")
    fleet.run()
    assert (fleet.revisions(D), fleet.status(D).phase) == ("C C C", Phase.COMPLETE)


def test_a_later_group_that_fails_stops_the_change_until_it_is_ready() -> None:
    fleet = until_canary()
    fleet.now += 30
    fleet.step()
    fleet.empty()
    fleet.fail("decode-4", times=3)
    assert fleet.step() == []
    assert (fleet.status(D).reason, fleet.revisions(D)) == ("GroupFailed", "A A B B")
    fleet.put("decode-4", failures=0)
    fleet.run()
    assert fleet.revisions(D) == "B B B"


def test_when_no_new_group_serves_any_more_the_change_goes_back() -> None:
    fleet = until_canary()
    fleet.now += 30
    fleet.step()
    fleet.fail("decode-3", times=3)
    fleet.run(6)
    assert (fleet.revisions(D), fleet.status(D).phase) == ("A A A", Phase.ROLLED_BACK)


def test_a_new_pool_that_does_not_come_up_has_nothing_to_go_back_to() -> None:
    fleet = World({D: Pool(role=D, groups=1, revision="A", rules=RULES)})
    fleet.step()
    fleet.fail("decode-0", times=9)
    assert fleet.step() == []
    assert fleet.status(D).message == "0 of 1 group ready; decode-0 failed 9 times in a row: rank 1 died"


def test_groups_that_never_served_are_all_replaced_at_once() -> None:
    fleet = World({D: Pool(role=D, groups=2, revision="A", rules=RULES)})
    fleet.step()
    change(fleet, D)
    fleet.step()
    assert fleet.revisions(D) == "B B"


# -- pause


def test_a_paused_pool_keeps_its_number_but_begins_no_change() -> None:
    fleet = world(decode=3)
    fleet.want(D, paused=True)
    change(fleet, D)
    fleet.gone("decode-1")
    assert fleet.step() == [Create(group="decode-1", revision="A")]
    assert fleet.status(D).reason == "Paused"


def test_a_paused_pool_that_is_new_gets_its_groups() -> None:
    fleet = World({D: Pool(role=D, groups=2, revision="A", rules=RULES, paused=True)})
    fleet.step()
    assert fleet.revisions(D) == "A A"


def test_a_change_that_is_paused_in_the_middle_goes_on_afterwards() -> None:
    fleet = until_canary()
    fleet.want(D, paused=True)
    fleet.run(6)
    assert fleet.revisions(D) == "A A A B"
    fleet.want(D, paused=False)
    fleet.run()
    assert fleet.revisions(D) == "B B B"


def test_while_other_weights_are_taken_no_change_goes_on() -> None:
    fleet = world(decode=3)
    fleet.want(D, held="the fleet takes other weights")
    change(fleet, D)
    assert fleet.step() == []
    assert fleet.status(D).message.startswith("the fleet takes other weights; 0 of 3 groups have revision B")
