"""The life of a group, whatever is done to it in any order."""

from __future__ import annotations

import hypothesis.strategies as st
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
from tandem.core.types import GroupSpec, GroupState, Rank, RankState
from unit.group_life import (
    POLICY,
    SERVICE,
    SPEC,
)

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
