"""A change of the weights on paper: prefill and decode of different ones never pair, so both pools move in step."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from rollout_world import D, P, World, change, world

from tandem.core.rollout_types import Memory, Phase


def test_both_pools_move_to_other_weights_and_capacity_moves_over_in_step() -> None:
    fleet = world(2, 3, weights="w1")
    change(fleet, P, D, weights="w2")
    for _ in range(100):
        fleet.step()
        assert fleet.capacity() >= 1
        fleet.empty()
        fleet.place()
        fleet.serve()
        fleet.now += 40
    assert {one.weight_version for role in (P, D) for one in fleet.alive(role)} == {"w2"}
    assert {fleet.status(role).phase for role in (P, D)} == {Phase.COMPLETE}


def test_new_weights_in_one_pool_alone_wait_for_the_other() -> None:
    fleet = world(weights="w1")
    change(fleet, D, weights="w2")
    fleet.run(2)
    assert (fleet.revisions(D), fleet.status(D).reason) == ("A A B", "WaitingForPair")
    assert 'has its KV format "kv1" and weights "w2"' in fleet.status(D).message


def failed_prefill(fleet: World) -> World:
    """Both pools change their weights, and prefill's first new group does not start."""
    change(fleet, P, D, weights="w2")
    fleet.step()
    fleet.place()
    fleet.serve()
    fleet.fail("prefill-2", times=3)
    fleet.step()
    return fleet


def test_if_one_pool_goes_back_to_the_old_weights_the_other_goes_back_with_it() -> None:
    fleet = failed_prefill(world(weights="w1"))
    assert (fleet.revisions(P), fleet.revisions(D)) == ("A A", "A A")
    assert (fleet.status(P).reason, fleet.status(D).reason) == ("RevisionFailed", "PartnerFailed")


def test_a_pool_that_changes_something_else_does_not_go_back_with_the_other() -> None:
    fleet = world(weights="w1")
    change(fleet, D, to="C", weights="w1")
    fleet.run(1)
    change(fleet, P, weights="w1")
    fleet.step()
    fleet.fail("prefill-2", times=3)
    fleet.run(10)
    assert (fleet.revisions(P), fleet.revisions(D)) == ("A A", "C C")


def older(memory: Memory) -> Memory:
    """As an operator wrote it that knew nothing of weights."""
    return replace(memory, good_weights="", target_weights="")


@pytest.mark.parametrize("looks", [0, 1])
def test_a_memory_that_knows_no_weights_does_for_the_next_change(looks: int) -> None:
    fleet = world(weights="w1")
    for role in (P, D):
        fleet.want(role, memory=older(fleet.memory(role)))
    for _ in range(looks):
        fleet.step()
        assert fleet.memory(P).good_weights == "w1"
    failed_prefill(fleet)
    assert fleet.revisions(P) == "A A"
    if looks:
        assert fleet.revisions(D) == "A A"
