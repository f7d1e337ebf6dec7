"""The laptop's autoscaling: a fleet in virtual time, whose groups start slowly and slow down as they fill."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import msgspec
import pytest
from msgspec.structs import replace
from rich.console import Console

from tandem.cli.tables import fleet_view
from tandem.config import FleetConfig
from tandem.core.planning_types import PlanState
from tandem.core.traffic import BOUNDS, TrafficReport
from tandem.core.types import DpLoad, FleetSnapshot, Group, GroupSpec, GroupState, PoolPlan, Role
from tandem.fleet.autoscale import STATE_KEY, Autoscaler, AutoscaleSettings, autoscale_settings
from tandem.fleet.backend import why_needed
from tandem.fleet.control_service import Refused
from tandem.fleet.snapshot import PLANS
from tandem.state import Entry, Store, StoreError

START_S = 20.0
LEAVE_S = 4.0
FITS = 8
"""Requests that a decode group runs at 20 ms a token."""


class TimedFleet:
    """A `ScalableFleet`: one prefill group, decode groups, and one gateway, at `now`."""

    def __init__(self, decode: int = 1) -> None:
        self.now = 1_000_000.0
        self.running = 0.0
        """Requests at once; each takes 10 s."""
        self.waiting = 0
        """Requests that wait for a decode group."""
        self.plans: tuple[PoolPlan, ...] = ()
        self.silent = False
        self.refuse = ""
        self.away = False
        self.drained: list[tuple[str, bool, bool]] = []
        self.busy: dict[str, int] = {}
        self._specs: dict[str, tuple[GroupSpec, float]] = {}
        self._arrived = 0.0
        self._itl = [0] * (len(BOUNDS) + 1)
        for role, count in ((Role.PREFILL, 1), (Role.DECODE, decode)):
            for number in range(count):
                spec = GroupSpec(group=f"{role}-{number}", role=role, nodes=2)
                self._specs[spec.group] = spec, self.now - 1000

    def wait(self, seconds: float) -> None:
        """Time passes, and tokens come."""
        self.now += seconds
        self._arrived += seconds * self.running / 10
        ready = max(1, len(self.ready()))
        itl = 0.02 * max(1.0, self.running / ready / FITS)
        if self.running:
            self._itl[sum(bound < itl for bound in BOUNDS)] += int(seconds * self.running / itl)
        self._specs = {
            name: (spec, since)
            for name, (spec, since) in self._specs.items()
            if not spec.draining or self.now - since < LEAVE_S
        }

    def ready(self) -> list[str]:
        """Decode groups that serve."""
        return [one.group for one in self._groups() if one.role is Role.DECODE and one.state is GroupState.READY]

    def wish(self, role: Role = Role.DECODE) -> list[str]:
        return [spec.group for spec, _ in self._specs.values() if spec.role is role and not spec.draining]

    def _groups(self) -> list[Group]:
        return [
            Group(
                group=name,
                role=spec.role,
                epoch=1,
                state=GroupState.DRAINING
                if spec.draining
                else GroupState.READY
                if self.now - since >= START_S
                else GroupState.STARTING,
                since=since,
            )
            for name, (spec, since) in self._specs.items()
        ]

    async def fleet(self) -> FleetSnapshot:
        if self.away:
            raise StoreError("Redis is away.")
        desired = tuple(spec for spec, _ in self._specs.values())
        return FleetSnapshot(name="t", groups=tuple(self._groups()), desired=desired, plans=self.plans)

    async def load(self, group: str | None, *, within: float) -> Mapping[str, Sequence[DpLoad]]:
        ready = self.ready()
        share = round(self.running / max(1, len(ready)))
        loads = {name: [DpLoad(dp_rank=0, running=self.busy.get(name, share), token_usage=0.1)] for name in ready}
        return {} if self.silent else {**loads, "prefill-0": [DpLoad(dp_rank=0)]}

    async def traffic(self) -> Sequence[TrafficReport]:
        arrived = int(self._arrived)
        made = TrafficReport(
            replica="g",
            incarnation="g1",
            started=999_000,
            at=self.now,
            arrived=arrived,
            admitted=arrived,
            finished=arrived,
            input_tokens=100 * arrived,
            output_tokens=sum(self._itl),
            ttft=(0,) * 50 + (arrived,) + (0,) * (len(BOUNDS) - 50),
            itl=tuple(self._itl),
            running=round(self.running),
            waiting_decode=self.waiting,
        )
        return [] if self.silent else [made]

    async def put_group(self, spec: GroupSpec) -> GroupSpec:
        if self.refuse:
            raise Refused(self.refuse)
        self._specs[spec.group] = spec, self.now
        return spec

    async def drain(self, group: str, deadline_s: float | None, *, migrate: bool, force: bool) -> GroupSpec:
        if not force and (why := why_needed(await self.fleet(), group)):
            raise Refused(why)
        self.drained.append((group, migrate, force))
        spec = replace(self._specs[group][0], draining=True)
        self._specs[group] = spec, self.now
        return spec


def settings(**decode: object) -> AutoscaleSettings:
    policy = {"max_groups": 2, "up_cooldown_s": 15, "down_cooldown_s": 60, "manual_hold_s": 120, **decode}
    config = FleetConfig.model_validate(
        {
            "decode": {"nodes": 2, "gpus_per_node": 1, "autoscaling": policy},
            "planning": {"tick_s": 2, "fast_window_s": 10, "slow_window_s": 30},
            "timeouts": {"group_start_s": 60},
        }
    )
    found = autoscale_settings(config)
    assert found is not None
    return found


class Driven:
    """The autoscaler and its fleet."""

    def __init__(self, store: Store, fleet: TimedFleet, how: AutoscaleSettings) -> None:
        self.store, self.fleet, self.how = store, fleet, how
        self.restart()

    def restart(self) -> None:
        self.scaler = Autoscaler(self.store, self.fleet, self.how, clock=lambda: self.fleet.now)

    async def go(self, seconds: float, until: Callable[[], bool] = lambda: False) -> float:
        """Tick every two seconds until it is so; returns how long that took."""
        began = self.fleet.now
        while self.fleet.now - began < seconds:
            if until():
                return self.fleet.now - began
            self.fleet.wait(2)
            await self.scaler.tick()
            self.fleet.plans = tuple(
                msgspec.json.decode(entry.value, type=PoolPlan) for entry in await self.store.list(PLANS)
            )
        return self.fleet.now - began

    async def until_wish(self, groups: int, within: float) -> float:
        took = await self.go(within + 2, lambda: len(self.fleet.wish()) == groups)
        assert len(self.fleet.wish()) == groups, self.plan
        return took

    @property
    def plan(self) -> PoolPlan:
        """As it is shown."""
        (found,) = self.fleet.plans
        return found


class MemoryStore:
    """As much of a `Store` as this needs, without a file: a thousand ticks take no time."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._version = 0

    async def put(self, key: str, value: bytes, *, ttl: float | None = None) -> int:
        self._version += 1
        self._entries[key] = Entry(key, value, self._version)
        return self._version

    async def get(self, key: str) -> Entry | None:
        return self._entries.get(key)

    async def delete(self, key: str) -> bool:
        return self._entries.pop(key, None) is not None

    async def list(self, prefix: str) -> list[Entry]:
        return [entry for key, entry in sorted(self._entries.items()) if key.startswith(prefix)]


@pytest.fixture
def store() -> Store:
    return cast("Store", MemoryStore())


@pytest.fixture
def driven(store: Store) -> Driven:
    return Driven(store, TimedFleet(), settings())


async def test_a_load_step_makes_it_go_from_one_group_to_two_and_back(driven: Driven) -> None:
    driven.fleet.running = 4
    await driven.go(60)
    assert driven.fleet.wish() == ["decode-0"]
    driven.fleet.running = 24
    assert await driven.until_wish(2, within=10) <= 10
    assert driven.plan.role is Role.DECODE
    assert "time between tokens" in driven.plan.reason
    assert driven.plan.wanted == 2
    await driven.go(60)
    assert driven.fleet.ready() == ["decode-0", "decode-1"]
    driven.fleet.running = 2
    await driven.until_wish(1, within=300)
    await driven.go(30)
    assert len(driven.fleet.ready()) == 1
    assert len(driven.fleet.drained) == 1
    assert driven.plan.wanted == 1
    assert driven.plan.reason


async def test_the_group_with_the_least_to_lose_goes_and_its_streams_move_at_once(store: Store) -> None:
    driven = Driven(store, TimedFleet(decode=2), settings())
    driven.fleet.busy = {"decode-0": 0, "decode-1": 1}
    await driven.until_wish(1, within=300)
    assert driven.fleet.drained == [("decode-0", True, False)]


async def test_what_scales_by_hand_stays_as_it_is(driven: Driven) -> None:
    driven.fleet.running = 24
    await driven.go(120)
    assert driven.fleet.wish(Role.PREFILL) == ["prefill-0"]
    assert [plan.role for plan in driven.fleet.plans] == [Role.DECODE]


async def test_a_number_that_is_taken_back_by_hand_at_once_stands_too(driven: Driven) -> None:
    driven.fleet.running = 24
    await driven.until_wish(2, within=60)
    await driven.fleet.drain("decode-1", None, migrate=True, force=True)
    await driven.go(100)
    assert driven.fleet.wish() == ["decode-0"]
    assert "by hand" in driven.plan.held


async def test_a_number_set_by_hand_stands_for_a_while(driven: Driven) -> None:
    await driven.go(60)
    await driven.fleet.put_group(GroupSpec(group="decode-1", role=Role.DECODE, nodes=2))
    await driven.go(110)
    assert driven.fleet.wish() == ["decode-0", "decode-1"]
    assert "by hand" in driven.plan.reason
    assert "by hand" in driven.plan.held
    await driven.until_wish(1, within=300)


async def test_a_restarted_controller_goes_on_with_what_it_knew(driven: Driven) -> None:
    driven.fleet.running = 24
    await driven.until_wish(2, within=60)
    before = driven.plan
    driven.restart()
    driven.fleet.wait(1)
    await driven.scaler.tick()
    entry = await driven.store.get(STATE_KEY)
    assert entry is not None
    remembered = msgspec.json.decode(entry.value, type=PlanState).decode
    assert (remembered.wanted, remembered.reason) == (2, before.reason)
    assert driven.fleet.wish() == ["decode-0", "decode-1"]


async def test_what_another_version_remembered_is_given_up(driven: Driven, caplog: pytest.LogCaptureFixture) -> None:
    await driven.store.put(STATE_KEY, b'{"decode": 7}')
    await driven.scaler.tick()
    assert "begins anew" in caplog.text


async def test_a_pool_that_may_be_empty_loses_its_last_group_when_nobody_asks_and_gets_one_when_somebody_does(
    store: Store,
) -> None:
    driven = Driven(store, TimedFleet(), settings(min_groups=0, idle_s=60))
    await driven.until_wish(0, within=200)
    assert driven.fleet.drained == [("decode-0", False, True)]
    await driven.go(30)
    driven.fleet.waiting = 1
    await driven.until_wish(1, within=4)


async def test_without_news_nothing_is_done(store: Store) -> None:
    driven = Driven(store, TimedFleet(decode=2), settings())
    driven.fleet.silent = True
    await driven.go(120)
    assert driven.fleet.wish() == ["decode-0", "decode-1"]
    assert driven.plan.held


async def test_what_is_refused_is_shown_and_tried_again(driven: Driven, caplog: pytest.LogCaptureFixture) -> None:
    driven.fleet.running = 24
    driven.fleet.refuse = "4 nodes are the most."
    await driven.go(20)
    assert driven.plan.held == "4 nodes are the most."
    driven.fleet.refuse = ""
    await driven.until_wish(2, within=4)
    await driven.go(40)
    assert "hand" not in driven.plan.reason
    assert "autoscaling of decode has to wait: 4 nodes are the most." in caplog.text


async def test_a_new_group_is_like_those_of_the_configuration(driven: Driven) -> None:
    driven.fleet.running = 24
    await driven.until_wish(2, within=60)
    (spec,) = [one for one in (await driven.fleet.fleet()).desired if one.group == "decode-1"]
    assert spec == GroupSpec(group="decode-1", role=Role.DECODE, nodes=2, gpus_per_node=1)


async def test_the_name_of_a_group_that_still_leaves_is_not_given_again(store: Store) -> None:
    driven = Driven(store, TimedFleet(), settings())
    await driven.fleet.put_group(GroupSpec(group="decode-1", role=Role.DECODE, nodes=2, draining=True))
    driven.fleet.running = 24
    driven.fleet._specs["decode-1"] = driven.fleet._specs["decode-1"][0], driven.fleet.now + 1000
    await driven.until_wish(2, within=60)
    assert driven.fleet.wish() == ["decode-0", "decode-2"]


async def test_each_change_is_logged_with_its_reason(driven: Driven, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tandem.fleet.autoscale")
    driven.fleet.running = 24
    await driven.until_wish(2, within=60)
    assert f"autoscaling: {driven.plan.reason}" in caplog.messages


async def test_a_plan_that_does_not_change_is_not_written_again(driven: Driven) -> None:
    await driven.go(80)
    entry = await driven.store.get(PLANS + "decode")
    await driven.go(20)
    assert await driven.store.get(PLANS + "decode") == entry


async def test_the_plan_of_a_pool_that_scales_no_more_is_taken_down(store: Store) -> None:
    await store.put(PLANS + "prefill", msgspec.json.encode(PoolPlan(role=Role.PREFILL)))
    driven = Driven(store, TimedFleet(), settings())
    await driven.go(2)
    assert [entry.key for entry in await store.list(PLANS)] == [PLANS + "decode"]


async def test_an_outage_of_the_store_is_waited_for_and_said_once(
    driven: Driven, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Enough(Exception):
        pass

    looks = 0

    async def pause(seconds: float) -> None:
        nonlocal looks
        looks += 1
        driven.fleet.away = looks < 3
        driven.fleet.wait(2)
        if looks == 5:
            raise Enough

    monkeypatch.setattr("tandem.fleet.autoscale.asyncio.sleep", pause)
    driven.fleet.away = True
    with pytest.raises(Enough):
        await driven.scaler.run()
    assert [line for line in caplog.messages if "store" in line] == ["autoscaling waits for the store: Redis is away."]
    assert await driven.store.get(PLANS + "decode") is not None


def test_a_fleet_without_autoscaling_or_with_an_operator_has_none_and_a_budget_that_is_too_small_is_named() -> None:
    assert autoscale_settings(FleetConfig()) is None
    operated = FleetConfig.model_validate({"decode": {"autoscaling": {}}, "ray": {"group_resources": True}})
    assert autoscale_settings(operated) is None
    config = FleetConfig.model_validate(
        {"decode": {"nodes": 2, "autoscaling": {"min_groups": 2}}, "planning": {"gpu_budget": 3}}
    )
    with pytest.raises(ValueError, match=r"gpu_budget \(3\) cannot hold"):
        autoscale_settings(config)


def test_status_shows_what_is_wanted_why_and_what_keeps_it_from_acting() -> None:
    shown = PoolPlan(role=Role.DECODE, wanted=2, reason="more tokens", since=940.0, held="cool-down")
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(fleet_view(FleetSnapshot(name="f", plans=(shown,)), {}, 1000.0))
    assert "decode: 2 groups wanted for 1 min  more tokens  (waits: cool-down)" in console.export_text()
