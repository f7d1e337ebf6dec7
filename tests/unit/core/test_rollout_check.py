"""The first group of a revision serves nobody until it has answered a known prompt; until then it counts as nothing."""

from __future__ import annotations

import pytest
from rollout_world import D, P, World, change, world

from tandem.core.group_check import CheckVerdict, GroupCheck
from tandem.core.rollout_check import AGAIN_S, SILENCES, Trial, is_checked, is_due, note
from tandem.core.rollout_types import Create, Memory, Phase
from tandem.core.types import GroupState

OK = GroupCheck(verdict=CheckVerdict.OK, epoch=2)
WRONG = GroupCheck(verdict=CheckVerdict.WRONG, epoch=2, message="it says Rome")
SILENT = GroupCheck(verdict=CheckVerdict.SILENT, epoch=2, message="no answer within 40 s")
ALONE = GroupCheck(verdict=CheckVerdict.ALONE, epoch=2, message="answers alone")
UNKNOWN = GroupCheck(verdict=CheckVerdict.UNKNOWN, message="is starting")
CORDONED, READY = GroupState.CORDONED, GroupState.READY


def noted(*checks: GroupCheck) -> Trial:
    trial = Trial()
    for check in checks:
        trial = note(trial, check)
    return trial


# -- what is known after some answers


def test_one_right_answer_is_enough() -> None:
    assert is_checked(noted(UNKNOWN, SILENT, OK), 2, CORDONED)


@pytest.mark.parametrize("state", [GroupState.FAILED, GroupState.STARTING])
def test_an_answer_is_of_engines_that_run(state: GroupState) -> None:
    assert not is_checked(noted(OK), 2, state)
    assert not is_checked(noted(OK), 3, CORDONED)


def test_a_wrong_answer_is_not_taken_back() -> None:
    assert noted(WRONG, OK).failure == "it says Rome"


def test_silence_in_a_row_is_a_failure_and_what_says_nothing_does_not_end_the_row() -> None:
    assert noted(SILENT, UNKNOWN, SILENT).failure == ""
    assert noted(SILENT, UNKNOWN, SILENT, SILENT).failure == f"no answer in {SILENCES} tries; no answer within 40 s"


def test_silence_counts_anew_after_an_answer_and_after_a_restart() -> None:
    again = GroupCheck(verdict=CheckVerdict.SILENT, epoch=3)
    assert noted(SILENT, SILENT, OK, SILENT).failure == ""
    assert noted(SILENT, SILENT, again).silences == 1


def test_an_answer_alone_ends_a_row_of_silence() -> None:
    assert noted(SILENT, SILENT, ALONE, SILENT).failure == ""


def test_a_fleet_that_lost_its_state_counts_epochs_anew() -> None:
    assert is_checked(noted(SILENT, GroupCheck(verdict=CheckVerdict.OK, epoch=1)), 1, CORDONED)
    wrong = GroupCheck(verdict=CheckVerdict.WRONG, epoch=1, message="it says Rome")
    assert noted(OK, wrong).failure == "it says Rome"


def test_an_answer_alone_will_do_where_nobody_wants_a_partner() -> None:
    assert not is_checked(noted(ALONE), 2, CORDONED)
    assert is_checked(noted(ALONE), 2, CORDONED, alone=True)


@pytest.mark.parametrize(
    ("trial", "state", "asked_at", "due"),
    [
        (Trial(), CORDONED, 0.0, True),
        (Trial(), READY, 0.0, True),
        (Trial(), GroupState.STARTING, 0.0, False),
        (noted(UNKNOWN), CORDONED, 100 - AGAIN_S + 1, False),
        (noted(UNKNOWN), CORDONED, 100 - AGAIN_S, True),
        (noted(UNKNOWN), CORDONED, 5000.0, True),  # the clock was set back
        (noted(WRONG), CORDONED, 0.0, False),
    ],
)
def test_a_group_is_asked_when_it_is_up_and_not_too_often(
    trial: Trial, state: GroupState, asked_at: float, due: bool
) -> None:
    assert is_due(trial, state, asked_at, 100.0) is due


# -- in a rollout


def asking(prefill: int = 2, decode: int = 2, **rules: int) -> World:
    fleet = world(prefill, decode, **rules)
    fleet.prompts = True
    return fleet


def up(fleet: World) -> None:
    """What was decided is done, and the groups that were made are up."""
    fleet.step()
    fleet.empty()
    fleet.step()
    fleet.place()
    fleet.serve()


def test_a_canary_that_has_not_answered_counts_as_nothing() -> None:
    fleet = asking()
    change(fleet, D)
    up(fleet)
    fleet.now += 500
    assert fleet.step() == []
    assert [one.group for one in fleet.ready(D)] == ["decode-0", "decode-1"]
    assert fleet.status(D).message == (
        "decode-2 is the first group of revision B; it serves nobody until it has answered a known prompt"
    )


def test_the_canary_time_counts_from_the_answer() -> None:
    fleet = asking()
    change(fleet, D)
    up(fleet)
    fleet.now += 500
    fleet.answer()
    fleet.now += 29
    assert fleet.step() == []
    fleet.now += 1
    assert Create(group="decode-3", revision="B") in fleet.step()


def test_only_the_first_group_of_a_revision_is_asked() -> None:
    fleet = asking(decode=3)
    change(fleet, D)
    fleet.run()
    assert [(one.group, one.canary) for one in fleet.alive(D)].count(("decode-3", True)) == 1
    assert sum(one.canary for one in fleet.alive(D)) == 1


def test_a_wrong_answer_ends_the_change() -> None:
    fleet = asking()
    change(fleet, D)
    up(fleet)
    fleet.answer(wrong="it says Rome")
    fleet.run()
    assert (fleet.revisions(D), fleet.status(D).phase) == ("A A", Phase.ROLLED_BACK)
    assert "decode-2 failed the known prompt: it says Rome" in fleet.status(D).message


@pytest.mark.parametrize("surge", [0, 1])
def test_two_pools_that_change_to_another_format_at_once_check_each_other(surge: int) -> None:
    fleet = asking(max_surge=surge, max_unavailable=1 - surge)
    change(fleet, P, D, kv_format="kv2")
    fleet.run(30)
    assert (fleet.revisions(P), fleet.revisions(D)) == ("B B", "B B")


def test_of_two_canaries_only_the_wrong_one_fails_and_the_other_tries_again_with_its_successor() -> None:
    fleet = asking()
    change(fleet, P, D, kv_format="kv2")
    up(fleet)
    fleet.answer("decode-2", wrong="it says Rome")
    fleet.run(5)
    assert (fleet.revisions(P), fleet.revisions(D)) == ("A A", "A A")
    assert (fleet.memory(D).failed, fleet.memory(D).failed_with) == ("B", "")
    assert (fleet.memory(P).failed, fleet.memory(P).failed_with) == ("B", "B")
    change(fleet, D, to="C", kv_format="kv2")
    fleet.run(30)
    assert (fleet.revisions(P), fleet.revisions(D)) == ("B B", "C C")


def test_a_new_format_in_one_pool_alone_waits_for_a_partner_to_be_asked_with() -> None:
    fleet = asking()
    change(fleet, D, kv_format="kv2")
    fleet.run(2)
    assert fleet.status(D).reason == "WaitingForPair"
    assert "decode-2 is ready, but no ready prefill group has its" in fleet.status(D).message
    assert [one.state for one in fleet.alive(D) if one.canary] == [CORDONED]


def test_two_pools_that_begin_dark_check_each_other() -> None:
    fleet = asking()
    for role in (P, D):
        fleet.want(role, groups=0)
    fleet.run(3)
    change(fleet, P, D, kv_format="kv2")
    fleet.step()
    for role in (P, D):
        fleet.want(role, groups=2)
    fleet.run()
    assert (fleet.revisions(P), fleet.revisions(D)) == ("B B", "B B")


def test_a_canary_that_was_replaced_by_another_revision_is_not_let_go() -> None:
    fleet = asking()
    change(fleet, D)
    up(fleet)
    change(fleet, D, to="C")
    fleet.want(D, paused=True)  # so it stays
    fleet.step()
    assert fleet.find("decode-2").state is CORDONED


def test_groups_of_a_revision_that_has_passed_serve_on_when_it_is_wanted_again() -> None:
    fleet = asking(decode=3)
    change(fleet, D)
    fleet.run()
    change(fleet, D, to="C")
    up(fleet)
    change(fleet, D, to="B")
    fleet.fail("decode-3")  # the canary of that time: it was asked in another epoch
    fleet.step()
    fleet.serve("decode-3")
    assert fleet.find("decode-3").state is READY


def test_without_a_memory_a_canary_is_still_held_back() -> None:
    fleet = asking()
    change(fleet, D)
    up(fleet)
    fleet.want(D, memory=Memory())
    fleet.cordon_or_not()
    fleet.step()
    assert fleet.find("decode-2").state is CORDONED
    assert fleet.memory(D).good == "A"
