"""A group on paper, for tests: its record, its clock, and what it has asked for."""

from __future__ import annotations

from msgspec.structs import replace

from tandem.core import group as groups
from tandem.core.group_events import (
    Action,
    Desired,
    Event,
    LoadWeights,
    Placed,
    RankReady,
    RankStarted,
    RoomsClosed,
    Service,
    Tick,
    WatchRooms,
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
