"""The life of a group, on paper: what happens to it, and what it asks for."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from tandem.core import group as groups
from tandem.core.group_events import (
    Action,
    Adopted,
    Desired,
    Event,
    Forget,
    LoadWeights,
    Place,
    Placed,
    RankDied,
    RankReady,
    RankStarted,
    Release,
    Released,
    RoomsClosed,
    Service,
    StartFailed,
    StartRanks,
    Stopped,
    StopRanks,
    Tick,
    Waiting,
    WatchRooms,
    WeightsFailed,
    WeightsLoaded,
)
from tandem.core.types import GroupSpec, GroupState, Rank, RankState, Role

POLICY = groups.Policy(start=30, settle=1, stable=60, backoff=1, backoff_most=8, migrate=30)
SPEC = GroupSpec(group="decode-0", role=Role.DECODE, nodes=2)
SERVICE = Service(url="http://127.0.0.1:20001", dp_size=2, weight_version="1")
SECOND = replace(SPEC, weights_path="/second", weight_version="2")
LOAD = LoadWeights(epoch=1, path="/second", version="2")
LOADED = WeightsLoaded(epoch=1, path="/second", version="2")
TIMES = {"deadline": 1000.0}


class Life:
    """A group, its clock, and what it asked for since it was last looked at."""

    def __init__(self, record: groups.Record, now: float = 100.0) -> None:
        self.record = record
        self.now = now
        self.asked: list[Action] = []

    def hear(self, *events: Event) -> Life:
        for event in events:
            self.record, actions = groups.step(self.record, event, self.now)
            self.asked += actions
        return self

    def later(self, seconds: float) -> Life:
        self.now += seconds
        return self.hear(Tick())

    def answers(self) -> list[Action]:
        asked, self.asked = self.asked, []
        return asked

    @property
    def state(self) -> GroupState:
        return self.record.group.state

    @property
    def epoch(self) -> int:
        return self.record.group.epoch


def up(epoch: int) -> list[Event]:
    """Everything that goes well from a placement to readiness."""
    started = [RankStarted(epoch=epoch, rank=Rank(rank=n, state=RankState.STARTING, pid=10 + n)) for n in range(2)]
    return [
        Placed(epoch=epoch),
        *started,
        RankReady(epoch=epoch, rank=1),
        RankReady(epoch=epoch, rank=0, service=SERVICE),
    ]


def starting() -> Life:
    return Life(groups.new(SPEC, policy=POLICY)).hear(Desired(spec=SPEC))


def ready() -> Life:
    life = starting().hear(*up(1))
    life.answers()
    return life


def draining() -> Life:
    life = ready().hear(Desired(spec=replace(SPEC, draining=True, drain_deadline=TIMES["deadline"]))).later(1)
    life.answers()
    return life


def loading() -> Life:
    """A group that is empty and was told to load the weights of version 2."""
    life = ready().hear(Desired(spec=SECOND)).later(1).hear(RoomsClosed(epoch=1))
    assert life.answers() == [WatchRooms(epoch=1), LOAD]
    return life


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


ALLOWED = {
    GroupState.GONE: {GroupState.STARTING},
    GroupState.STARTING: {GroupState.READY, GroupState.CORDONED, GroupState.DRAINING, GroupState.FAILED},
    GroupState.READY: {GroupState.CORDONED, GroupState.DRAINING, GroupState.FAILED},
    GroupState.CORDONED: {GroupState.READY, GroupState.DRAINING, GroupState.FAILED},
    GroupState.DRAINING: {
        GroupState.READY,
        GroupState.CORDONED,
        GroupState.FAILED,
        GroupState.GONE,
        GroupState.STARTING,
    },
    GroupState.FAILED: {GroupState.STARTING, GroupState.GONE},
}
ranks = st.integers(0, 1)


def path(version: str) -> str:
    """Folder of a weight version; that of the first is the fleet's own."""
    return f"/{version}" if version > "1" else ""


class AnyLife(RuleBasedStateMachine):
    """A world that does to one group whatever can be done to it, in any order, and remembers what really runs."""

    def __init__(self) -> None:
        super().__init__()
        self.spec: GroupSpec | None = None
        self.now = 100.0
        self.record = groups.new(SPEC, policy=POLICY)
        self.running: set[tuple[int, int]] = set()
        self.placing: int | None = None
        self.stopping: int | None = None
        self.releasing = False
        self.placed = False
        self.watching: int | None = None
        self.loading: LoadWeights | None = None
        self.held = ""
        """Weight version that the engines really have; "?" while it is being changed."""
        self.seen_empty = False

    def hear(self, event: Event) -> None:
        before = self.record
        self.record, actions = groups.step(before, event, self.now)
        old, new = before.group, self.record.group
        assert new.epoch >= old.epoch, "the epoch fell"
        assert new.state is old.state or new.state in ALLOWED[old.state] or self._passes(old.state, new.state)
        for action in actions:
            self.obey(action)

    @staticmethod
    def _passes(old: GroupState, new: GroupState) -> bool:
        """One event may take a group through a state that lasts no time."""
        return any(new in ALLOWED[between] for between in ALLOWED[old])

    def obey(self, action: Action) -> None:
        match action:
            case Place(epoch=epoch, spec=spec):
                assert not self.running, "ranks of an old epoch still run"
                self.placing, self.placed = epoch, True
                assert (spec, epoch) == (self.record.spec, self.record.group.epoch)
            case StartRanks(epoch=epoch):
                assert not self.running, "ranks of an old epoch still run"
                assert self.placed
                self.running = {(epoch, rank) for rank in range(2)}
                self.held = action.spec.weight_version or "1"
            case LoadWeights(epoch=epoch):
                assert self.record.group.state is GroupState.DRAINING
                assert self.seen_empty, "weights changed under requests"
                assert {of for of, _ in self.running} == {epoch}
                assert self.record.group.loading == action.version, "a controller that comes back would not know"
                self.loading, self.held = action, "?"
            case StopRanks(epoch=epoch):
                assert all(of <= epoch for of, _ in self.running)
                self.stopping, self.loading = epoch, None
            case WatchRooms(epoch=epoch):
                self.watching, self.seen_empty = epoch, False
            case Release():
                assert not self.running, "nodes given back with ranks on them"
                self.releasing, self.placing = True, None
            case Forget(epoch=epoch):
                assert not self.running
                assert not self.placed
                assert self.record.group.state is GroupState.GONE
                assert self.spec is None or self.spec.draining

    @rule(cordoned=st.booleans(), gpus=st.sampled_from([1, 1, 1, 2]), version=st.sampled_from(["", "1", "2", "3"]))
    def want(self, cordoned: bool, gpus: int, version: str) -> None:
        self.spec = replace(SPEC, cordoned=cordoned, gpus_per_node=gpus, weights_path=path(version))
        self.spec = replace(self.spec, weight_version=version)
        self.hear(Desired(spec=self.spec))

    @precondition(lambda self: self.spec is not None and not self.spec.draining and self.record.group.routable)
    @rule(version=st.sampled_from(["1", "2", "3"]))
    def refresh(self, version: str) -> None:
        assert self.spec is not None
        self.spec = replace(self.spec, weights_path=path(version), weight_version=version)
        self.hear(Desired(spec=self.spec))

    @precondition(lambda self: self.loading is not None)
    @rule(good=st.booleans())
    def weights_end(self, good: bool) -> None:
        assert self.loading is not None
        asked, self.loading = self.loading, None
        if good:
            self.held = asked.version
            self.hear(WeightsLoaded(epoch=asked.epoch, path=asked.path, version=asked.version))
        else:
            self.hear(WeightsFailed(epoch=asked.epoch, version=asked.version, reason="bad"))

    @precondition(lambda self: self.spec is not None and not self.spec.draining)
    @rule(limit=st.sampled_from([0.0, 5.0, 1e6]))
    def drain(self, limit: float) -> None:
        assert self.spec is not None
        self.spec = replace(self.spec, draining=True, drain_deadline=self.now + limit)
        self.hear(Desired(spec=self.spec))

    @rule()
    def remove(self) -> None:
        self.spec = None
        self.hear(Desired(spec=None))

    @precondition(lambda self: self.placing is not None)
    @rule(outcome=st.sampled_from(["placed", "placed", "waits", "fails"]))
    def place(self, outcome: str) -> None:
        assert self.placing is not None
        epoch = self.placing
        if outcome == "waits":
            self.hear(Waiting(epoch=epoch, reason="no nodes"))
            return
        self.placing = None
        self.hear(Placed(epoch=epoch) if outcome == "placed" else StartFailed(epoch=epoch, reason="cannot be placed"))

    @precondition(lambda self: self.placing is not None)
    @rule()
    def comes_up(self) -> None:
        """All at once, or what can happen to a group that serves would seldom be seen."""
        self.place("placed")
        for rank in (1, 0):
            if self.running:
                self.rank_gets_ready(rank)

    @precondition(lambda self: self.record.group.state is GroupState.CORDONED)
    @rule()
    def runs_empty(self) -> None:
        self.time_passes(2.0)
        if self.watching is not None:
            self.rooms_close()

    @precondition(lambda self: self.running)
    @rule(rank=ranks)
    def rank_starts(self, rank: int) -> None:
        epoch = max(epoch for epoch, _ in self.running)
        self.hear(RankStarted(epoch=epoch, rank=Rank(rank=rank, state=RankState.STARTING, pid=7)))

    @precondition(lambda self: self.running)
    @rule(rank=ranks)
    def rank_gets_ready(self, rank: int) -> None:
        epoch = max(epoch for epoch, _ in self.running)
        if (epoch, rank) in self.running:
            self.hear(RankReady(epoch=epoch, rank=rank, service=self.service() if rank == 0 else None))

    def service(self) -> Service:
        return replace(SERVICE, weight_version=self.held)

    @precondition(lambda self: self.running)
    @rule(rank=ranks)
    def rank_dies(self, rank: int) -> None:
        epoch = max(epoch for epoch, _ in self.running)
        self.running.discard((epoch, rank))
        self.hear(RankDied(epoch=epoch, rank=rank, reason="died"))

    @precondition(lambda self: self.stopping is not None)
    @rule()
    def ranks_stop(self) -> None:
        assert self.stopping is not None
        epoch, self.stopping = self.stopping, None
        self.running.clear()
        self.hear(Stopped(epoch=epoch))

    @precondition(lambda self: self.releasing)
    @rule()
    def placement_goes(self) -> None:
        self.releasing, self.placed = False, False
        self.hear(Released())

    @precondition(lambda self: self.watching is not None)
    @rule()
    def rooms_close(self) -> None:
        assert self.watching is not None
        epoch, self.watching = self.watching, None
        self.seen_empty = self.record.group.state is GroupState.DRAINING
        self.hear(RoomsClosed(epoch=epoch))

    @rule(seconds=st.sampled_from([0.5, 2.0, 31.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.hear(Tick())

    @precondition(lambda self: self.record.group.epoch > 1)
    @rule(data=st.data())
    def an_old_epoch_speaks(self, data: st.DataObject) -> None:
        epoch = data.draw(st.integers(1, self.record.group.epoch - 1))
        rank = data.draw(ranks)
        event = data.draw(
            st.sampled_from(
                [
                    Placed(epoch=epoch),
                    RankStarted(epoch=epoch, rank=Rank(rank=rank)),
                    RankReady(epoch=epoch, rank=rank, service=SERVICE),
                    RankDied(epoch=epoch, rank=rank, reason="late"),
                    StartFailed(epoch=epoch, reason="late"),
                    RoomsClosed(epoch=epoch),
                    WeightsLoaded(epoch=epoch, path="/2", version="2"),
                    WeightsFailed(epoch=epoch, version="2", reason="late"),
                    Stopped(epoch=epoch),
                ]
            )
        )
        before = self.record
        self.record, actions = groups.step(before, event, self.now)
        assert self.record is before
        assert actions == ()

    @precondition(lambda self: self.record.group.epoch > 0)
    @rule()
    def controller_comes_back(self) -> None:
        group = self.record.group
        self.record = groups.adopt(group, self.spec, policy=POLICY, now=self.now)
        self.placing = self.stopping = self.watching = self.loading = None
        self.releasing = False
        alive = {(group.epoch, rank.rank) for rank in group.ranks} == self.running and self.running
        if group.state in groups.SERVING or group.state is GroupState.STARTING:
            self.hear(
                Adopted(epoch=group.epoch, ranks=group.ranks)
                if alive
                else RankDied(epoch=group.epoch, rank=0, reason="cannot be found")
            )
        self.hear(Tick())

    @invariant()
    def ready_means_every_rank_of_this_epoch_is_ready(self) -> None:
        group = self.record.group
        if group.routable:
            assert group.url
            assert all(rank.state is RankState.READY for rank in group.ranks)
            assert {epoch for epoch, _ in self.running} == {group.epoch}

    @invariant()
    def what_takes_requests_has_the_weights_that_it_tells(self) -> None:
        group = self.record.group
        if group.routable:
            assert (group.weight_version, group.loading) == (self.held, "")
            assert group.weights_path == path(group.weight_version) or group.weight_version == "1"

    @invariant()
    def streams_are_moved_only_off_a_group_that_drains(self) -> None:
        group = self.record.group
        if group.migrate_at and not self.record.stopping:
            assert group.state is GroupState.DRAINING
            assert group.migrate_at >= group.since

    @invariant()
    def gone_means_nothing_runs(self) -> None:
        if self.record.group.state is GroupState.GONE:
            assert not self.running
            assert not self.placed or self.releasing or self.record.shape is not None

    @invariant()
    def whoever_is_not_serving_says_why(self) -> None:
        if self.record.group.state in (GroupState.FAILED, GroupState.DRAINING, GroupState.CORDONED):
            assert self.record.group.reason

    def teardown(self) -> None:
        """When the world is kind again, the group becomes what it should be."""
        for _ in range(60):
            if self.placing is not None:
                self.place("placed")
            elif self.stopping is not None:
                self.ranks_stop()
            elif self.releasing:
                self.placement_goes()
            elif self.running and self.record.group.state is GroupState.STARTING:
                for rank in (1, 0):
                    self.running.add((self.record.group.epoch, rank))
                    self.rank_gets_ready(rank)
            elif self.watching is not None:
                self.rooms_close()
            elif self.loading is not None:
                self.weights_end(True)
            elif (due := groups.wake_at(self.record)) is not None:
                self.now = max(self.now, due)
                self.hear(Tick())
            else:
                break
        if self.spec is None or self.spec.draining:
            assert self.record.group.state is GroupState.GONE
            assert not self.placed
        else:
            group = self.record.group
            assert group.state is (GroupState.CORDONED if self.spec.cordoned else GroupState.READY)
            assert self.spec.weight_version in ("", group.refused, group.weight_version)


TestAnyLife = AnyLife.TestCase
TestAnyLife.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
