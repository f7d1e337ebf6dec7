"""Other weights for a whole fleet, on paper: whose turn it is, and what follows from a failure."""

from __future__ import annotations

from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from msgspec.structs import replace

from tandem.core import refresh as refreshing
from tandem.core.group_record import Weights
from tandem.core.refresh import OVER, Refresh, RefreshPhase, Told, pause_reason
from tandem.core.types import Group, GroupSpec, GroupState, Role

REFRESH = Refresh(path="/second", version="2", old_path="/first", old_version="1", drain_s=100)
NEW, OLD = Weights("/second", "2"), Weights("/first", "1")


@dataclass
class Paper:
    """A fleet that does what it is told as soon as it is told to go on."""

    groups: dict[str, Group]
    specs: dict[str, GroupSpec]
    refresh: Refresh = REFRESH
    now: float = 1000.0
    turns: list[str] = field(default_factory=list)
    paused: bool = False

    def step(self) -> tuple[Told, ...]:
        self.refresh, told = refreshing.step(
            self.refresh, tuple(self.groups.values()), tuple(self.specs.values()), self.now
        )
        for one in told:
            path, version = one.weights
            self.specs[one.group] = replace(self.specs[one.group], weights_path=path, weight_version=version)
            self.turns.append(one.group)
        return told

    def put(self, name: str, **changes: object) -> None:
        self.groups[name] = replace(self.groups[name], **changes)
        self.paused |= not self.complete()

    def complete(self) -> bool:
        ready = {(group.weight_version, group.role) for group in self.groups.values() if group.routable}
        return any({(version, role) for role in Role} <= ready for version in ("1", "2"))

    def go_on(self, name: str) -> None:
        """The next thing that happens to a group that should have other weights."""
        group, wanted = self.groups[name], self.specs[name]
        if group.loading:  # it is not given up in the middle, whatever is wanted now
            self.put(name, loading="", weight_version=group.loading)
        elif wanted.weight_version in ("", group.weight_version, group.refused):
            self.put(name, state=GroupState.READY)
        elif group.state is GroupState.READY:
            self.put(name, state=GroupState.CORDONED, since=self.now)
        elif group.state is GroupState.CORDONED:
            self.put(name, state=GroupState.DRAINING, since=self.now)
        else:
            self.put(name, loading=wanted.weight_version)

    def run(self) -> None:
        for _ in range(1000):
            self.step()
            if self.refresh.phase in OVER:
                return
            for name in self.groups:
                self.go_on(name)
        raise AssertionError(f"it does not end: {self.refresh}")


def fleet(prefill: int, decode: int, **changes: object) -> Paper:
    groups, specs = {}, {}
    for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
        for number in range(count):
            name = f"{role}-{number}"
            groups[name] = Group(group=name, role=role, epoch=1, state=GroupState.READY, weight_version="1")
            specs[name] = GroupSpec(group=name, role=role, nodes=1)
    return Paper(groups, specs, replace(REFRESH, **changes))


def versions(paper: Paper) -> set[str]:
    return {group.weight_version for group in paper.groups.values()}


def test_two_and_two_groups_take_turns_so_that_the_first_new_pair_is_complete_soon() -> None:
    paper = fleet(2, 2)
    paper.run()
    assert paper.turns == ["prefill-1", "decode-1", "prefill-0", "decode-0"]
    assert (paper.refresh.phase, paper.refresh.ended, versions(paper)) == (RefreshPhase.DONE, 1000.0, {"2"})
    assert not paper.paused


def test_the_next_group_is_told_only_when_the_last_one_is_ready_again() -> None:
    paper = fleet(2, 2)
    assert paper.step() == (Told(group="prefill-1", weights=NEW),)
    for _ in range(5):
        assert paper.step() == ()
        paper.go_on("prefill-1")
    assert paper.step() == (Told(group="decode-1", weights=NEW),)


def test_a_controller_that_comes_back_sees_in_the_fleet_whose_turn_it_is() -> None:
    paper = fleet(2, 2)
    paper.step()
    paper.refresh = replace(REFRESH)
    assert paper.step() == ()
    assert paper.refresh.group == "prefill-1"


@pytest.mark.parametrize(("prefill", "decode", "role"), [(1, 2, "prefill"), (2, 1, "decode"), (1, 1, "prefill")])
def test_a_fleet_with_one_group_of_a_role_waits_unless_a_pause_is_allowed(prefill: int, decode: int, role: str) -> None:
    paper = fleet(prefill, decode)
    assert f"only one {role} group is ready" in pause_reason(paper.groups.values())
    with pytest.raises(AssertionError, match="no pair is complete; add a group"):
        paper.run()
    assert not paper.paused
    paper = fleet(prefill, decode, allow_pause=True)
    paper.run()
    assert (paper.refresh.phase, versions(paper)) == (RefreshPhase.DONE, {"2"})


def test_nothing_to_pause_for_is_said_of_two_groups_of_each_role() -> None:
    assert pause_reason(fleet(2, 2).groups.values()) == ""
    assert pause_reason([]) == "no prefill group is ready, and while it takes the weights no pair is complete"


def test_a_group_that_cannot_take_them_ends_it_and_those_that_did_go_back() -> None:
    paper = fleet(2, 2)
    paper.step()
    for _ in range(5):
        paper.go_on("prefill-1")
    paper.step()
    paper.put("decode-1", state=GroupState.FAILED, refused="2", reason="could not take weight version 2: no file")
    assert paper.step() == (Told(group="decode-1", weights=OLD),)
    assert paper.refresh.phase is RefreshPhase.ROLLING_BACK
    assert paper.refresh.failure == "decode-1 could not take weight version 2: no file"
    paper.put("decode-1", state=GroupState.STARTING, refused="")
    assert paper.step() == (Told(group="prefill-1", weights=OLD),)  # it will have the old ones, and is not waited for
    paper.run()
    assert (paper.refresh.phase, versions(paper)) == (RefreshPhase.ROLLED_BACK, {"1"})
    assert paper.turns[-1] == "prefill-1"
    assert not paper.paused


def test_without_rollback_the_new_groups_stay_new() -> None:
    paper = fleet(2, 2, rollback=False)
    paper.step()
    for _ in range(5):
        paper.go_on("prefill-1")
    paper.step()
    paper.put("decode-1", state=GroupState.FAILED, refused="2")
    assert paper.step() == (Told(group="decode-1", weights=OLD),)
    assert (paper.refresh.phase, paper.groups["prefill-1"].weight_version) == (RefreshPhase.FAILED, "2")


def test_a_rollback_that_fails_too_says_both_reasons() -> None:
    paper = fleet(2, 2)
    paper.refresh = replace(REFRESH, phase=RefreshPhase.ROLLING_BACK, failure="first")
    paper.put("decode-1", state=GroupState.FAILED, refused="1", reason="second")
    paper.step()
    assert paper.refresh.phase is RefreshPhase.FAILED
    assert paper.refresh.failure == "first; and going back failed: decode-1 second"


def test_a_group_that_is_not_empty_in_time_keeps_its_weights() -> None:
    paper = fleet(2, 2)
    paper.step()
    paper.put("prefill-1", state=GroupState.DRAINING, since=paper.now)
    paper.now += 99
    assert paper.step() == ()
    paper.now += 1
    assert paper.step() == (Told(group="prefill-1", weights=OLD),)
    assert paper.refresh.failure == "prefill-1 still had requests after 100 s"


def test_somebody_may_stop_it() -> None:
    paper = fleet(2, 2, stop=True)
    paper.run()
    assert (paper.refresh.phase, paper.refresh.failure) == (RefreshPhase.ROLLED_BACK, "it was told to stop")


def going_back(**changes: object) -> Paper:
    """Two and two groups that go back: prefill-1 has the new weights, and was told to take the old ones again."""
    paper = fleet(2, 2, phase=RefreshPhase.ROLLING_BACK, failure="first", **changes)
    paper.put("prefill-1", weights_path="/second", weight_version="2")
    assert paper.step() == (Told(group="prefill-1", weights=OLD),)
    return paper


def test_a_refresh_that_stops_ends_although_a_group_with_the_old_weights_cannot_start() -> None:
    paper = fleet(2, 2, stop=True)
    paper.put("decode-1", state=GroupState.STARTING, reason="waits for 1 node")
    paper.step()
    paper.step()
    assert paper.refresh.phase is RefreshPhase.ROLLED_BACK


def test_a_group_that_has_failed_is_waited_for_until_its_next_epoch_begins() -> None:
    paper = fleet(2, 2, stop=True)
    paper.put("decode-1", state=GroupState.FAILED)
    paper.step()
    paper.step()
    assert paper.refresh.note == "waits for decode-1 to be ready"
    paper.put("decode-1", state=GroupState.STARTING)
    paper.step()
    assert paper.refresh.phase is RefreshPhase.ROLLED_BACK


def test_a_refresh_is_over_although_the_last_group_died_with_the_new_weights() -> None:
    paper = fleet(2, 2)
    for name in paper.groups:
        paper.put(name, weight_version="2")
    paper.put("decode-0", state=GroupState.STARTING)
    paper.step()
    assert paper.refresh.phase is RefreshPhase.DONE


def test_on_the_way_back_a_group_that_is_not_empty_in_time_keeps_what_it_has_and_the_refresh_fails() -> None:
    paper = going_back()
    paper.put("prefill-1", state=GroupState.DRAINING, since=paper.now)
    paper.now += 99
    assert paper.step() == ()
    paper.now += 1
    assert paper.step() == (Told(group="prefill-1", weights=NEW),)
    assert paper.refresh.phase is RefreshPhase.FAILED
    assert paper.refresh.failure == "first; and going back failed: prefill-1 still had requests after 100 s"


def test_a_group_that_was_too_late_for_the_new_weights_is_not_too_late_for_its_own() -> None:
    paper = fleet(2, 2)
    paper.step()
    paper.put("prefill-1", state=GroupState.DRAINING, since=paper.now)
    paper.now += 100
    paper.step()
    assert paper.step() == ()  # it has not heard yet that it goes on
    paper.run()
    assert paper.refresh.phase is RefreshPhase.ROLLED_BACK


def test_the_way_back_may_be_stopped() -> None:
    paper = going_back()
    paper.put("prefill-1", state=GroupState.DRAINING, since=paper.now)
    paper.refresh = replace(paper.refresh, stop=True)
    assert paper.step() == (Told(group="prefill-1", weights=NEW),)
    assert (paper.refresh.phase, paper.refresh.ended) == (RefreshPhase.FAILED, paper.now)
    assert paper.refresh.failure == "first; and going back failed: it was told to stop"


def test_the_way_back_that_is_stopped_leaves_a_load_alone() -> None:
    paper = going_back()
    paper.put("prefill-1", state=GroupState.DRAINING, loading="1")
    paper.refresh = replace(paper.refresh, stop=True)
    assert paper.step() == ()
    assert paper.refresh.phase is RefreshPhase.FAILED


def test_one_wish_to_stop_ends_only_the_way_forth() -> None:
    paper = fleet(2, 2, stop=True)
    paper.put("prefill-1", weight_version="2")
    paper.step()
    assert (paper.refresh.phase, paper.refresh.stop) == (RefreshPhase.ROLLING_BACK, False)


def test_no_group_follows_one_that_died_with_the_new_weights_until_it_is_up_again() -> None:
    paper = fleet(3, 3)
    paper.put("prefill-2", state=GroupState.STARTING, reason="restarts", weight_version="2")
    assert paper.step() == ()
    assert (paper.refresh.group, paper.refresh.note) == ("prefill-2", "prefill-2 is starting: restarts")
    paper.put("prefill-2", state=GroupState.READY)
    assert paper.step() == (Told(group="decode-2", weights=NEW),)


def test_a_group_that_starts_for_the_first_time_has_no_weights_yet() -> None:
    paper = going_back()
    paper.put("prefill-1", weight_version="1")
    paper.put("decode-1", state=GroupState.STARTING, weight_version="", loading="1")
    assert paper.step() == ()
    assert paper.refresh.note == "waits for decode-1 to be ready"


def test_a_group_that_leaves_is_left_alone() -> None:
    paper = fleet(2, 3)
    paper.specs["decode-2"] = replace(paper.specs["decode-2"], draining=True)
    paper.run()
    assert "decode-2" not in paper.turns


def test_a_group_that_is_starting_is_waited_for() -> None:
    paper = fleet(2, 2)
    paper.put("decode-0", state=GroupState.STARTING)
    paper.step()  # decode-1 alone makes the pair, so only a prefill group can go
    assert paper.turns == ["prefill-1"]
    for _ in range(5):
        paper.go_on("prefill-1")
    assert paper.step() == ()
    assert paper.refresh.note == "waits for decode-0 to be ready"


@pytest.mark.parametrize("state", [GroupState.READY, GroupState.CORDONED, GroupState.DRAINING])
def test_a_group_whose_turn_it_is_serves_on_when_the_other_one_dies(state: GroupState) -> None:
    paper = fleet(2, 2)
    paper.step()
    paper.put("prefill-1", state=state, since=paper.now)
    paper.put("prefill-0", state=GroupState.FAILED)
    assert paper.step() == (Told(group="prefill-1", weights=Weights("", "1")),)
    paper.put("prefill-1", state=GroupState.READY)
    assert paper.step() == (Told(group="decode-1", weights=NEW),)  # the only one that is not missed
    paper.run()
    assert (paper.refresh.phase, versions(paper)) == (RefreshPhase.DONE, {"2"})


def test_a_load_is_not_given_up_when_the_other_group_dies() -> None:
    paper = fleet(2, 2)
    paper.step()
    paper.put("prefill-1", state=GroupState.DRAINING, loading="2")
    paper.put("prefill-0", state=GroupState.FAILED)
    assert paper.step() == ()


def test_a_group_that_was_only_just_wished_for_is_waited_for() -> None:
    paper = fleet(2, 2)
    paper.specs["decode-2"] = replace(paper.specs["decode-0"], group="decode-2")
    with pytest.raises(AssertionError, match="waits for decode-2 to start"):
        paper.run()


def test_what_is_over_does_nothing() -> None:
    paper = fleet(2, 2, phase=RefreshPhase.DONE)
    assert paper.step() == ()


EVENTS = st.sampled_from(["go on", "go on", "go on", "crash", "refuse", "time", "stop", "forget"])


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 3), st.integers(2, 3), st.lists(st.tuples(EVENTS, st.integers(0, 5)), max_size=60))
def test_whatever_happens_at_most_one_group_is_away_for_its_weights_and_in_the_end_all_are_of_one_version(
    prefill: int, decode: int, events: list[tuple[str, int]]
) -> None:
    paper = fleet(prefill, decode)
    names = list(paper.groups)
    for event, number in events:
        name = names[number % len(names)]
        group = paper.groups[name]
        before = paper.complete()
        told = paper.step()
        assert len(told) <= 1
        if event == "go on":
            paper.go_on(name)
        elif event == "crash":
            refused = {"refused": group.loading, "loading": ""} if group.loading else {}
            paper.put(name, state=GroupState.STARTING, **refused)
            before = False
        elif event == "refuse" and group.loading:
            paper.put(name, state=GroupState.FAILED, refused=group.loading, loading="")
        elif event == "time":
            paper.now += 60
        elif event == "stop":
            paper.refresh = replace(paper.refresh, stop=True)
        elif event == "forget" and paper.refresh.phase not in OVER:
            paper.refresh = replace(paper.refresh, group="", note="")
        assert not before or paper.complete(), "the refresh took the last pair"
        for name_, spec in paper.specs.items():
            if spec.weight_version != paper.groups[name_].refused:
                paper.groups[name_] = replace(paper.groups[name_], refused="")
    paper.run()
    if paper.refresh.phase is RefreshPhase.DONE:
        assert versions(paper) == {"2"}
    elif paper.refresh.phase is RefreshPhase.ROLLED_BACK:
        assert versions(paper) == {"1"}
    else:
        assert "going back failed" in paper.refresh.failure
        for name_, group in paper.groups.items():  # nobody drains for weights that are not wanted any more
            assert group.loading or paper.specs[name_].weight_version in ("", group.weight_version)
