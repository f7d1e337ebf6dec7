"""The life of a group, on paper: what happens to it, and what it asks for."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from tandem.core import group as groups
from tandem.core.group_events import (
    Adopted,
    Desired,
    Forget,
    Place,
    Placed,
    RankDied,
    Release,
    Released,
    RoomsClosed,
    StartFailed,
    StartRanks,
    Stopped,
    StopRanks,
    Tick,
    Waiting,
    WatchRooms,
)
from tandem.core.types import GroupState
from unit.group_life import (
    POLICY,
    SERVICE,
    SPEC,
    TIMES,
    Life,
    draining,
    ready,
    starting,
    up,
)


def test_a_group_has_the_revision_that_it_was_started_with() -> None:
    first, second = replace(SPEC, revision="a", kv_format="fp8"), replace(SPEC, revision="b", kv_format="bf16")
    life = Life(groups.new(first, policy=POLICY)).hear(Desired(spec=first))
    assert (life.record.group.revision, life.record.group.kv_format) == ("a", "fp8")
    life.hear(Desired(spec=second), Placed(epoch=1))
    (asked,) = [action for action in life.answers() if isinstance(action, StartRanks)]
    assert (asked.spec.revision, life.record.group.revision, life.record.group.kv_format) == ("b", "b", "bf16")
    life.hear(Desired(spec=first))
    assert (life.record.group.epoch, life.record.group.revision) == (1, "b")


def test_a_wanted_group_is_placed_then_started_then_ready() -> None:
    life = starting()
    assert life.answers() == [Place(epoch=1, spec=SPEC)]
    life.hear(Placed(epoch=1))
    assert life.answers() == [StartRanks(epoch=1, spec=SPEC)]
    life.hear(*up(1)[1:])
    assert life.answers() == []
    assert life.state is GroupState.READY
    assert life.record.group.url == SERVICE.url
    assert [rank.pid for rank in life.record.group.ranks] == [10, 11]


def test_it_is_not_ready_before_the_last_rank() -> None:
    assert starting().hear(*up(1)[:-1]).state is GroupState.STARTING


def test_a_group_without_nodes_says_what_it_waits_for_and_never_gives_up() -> None:
    life = starting().hear(Waiting(epoch=1, reason="waits for 2 nodes")).later(100_000)
    assert life.state is GroupState.STARTING
    assert life.record.group.reason == "waits for 2 nodes"


def test_any_ranks_death_stops_the_whole_group() -> None:
    life = ready().hear(RankDied(epoch=1, rank=1, reason="was killed by SIGKILL"))
    assert life.state is GroupState.FAILED
    assert life.answers() == [StopRanks(epoch=1)]
    assert life.record.group.reason == "rank 1 was killed by SIGKILL; restarts at epoch 2 (failure 1 in a row)"


def test_the_group_restarts_at_the_next_epoch_once_everything_old_has_stopped() -> None:
    life = ready().hear(RankDied(epoch=1, rank=0, reason="exited with code 1"))
    assert life.answers() == [StopRanks(epoch=1)]
    assert life.record.group.url == SERVICE.url
    life.hear(Stopped(epoch=1))
    assert life.answers() == [Place(epoch=2, spec=SPEC)]
    assert life.record.group.url == ""
    assert life.record.group.reason == "restarts, since rank 0 exited with code 1"
    assert life.hear(*up(2)).state is GroupState.READY
    assert life.record.group.reason == ""


def test_restarts_in_a_row_wait_longer_and_longer_up_to_a_limit() -> None:
    life, waits = starting(), []
    for epoch in range(1, 8):
        life.hear(Placed(epoch=epoch), RankDied(epoch=epoch, rank=0, reason="exited"), Stopped(epoch=epoch))
        due = groups.wake_at(life.record)
        waits.append(0 if due is None else due - life.now)
        if due is not None:
            life.later(due - life.now)
        assert life.epoch == epoch + 1
    assert waits == [0, 1, 2, 4, 8, 8, 8]


def test_a_group_that_was_ready_for_long_restarts_at_once_whatever_was_before() -> None:
    life = starting()
    for epoch in (1, 2, 3):
        life.hear(Placed(epoch=epoch), StartFailed(epoch=epoch, reason="no"), Stopped(epoch=epoch)).later(10)
    life.hear(*up(4)).later(POLICY.stable).hear(RankDied(epoch=4, rank=0, reason="exited"), Stopped(epoch=4))
    assert (life.state, life.epoch) == (GroupState.STARTING, 5)


def test_a_start_that_takes_too_long_fails_and_names_the_late_rank() -> None:
    life = starting().hear(*up(1)[:-1]).later(POLICY.start)
    assert life.state is GroupState.FAILED
    assert "was not ready after 30 s: waited for rank 0" in life.record.group.reason


def test_what_an_old_epoch_says_changes_nothing() -> None:
    life = ready().hear(RankDied(epoch=1, rank=0, reason="exited"), Stopped(epoch=1), *up(2))
    before = life.record
    life.hear(*up(1), RankDied(epoch=1, rank=1, reason="late"), Stopped(epoch=1), RoomsClosed(epoch=1))
    assert life.record is before


def test_a_cordon_comes_and_goes() -> None:
    life = ready().hear(Desired(spec=replace(SPEC, cordoned=True)))
    assert life.state is GroupState.CORDONED
    assert life.hear(Desired(spec=SPEC)).state is GroupState.READY
    assert life.answers() == []


def test_a_drain_cordons_first_and_looks_for_rooms_only_when_every_gateway_knows() -> None:
    life = ready().hear(Desired(spec=replace(SPEC, draining=True, drain_deadline=TIMES["deadline"])))
    assert (life.state, life.answers()) == (GroupState.CORDONED, [])
    assert groups.wake_at(life.record) == life.now + POLICY.settle
    life.later(POLICY.settle)
    assert (life.state, life.answers()) == (GroupState.DRAINING, [WatchRooms(epoch=1)])


def test_a_drained_group_stops_gives_its_nodes_back_and_is_forgotten() -> None:
    life = draining().hear(RoomsClosed(epoch=1))
    assert life.answers() == [StopRanks(epoch=1)]
    life.hear(Stopped(epoch=1))
    assert life.answers() == [Release()]
    life.hear(Released())
    assert (life.state, life.answers()) == (GroupState.GONE, [Forget(epoch=1)])


def test_a_drain_ends_at_its_deadline_with_rooms_still_open() -> None:
    life = draining()
    life.later(TIMES["deadline"] - life.now)
    assert life.answers() == [StopRanks(epoch=1)]
    assert life.record.group.reason == "stopped at its drain deadline"


def test_a_group_that_dies_while_it_drains_is_not_restarted() -> None:
    life = draining().hear(RankDied(epoch=1, rank=0, reason="exited"), Stopped(epoch=1), Released())
    assert (life.state, life.epoch) == (GroupState.GONE, 1)


def test_a_group_that_never_served_leaves_without_waiting() -> None:
    life = starting().hear(Placed(epoch=1), Desired(spec=replace(SPEC, draining=True, drain_deadline=1e9)))
    assert life.answers()[-1] == StopRanks(epoch=1)


def test_a_removed_group_stops_at_once() -> None:
    life = ready().hear(Desired(spec=None))
    assert (life.state, life.answers()) == (GroupState.DRAINING, [StopRanks(epoch=1)])
    assert life.hear(Stopped(epoch=1), Released()).state is GroupState.GONE


def test_another_shape_means_other_nodes_and_the_next_epoch() -> None:
    wide = replace(SPEC, nodes=4)
    life = ready().hear(Desired(spec=wide), Stopped(epoch=1), Released())
    assert life.answers() == [StopRanks(epoch=1), Release(), Place(epoch=2, spec=wide)]
    assert len(life.record.group.ranks) == 4


def test_a_name_that_was_used_before_goes_on_with_the_next_epoch() -> None:
    assert Life(groups.new(SPEC, policy=POLICY, epoch=7)).hear(Desired(spec=SPEC)).epoch == 8


def test_a_controller_that_comes_back_adopts_a_living_group_and_asks_for_nothing() -> None:
    group = ready().record.group
    life = Life(groups.adopt(group, SPEC, policy=POLICY, now=500)).hear(Adopted(epoch=1, ranks=group.ranks))
    assert (life.record.group, life.answers()) == (group, [])


def test_a_controller_that_comes_back_with_a_clock_behind_the_last_ones_does_not_wait_for_that_time() -> None:
    life = ready().hear(Desired(spec=replace(SPEC, draining=True, drain_deadline=TIMES["deadline"])))
    assert life.state is GroupState.CORDONED
    life = Life(groups.adopt(life.record.group, life.record.spec, policy=POLICY, now=40), now=40)
    life.hear(Adopted(epoch=1, ranks=life.record.group.ranks)).later(POLICY.settle)
    assert life.state is GroupState.DRAINING


def test_a_controller_that_comes_back_restarts_a_group_with_a_rank_that_it_cannot_find() -> None:
    life = Life(groups.adopt(ready().record.group, SPEC, policy=POLICY, now=500))
    life.hear(RankDied(epoch=1, rank=1, reason="cannot be found"), Stopped(epoch=1))
    assert life.answers() == [StopRanks(epoch=1), Place(epoch=2, spec=SPEC)]


@pytest.mark.parametrize("state", [GroupState.STARTING, GroupState.READY, GroupState.DRAINING, GroupState.FAILED])
def test_a_controller_that_comes_back_lets_go_of_a_group_that_nobody_wants_any_more(state: GroupState) -> None:
    life = Life(groups.adopt(replace(ready().record.group, state=state), None, policy=POLICY, now=500))
    life.hear(Tick(), Stopped(epoch=1), Released())
    assert life.answers() == [StopRanks(epoch=1), Release(), Forget(epoch=1)]


def test_a_group_that_leaves_tells_when_its_streams_are_to_be_moved_shortly_before_its_deadline() -> None:
    assert draining().record.group.migrate_at == TIMES["deadline"] - POLICY.migrate


@pytest.mark.parametrize(
    ("asked", "deadline", "at"), [(0.0, 110.0, 101.0), (50.0, 1000.0, 101.0), (300.0, 1000.0, 300.0)]
)
def test_streams_are_moved_when_asked_for_but_never_before_the_group_drains(
    asked: float, deadline: float, at: float
) -> None:
    spec = replace(SPEC, draining=True, drain_deadline=deadline, migrate_at=asked)
    assert ready().hear(Desired(spec=spec)).later(1).record.group.migrate_at == at


def test_a_repeated_drain_sets_deadline_and_migration_anew() -> None:
    spec = replace(SPEC, draining=True, drain_deadline=2000.0)
    assert draining().hear(Desired(spec=spec)).record.group.migrate_at == 1970.0


def test_a_group_that_is_not_leaving_moves_nothing() -> None:
    assert ready().record.group.migrate_at == 0
    assert draining().hear(RankDied(epoch=1, rank=0, reason="exited")).record.group.migrate_at == 0


def test_failures_in_a_row_are_told_and_survive_a_restart_and_a_controller() -> None:
    life = starting()
    for epoch in (1, 2):
        life.hear(Placed(epoch=epoch), RankDied(epoch=epoch, rank=0, reason="ended"), Stopped(epoch=epoch)).later(9)
    assert (life.state, life.epoch, life.record.group.failures) == (GroupState.STARTING, 3, 2)
    life.record = groups.adopt(life.record.group, SPEC, policy=POLICY, now=life.now)
    life.hear(RankDied(epoch=3, rank=0, reason="ended"))
    assert (life.state, life.record.group.failures) == (GroupState.FAILED, 3)


def test_a_group_that_was_ready_for_long_counts_its_failures_anew() -> None:
    life = starting()
    life.hear(Placed(epoch=1), RankDied(epoch=1, rank=0, reason="ended"), Stopped(epoch=1)).later(9)
    life.hear(*up(2)).later(60)
    assert life.state is GroupState.READY
    assert life.hear(RankDied(epoch=2, rank=0, reason="ended")).record.group.failures == 1
