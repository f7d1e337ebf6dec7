"""The planner's hands: what it decides is written once, told, and never over somebody else's head."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace
from prometheus_client import REGISTRY

from tandem.core.answer_times import AnswerTimes
from tandem.core.traffic import TrafficReport
from tandem.core.types import GroupState
from tandem.fleet.control_client import ControlError, FleetLoad
from tandem_operator.kube import KubeError
from tandem_operator.names import EP_GROUP, FLEET, Key
from tandem_operator.reconcile import scaling
from tandem_operator.reconcile.scaling import FleetPlanner, Planner
from unit.operator.planned import DECODE, SCALING, planned
from unit.operator.world import World


async def test_a_decision_is_written_through_the_scale_subresource_and_told() -> None:
    world, planner = await planned(autoscaling=SCALING)
    await planner.tick()
    assert "patch ExpertParallelPool/r1-decode scale" in world.server.writes
    pool = world.server.objects[DECODE]
    assert pool["spec"]["replicas"] == 2
    assert pool["status"]["scaling"]["wanted"] == 2
    assert any(told.startswith("ScaledUp: ") for told in world.recorder.told)
    await world.look()
    assert "decode-1" in world.groups()


async def test_a_decision_is_made_for_the_pool_that_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    world, planner = await planned(autoscaling=SCALING)
    said: list[Any] = []

    async def refuse(key: Key, change: Any, *, part: str = "") -> Any:
        said.append(change["metadata"]["resourceVersion"])
        raise KubeError("somebody was faster", 409)

    monkeypatch.setattr(world.server, "patch", refuse)
    await planner.tick()  # the error is logged, and the next tick sees what is there
    assert said == [world.server.objects[DECODE]["metadata"]["resourceVersion"]]


async def test_a_pool_without_autoscaling_is_left_alone() -> None:
    world, planner = await planned()
    world.server.writes.clear()
    await planner.tick()
    assert [write for write in world.server.writes if "scale" in write] == []


async def test_a_second_tick_writes_nothing() -> None:
    world, planner = await planned(autoscaling=SCALING)
    await planner.tick()
    await world.look()
    await planner.tick()
    world.server.writes.clear()
    await planner.tick()
    assert world.server.writes == []


async def test_for_how_long_it_is_held_back_yet_is_not_written_at_every_tick() -> None:
    world, planner = await planned(autoscaling=SCALING)
    for _ in range(2):
        await planner.tick()
        await world.look()
    world.scale("decode", 3)
    await planner.tick()
    world.server.writes.clear()
    said = set()
    for _ in range(30):
        world.ctx.at += 2
        await planner.tick()
        said.add(world.server.objects[DECODE]["status"]["scaling"]["held"])
    writes = [write for write in world.server.writes if write == "patch ExpertParallelPool/r1-decode status"]
    assert 3 <= len(writes) == len(said) - 1 <= 60 / 15
    assert all("which stands for another" in held for held in said)


# -- the load


def held(world: World) -> str:
    return str(world.server.objects[DECODE]["status"]["scaling"]["held"])


async def two_groups_and_one_is_silent(monkeypatch: pytest.MonkeyPatch) -> tuple[World, FleetPlanner]:
    """One tick ago both have told; what is in the way of removing one is told at every tick."""
    monkeypatch.setattr(scaling, "_TELL_S", 0.0)
    world, planner = await planned(groups=2, autoscaling={"minGroups": 1})
    await planner.tick()
    told: Any = world.link.load  # type: ignore[attr-defined]
    told.silent.add("decode-1")
    return world, planner


async def test_what_an_engine_said_last_is_good_for_10_s(monkeypatch: pytest.MonkeyPatch) -> None:
    world, planner = await two_groups_and_one_is_silent(monkeypatch)
    world.ctx.at += 10
    await planner.tick()
    assert "the gateways tell nothing" in held(world)  # what it looks at once all loads are known


async def test_the_load_of_an_engine_that_has_been_silent_for_longer_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, planner = await two_groups_and_one_is_silent(monkeypatch)
    world.ctx.at += 11
    await planner.tick()
    assert "no load from decode-1 for 10 s" in held(world)


async def test_with_long_ticks_three_of_them_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    world, planner = await two_groups_and_one_is_silent(monkeypatch)
    world.say(decode={"groups": 2, "autoscaling": {"minGroups": 1}}, planning={"tickSeconds": 20})
    found = []
    for _ in range(4):
        world.ctx.at += 20
        await planner.tick()
        found.append("no load from decode-1 for 60 s" in held(world))
    assert found == [False, False, False, True]


async def test_what_a_group_said_before_it_was_gone_is_not_what_the_next_of_the_name_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world, planner = await two_groups_and_one_is_silent(monkeypatch)
    gone = world.control.groups.pop("decode-1")
    await planner.tick()
    world.control.groups["decode-1"] = gone
    await planner.tick()
    assert "no load from decode-1" in held(world)


async def test_the_load_is_told_rounded() -> None:
    world, planner = await planned()
    await planner.tick()
    status = world.server.objects[Key(EP_GROUP, "ai", "r1-decode-0")]["status"]
    assert status["load"] == {"running": 3, "waiting": 0, "kvUse": 0.123}


async def test_a_group_whose_engines_tell_nothing_has_no_load_rather_than_none_to_do() -> None:
    world, planner = await planned()
    await planner.tick()
    del world.control.groups["decode-0"]
    world.ctx.at += 20
    await planner.tick()
    assert not world.server.objects[Key(EP_GROUP, "ai", "r1-decode-0")]["status"].get("load")


# -- the service


KEPT, LATE, SLOW = (1.0, 0.04), (3.0, 0.04), (1.0, 0.08)
"""Answers that kept both aims (2 s, 0.05 s), missed the first, and missed the other."""


def report(world: World, replica: str, *answers: tuple[float, float], counts: bool = True) -> TrafficReport:
    times = AnswerTimes()
    for answer in answers:
        times.observe(*answer)
    told = times.told() if counts else ()
    began = world.ctx.at
    return TrafficReport(replica=replica, incarnation=replica, started=began, at=began, answers=told)


async def attained(world: World, planner: FleetPlanner, *after: TrafficReport) -> Any:
    """What the status says of the aims, when replicas that had counted nothing have told this."""
    told: Any = world.link.load  # type: ignore[attr-defined]
    told.reports = tuple(replace(one, answers=one.answers[:1]) for one in after)
    await planner.tick()
    world.ctx.at += 70  # the window is 120 s
    told.reports = tuple(replace(one, at=world.ctx.at) for one in after)
    await planner.tick()
    return world.server.objects[Key(FLEET, "ai", "r1")]["status"]["slo"].get("attainment")


def sample(name: str, **more: str) -> float | None:
    return REGISTRY.get_sample_value(f"tandem_operator_{name}", {"namespace": "ai", "fleet": "r1", **more})


async def test_who_missed_either_aim_has_not_kept_both() -> None:
    world, planner = await planned()
    answers = [*[KEPT] * 8, LATE, SLOW]
    assert await attained(world, planner, report(world, "a", *answers)) == 0.8
    assert sample("slo_attainment") == 0.8


async def test_replicas_count_together() -> None:
    world, planner = await planned()
    reports = report(world, "a", KEPT, LATE, SLOW), report(world, "b", KEPT)
    assert await attained(world, planner, *reports) == 0.5


async def test_aims_of_pools_go_before_those_of_the_fleet() -> None:
    world, planner = await planned(autoscaling={"itlSeconds": 0.1})
    assert await attained(world, planner, report(world, "a", KEPT, SLOW)) == 1.0


async def test_aims_that_change_hold_for_what_was_counted_before() -> None:
    world, planner = await planned()
    assert await attained(world, planner, report(world, "a", KEPT, LATE, SLOW, SLOW)) == 0.25
    world.say(slo={"ttftSeconds": 2.0, "itlSeconds": 0.1})
    world.ctx.at += 20
    told: Any = world.link.load  # type: ignore[attr-defined]
    told.reports = tuple(replace(one, at=world.ctx.at) for one in told.reports)
    await planner.tick()
    assert world.server.objects[Key(FLEET, "ai", "r1")]["status"]["slo"]["attainment"] == 0.75


async def test_while_a_replica_of_an_older_version_does_not_tell_nobody_knows() -> None:
    world, planner = await planned()
    assert await attained(world, planner, report(world, "a", KEPT), report(world, "b", counts=False)) is None
    assert sample("slo_attainment") is None


async def test_what_nobody_counts_any_more_is_not_told_as_if_somebody_did() -> None:
    world, planner = await planned()
    await attained(world, planner, report(world, "a", KEPT))
    for _ in range(2):  # the gateways are silent
        world.ctx.at += 100
        await planner.tick()
    assert not world.server.objects[Key(FLEET, "ai", "r1")]["status"].get("slo")


async def test_what_was_told_before_stands_until_a_new_operator_knows_more() -> None:
    world, planner = await planned()
    await attained(world, planner, report(world, "a", KEPT))
    world.ctx.at += 20
    await FleetPlanner(world.ctx, "ai", "r1").tick()
    assert world.server.objects[Key(FLEET, "ai", "r1")]["status"]["slo"]["attainment"] == 1.0


@pytest.mark.parametrize("away", ["link", "load"])
async def test_the_share_of_a_fleet_that_cannot_be_asked_is_not_on_the_metrics(
    away: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, planner = await planned()
    await attained(world, planner, report(world, "a", KEPT))
    assert sample("slo_attainment") == 1.0

    async def refuse() -> FleetLoad:
        raise ControlError("the store is away", "UNAVAILABLE")

    if away == "link":
        world.link.reachable = False
    else:
        monkeypatch.setattr(world.link, "load", refuse)
    await planner.tick()
    assert sample("slo_attainment") is None


async def test_a_window_that_was_made_longer_looks_back_so_far() -> None:
    world, planner = await planned(autoscaling=SCALING)
    await attained(world, planner, report(world, "a", KEPT, LATE))
    world.say(planning={"slowWindowSeconds": 600})
    told: Any = world.link.load  # type: ignore[attr-defined]
    for _ in range(20):  # nobody asks any more
        world.ctx.at += 15
        told.reports = tuple(replace(one, at=world.ctx.at) for one in told.reports)
        await planner.tick()
    assert world.server.objects[Key(FLEET, "ai", "r1")]["status"]["slo"]["attainment"] == 0.5


# -- metrics


async def test_decisions_are_counted_by_direction() -> None:
    _, planner = await planned(autoscaling=SCALING)
    before = {way: sample("planning_decisions_total", role="decode", direction=way) or 0.0 for way in ("up", "down")}
    await planner.tick()
    await planner.tick()
    after = {way: sample("planning_decisions_total", role="decode", direction=way) or 0.0 for way in ("up", "down")}
    assert after == {"up": before["up"] + 1, "down": before["down"]}


async def test_a_decision_that_was_not_written_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    world, planner = await planned(autoscaling=SCALING)
    before = sample("planning_decisions_total", role="decode", direction="up") or 0.0

    async def refuse(key: Key, change: Any, *, part: str = "") -> Any:
        raise KubeError("somebody was faster", 409)

    monkeypatch.setattr(world.server, "patch", refuse)
    await planner.tick()
    assert (sample("planning_decisions_total", role="decode", direction="up") or 0.0) == before


async def test_the_metrics_say_how_many_groups_are_wanted() -> None:
    _, planner = await planned(autoscaling=SCALING)
    await planner.tick()
    wanted = {role: sample("pool_groups_wanted", role=role) for role in ("prefill", "decode")}
    assert wanted == {"prefill": 1.0, "decode": 2.0}


async def test_the_metrics_say_how_many_groups_are_ready() -> None:
    world, planner = await planned(autoscaling=SCALING)
    await planner.tick()
    await world.look()
    assert sample("pool_groups_ready", role="decode") == 2.0
    world.control.groups["decode-1"] = replace(world.control.groups["decode-1"], state=GroupState.FAILED)
    await world.look()
    assert sample("pool_groups_ready", role="decode") == 1.0


# -- it goes on


async def test_a_spec_that_cannot_be_read_does_not_end_the_planning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world, planner = await planned(autoscaling=SCALING)

    def broken(spec: Any) -> Any:
        raise KeyError("model")

    with monkeypatch.context() as patch:
        patch.setattr(scaling, "fleet_spec", broken)
        assert await planner.tick() > 0
    assert "The planning of Fleet ai/r1 failed" in caplog.text
    await planner.tick()
    assert world.server.objects[DECODE]["spec"]["replicas"] == 2


async def test_a_planning_that_has_ended_begins_again_at_the_next_look(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    world, _ = await planned(autoscaling=SCALING)
    begun = asyncio.Event()

    async def ended(self: FleetPlanner) -> None:
        raise RuntimeError("nobody thought of this")

    async def lives(self: FleetPlanner) -> None:
        begun.set()
        await asyncio.Event().wait()

    planner = Planner(world.ctx)
    monkeypatch.setattr(FleetPlanner, "run", ended)
    planner.look()
    await asyncio.sleep(0)
    monkeypatch.setattr(FleetPlanner, "run", lives)
    planner.look()
    async with asyncio.timeout(5):
        await begun.wait()
    assert "tandem-planning-ai-r1 has ended, and begins again" in caplog.text
    assert "nobody thought of this" in caplog.text
    await planner.close()


async def test_another_fleet_of_the_name_is_planned_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    world, _ = await planned()
    runs: list[str] = []

    async def lives(self: FleetPlanner) -> None:
        runs.append("begun")
        try:
            await asyncio.Event().wait()
        finally:
            runs.append("ended")

    monkeypatch.setattr(FleetPlanner, "run", lives)
    planner = Planner(world.ctx)
    planner.look()
    await asyncio.sleep(0)
    key = Key(FLEET, "ai", "r1")
    again = world.server.objects[key]
    world.server.drop(key)  # and made again before anybody has looked
    del again["metadata"]["uid"]
    world.server.put(key, again)
    planner.look()
    planner.look()
    await asyncio.sleep(0)
    assert sorted(runs) == ["begun", "begun", "ended"]
    await planner.close()
