"""How a group takes other weights, on paper: in place, and what comes of failures and changes of mind."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tandem.core import group as groups
from tandem.core.group_events import (
    Adopted,
    Desired,
    LoadWeights,
    Placed,
    RankDied,
    Released,
    RoomsClosed,
    StartRanks,
    Stopped,
    StopRanks,
    WatchRooms,
    WeightsFailed,
    WeightsLoaded,
)
from tandem.core.types import GroupSpec, GroupState
from unit.group_life import (
    LOAD,
    LOADED,
    POLICY,
    SECOND,
    SPEC,
    Life,
    loading,
    ready,
    up,
)


def test_other_weights_are_loaded_in_place_once_the_group_is_empty() -> None:
    life = ready().hear(Desired(spec=SECOND))
    assert (life.state, life.answers()) == (GroupState.CORDONED, [])
    assert life.record.group.reason == "is about to take weight version 2"
    life.later(1)
    assert (life.state, life.answers()) == (GroupState.DRAINING, [WatchRooms(epoch=1)])
    assert life.record.group.migrate_at == life.now
    life.hear(RoomsClosed(epoch=1))
    assert (life.answers(), life.record.group.loading) == ([LOAD], "2")
    life.hear(LOADED)
    group = life.record.group
    assert (life.state, life.epoch, life.answers()) == (GroupState.READY, 1, [])
    assert (group.weight_version, group.weights_path, group.loading, group.migrate_at) == ("2", "/second", "", 0)


def test_weights_that_cannot_be_taken_cost_an_epoch_and_the_old_ones_come_back() -> None:
    life = loading().hear(WeightsFailed(epoch=1, version="2", reason="no such folder"), Stopped(epoch=1))
    assert "could not take weight version 2: no such folder" in life.record.group.reason
    life.answers()
    life.hear(*up(2))
    assert life.answers() == [StartRanks(epoch=2, spec=replace(SPEC, weight_version="1"))]
    assert (life.state, life.record.group.weight_version, life.record.group.refused) == (GroupState.READY, "1", "2")
    assert life.later(1000).answers() == []


def test_a_group_that_dies_while_it_loads_does_not_try_those_weights_again() -> None:
    life = loading().hear(RankDied(epoch=1, rank=1, reason="exited"), Stopped(epoch=1), *up(2))
    assert (life.state, life.record.group.weight_version, life.record.group.refused) == (GroupState.READY, "1", "2")


def test_weights_that_were_refused_are_tried_again_when_others_were_wanted_in_between() -> None:
    life = loading().hear(WeightsFailed(epoch=1, version="2", reason="bad"), Stopped(epoch=1), *up(2))
    life.hear(Desired(spec=SPEC))
    assert (life.state, life.record.group.refused) == (GroupState.READY, "")
    assert life.hear(Desired(spec=SECOND)).state is GroupState.CORDONED


def test_a_group_that_dies_before_it_loads_comes_back_with_its_own_weights_and_takes_the_others_then() -> None:
    life = ready().hear(Desired(spec=SECOND)).later(1)
    life.hear(RankDied(epoch=1, rank=1, reason="exited"), Stopped(epoch=1), *up(2))
    assert life.asked[-1] == StartRanks(epoch=2, spec=replace(SECOND, weights_path="", weight_version="1"))
    assert (life.state, life.record.group.weight_version) == (GroupState.CORDONED, "1")
    life.later(1).hear(RoomsClosed(epoch=2))
    assert life.asked[-1] == replace(LOAD, epoch=2)


def test_a_group_restarts_with_the_weights_that_it_has_taken() -> None:
    life = loading().hear(LOADED, RankDied(epoch=1, rank=0, reason="exited"), Stopped(epoch=1), Placed(epoch=2))
    assert life.answers()[-1] == StartRanks(epoch=2, spec=SECOND)


def test_a_new_group_starts_with_the_weights_it_should_have() -> None:
    life = Life(groups.new(SECOND, policy=POLICY)).hear(Desired(spec=SECOND), Placed(epoch=1))
    assert life.answers()[-1] == StartRanks(epoch=1, spec=SECOND)
    assert not life.record.group.weight_version


def test_a_new_group_whose_weights_are_bad_starts_again_with_other_ones_when_told() -> None:
    life = Life(groups.new(SECOND, policy=POLICY)).hear(Desired(spec=SECOND), Placed(epoch=1))
    life.hear(Desired(spec=SPEC), RankDied(epoch=1, rank=0, reason="exited"), Stopped(epoch=1), Placed(epoch=2))
    assert life.answers()[-1] == StartRanks(epoch=2, spec=SPEC)


def test_a_change_of_mind_before_the_weights_are_loaded_costs_nothing() -> None:
    life = ready().hear(Desired(spec=SECOND)).later(1).hear(Desired(spec=SPEC))
    assert (life.state, life.epoch, life.answers()) == (GroupState.READY, 1, [WatchRooms(epoch=1)])
    assert life.hear(RoomsClosed(epoch=1)).answers() == []


def test_a_change_of_mind_while_they_are_loaded_loads_the_old_ones_after_them() -> None:
    life = loading().hear(Desired(spec=replace(SPEC, weight_version="1")), LOADED)
    assert life.answers() == [LoadWeights(epoch=1, path="", version="1")]
    assert life.hear(WeightsLoaded(epoch=1, path="", version="1")).state is GroupState.READY


@pytest.mark.parametrize(("spec", "path", "version"), [(SECOND, "/second", "2"), (SPEC, "", "1")])
def test_a_controller_that_comes_back_in_the_middle_of_a_load_repeats_it_or_undoes_it(
    spec: GroupSpec, path: str, version: str
) -> None:
    group = loading().record.group
    life = Life(groups.adopt(group, spec, policy=POLICY, now=500)).hear(Adopted(epoch=1, ranks=group.ranks))
    life.hear(RoomsClosed(epoch=1))
    assert life.answers() == [WatchRooms(epoch=1), LoadWeights(epoch=1, path=path, version=version)]


def test_a_group_that_should_leave_does_not_wait_for_its_weights() -> None:
    life = loading().hear(Desired(spec=replace(SECOND, draining=True, drain_deadline=1e9)))
    assert life.answers() == [StopRanks(epoch=1)]
    assert life.hear(LOADED, Stopped(epoch=1), Released()).state is GroupState.GONE


def test_a_cordoned_group_takes_its_weights_and_stays_cordoned() -> None:
    life = ready().hear(Desired(spec=replace(SECOND, cordoned=True))).later(1).hear(RoomsClosed(epoch=1), LOADED)
    assert (life.state, life.record.group.reason) == (GroupState.CORDONED, "cordoned")
