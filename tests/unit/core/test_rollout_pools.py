"""Both pools of a fleet on paper: no removal of ours leaves it without a complete pair; and what is remembered."""

from __future__ import annotations

import pytest
from rollout_world import D, P, change, member, until_canary, world

from tandem.core.rollout import roll, templates_to_keep
from tandem.core.rollout_pairs import safe_to_remove
from tandem.core.rollout_types import Memory, Phase, Pool

# -- both pools


def test_the_last_complete_pair_is_not_safe_to_remove() -> None:
    groups = [
        member("prefill-0", kv_format="kv1"),
        member("decode-0", kv_format="kv1"),
        member("decode-1", kv_format="kv2"),
    ]
    assert [safe_to_remove(groups, one.group) for one in groups] == [False, False, True]


def test_groups_of_other_weights_make_no_pair() -> None:
    groups = [
        member("prefill-0", weight_version="1"),
        member("prefill-1", weight_version="2"),
        member("decode-0", weight_version="1"),
    ]
    assert [safe_to_remove(groups, one.group) for one in groups] == [False, True, False]


def test_where_no_pair_is_complete_every_group_may_go() -> None:
    assert safe_to_remove([member("prefill-0")], "prefill-0")


def test_a_canary_of_another_kv_format_waits_for_one_of_the_other_role() -> None:
    fleet = world()
    change(fleet, D, kv_format="kv2")
    fleet.run(2)
    assert (fleet.revisions(D), fleet.status(D).reason) == ("A A B", "WaitingForPair")
    assert 'no ready prefill group has its KV format "kv2"' in fleet.status(D).message


@pytest.mark.parametrize(("prefill", "decode"), [(1, 1), (2, 4), (3, 2), (1, 5)])
def test_when_both_pools_change_their_kv_format_capacity_moves_over_in_step(prefill: int, decode: int) -> None:
    fleet = world(prefill, decode)
    change(fleet, P, D, kv_format="kv2")
    for _ in range(100):
        fleet.step()
        assert fleet.capacity() >= 1
        fleet.empty()
        fleet.place()
        fleet.serve()
        fleet.now += 40
    assert (set(fleet.revisions(P).split()), set(fleet.revisions(D).split())) == ({"B"}, {"B"})


def test_if_one_pool_goes_back_the_other_goes_back_with_it() -> None:
    fleet = world()
    change(fleet, P, D, kv_format="kv2")
    fleet.step()
    fleet.place()
    fleet.serve()
    fleet.fail("prefill-2", times=3)
    fleet.step()
    assert (fleet.revisions(P), fleet.revisions(D)) == ("A A", "A A")
    assert fleet.status(D).reason == "PartnerFailed"


def test_the_pool_that_went_back_with_the_other_tries_again_when_that_has_another_revision() -> None:
    fleet = world()
    change(fleet, P, D, kv_format="kv2")
    fleet.step()
    fleet.place()
    fleet.serve()
    fleet.fail("prefill-2", times=3)
    fleet.run(5)
    change(fleet, P, to="C", kv_format="kv2")
    fleet.run()
    assert (fleet.revisions(P), fleet.revisions(D)) == ("C C", "B B")


def test_a_pool_that_was_through_already_goes_back_too_when_the_other_fails_late() -> None:
    fleet = world(3, 1, max_unavailable=2)
    change(fleet, P, D, kv_format="kv2")
    while fleet.revisions(D) != "B":
        fleet.step()
        fleet.empty()
        fleet.serve("prefill-3", *(one.group for one in fleet.alive(D)))
        fleet.now += 40
    fleet.put("prefill-3", canary_failed="it said Rome")
    fleet.run()
    assert (fleet.revisions(P), fleet.revisions(D)) == ("A A A", "A")


def test_the_only_pair_cannot_be_replaced_without_surge_and_says_so() -> None:
    fleet = world(1, 1, max_surge=0, max_unavailable=1)
    change(fleet, D)
    assert fleet.step() == []
    assert (fleet.status(D).phase, fleet.status(D).reason) == (Phase.STOPPED, "WouldPause")


def test_two_pools_of_one_role_are_no_fleet() -> None:
    with pytest.raises(ValueError, match="two pools of one role"):
        roll([Pool(role=D, groups=1, revision="A")] * 2, 0.0)


# -- memory


def test_without_a_memory_a_change_goes_on_where_it_was() -> None:
    fleet = until_canary()
    fleet.now += 30
    fleet.want(D, memory=Memory())
    fleet.step()
    assert (fleet.memory(D).good, fleet.memory(D).passed) == ("A", True)


def test_the_templates_of_the_good_and_of_the_wanted_revision_are_kept() -> None:
    assert templates_to_keep(until_canary().memory(D)) == {"A", "B"}
