"""What a gateway replica tells of its traffic is what its metrics have counted, and gets to the store by itself."""

from __future__ import annotations

import asyncio
import time

import msgspec
import pytest
from engine_standin import Script
from gateway_model import ids_of
from gateway_world import World, saying, world
from test_gateway_replica import COMPLETION, Place, ask, place, running, until

from tandem.config import FleetConfig
from tandem.core.answer_times import SIDE
from tandem.core.tenants import Priority
from tandem.core.traffic import BOUNDS, TRAFFIC, TrafficReport
from tandem.core.types import FleetSnapshot, Group, GroupState, PoolPlan, Role
from tandem.fleet.snapshot import read_traffic
from tandem.gateway.access.admission_metrics import AdmissionMetrics
from tandem.gateway.assembly import summoned
from tandem.gateway.observe import metrics as metrics_module
from tandem.gateway.observe import traffic
from tandem.gateway.observe.metrics import Metrics
from tandem.gateway.observe.traffic import TrafficTeller
from tandem.state import StoreError

__all__ = ["place"]


def teller(w: World, snapshot: FleetSnapshot | None = None) -> TrafficTeller:
    return TrafficTeller(
        w.store,
        w.service.metrics,
        w.service.admission,
        parked=lambda: w.driver.table.parked,
        fleet=lambda: snapshot or FleetSnapshot(),
        replica="g1",
        incarnation="f00",
    )


def ready(role: Role) -> Group:
    return Group(group=f"{role}-0", role=role, epoch=1, state=GroupState.READY)


def test_prometheus_buckets_are_among_those_of_the_reports() -> None:
    assert {*metrics_module._FIRST, *metrics_module._BETWEEN} <= set(BOUNDS)


def test_prometheus_is_told_the_same_although_it_is_counted_more_finely() -> None:
    metrics = Metrics()
    for seconds in (0.0004, 0.02, 0.021, 0.3, 700.0):
        metrics.first_token.observe(seconds)
    found = metrics.registry.get_sample_value
    name = "tandem_time_to_first_token_seconds"
    assert [found(f"{name}_bucket", {"le": le}) for le in ("0.01", "0.025", "0.25", "0.5", "160.0", "+Inf")] == [
        1, 3, 3, 4, 4, 5,
    ]  # fmt: skip
    assert found(f"{name}_count") == 5


async def test_a_report_holds_what_requests_came_to_and_what_they_took() -> None:
    async with world("p0", "d0") as w:
        for one in w.engines.values():
            one.default = saying("hello")
        before = time.time()
        await w.complete(max_tokens=20)
        await w.complete(max_tokens=-1)
        told = teller(w).report()
    assert (told.replica, told.incarnation) == ("g1", "f00")
    assert before - 1 < told.started <= told.at < time.time() + 1
    assert (told.arrived, told.admitted, told.finished, told.refused_other, told.failed) == (2, 1, 1, 1, 0)
    assert (told.input_tokens, told.output_tokens) == (2, len(ids_of("hello")) + 1)
    assert sum(told.ttft) == 1
    assert sum(told.itl) < told.output_tokens
    assert (told.answers[0], sum(told.answers[2::2])) == (SIDE, 1)
    assert (told.running, told.queue_length, told.queue_oldest_s) == (0, 0, 0.0)


@pytest.mark.parametrize(
    ("reason", "field"),
    [
        ("queue_full", "refused_busy"),
        ("deadline", "refused_busy"),
        ("concurrency", "refused_limit"),
        ("limit_output", "refused_limit"),
        ("invalid_api_key", "refused_other"),
        ("internal_error", ""),
    ],
)
async def test_refusals_are_told_by_what_would_have_helped(reason: str, field: str) -> None:
    async with world("p0", "d0") as w:
        AdmissionMetrics(w.service.metrics).refused("acme", Priority.LOW, reason)
        told = teller(w).report()
    fields = ("refused_busy", "refused_limit", "refused_other")
    assert {name: getattr(told, name) for name in fields} == {name: int(name == field) for name in fields}


async def test_a_queue_is_told_with_how_long_the_oldest_has_waited() -> None:
    async with world("p0", "d0") as w:
        w.service.admission.set_capacity(1)
        for one in w.engines.values():
            one.scripts.append(Script(finish=None))
            one.default = saying("hello")
        first = w.call("/v1/completions", {"model": "tiny", "prompt": [5], "stream": True})
        running = asyncio.create_task(first.run())
        await first.until_body(b"data:")
        others = [asyncio.create_task(w.complete()) for _ in range(2)]
        await w.until(lambda: w.service.admission.waiting(Priority.NORMAL) == 2)
        since = asyncio.get_running_loop().time()
        await w.until(lambda: asyncio.get_running_loop().time() > since)
        told = teller(w).report()
        first.leave()
        await asyncio.gather(running, *others)
        after = teller(w).report()
    assert (told.queue_length, told.running, told.arrived) == (2, 1, 3)
    assert 0 < told.queue_oldest_s < 5
    assert (after.queue_length, after.queue_oldest_s, after.running) == (0, 0.0, 0)
    assert (after.client_gone, after.finished) == (1, 2)


@pytest.mark.parametrize(
    ("there", "waiting"), [([Role.PREFILL], (0, 1)), ([Role.DECODE], (1, 0)), ([], (1, 1)), (list(Role), (1, 1))]
)
async def test_who_waits_for_a_group_waits_for_the_roles_that_have_none(
    there: list[Role], waiting: tuple[int, int]
) -> None:
    async with world("p0", "d0", capacity_wait_s=30) as w:
        w.group("d0", state=GroupState.STARTING)
        for one in w.engines.values():
            one.default = saying("hello")
        call = asyncio.create_task(w.complete())
        await w.until(lambda: w.driver.table.parked == 1)
        told = teller(w, FleetSnapshot(groups=tuple(map(ready, there)))).report()
        w.group("d0")
        await call
    assert (told.waiting_prefill, told.waiting_decode) == waiting


async def test_requests_that_find_no_group_are_told() -> None:
    async with world("p0", "d0") as w:
        w.driver.remove_group("d0")
        assert (await w.complete()).status == 503
        told = teller(w).report()
    assert (told.no_capacity, told.failed, told.finished) == (1, 1, 0)


async def test_while_the_store_is_away_it_is_said_once_and_nothing_but_news_is_lost(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(traffic, "EVERY_S", 0.0)
    async with world("p0", "d0") as w:
        put, tries = w.store.put, 0

        async def away(key: str, value: bytes, *, ttl: float | None = None) -> int:
            nonlocal tries
            tries += 1
            if tries <= 5:
                raise StoreError("Redis is away.")
            return await put(key, value, ttl=ttl)

        monkeypatch.setattr(w.store, "put", away)
        keeping = asyncio.create_task(teller(w).keep())
        await w.until(lambda: tries > 6)  # so the first that succeeded is over
        keeping.cancel()
        await asyncio.wait([keeping])
        assert [one.replica for one in await read_traffic(w.store)] == ["g1"]
    assert [record.getMessage() for record in caplog.records if "traffic" in record.getMessage()] == [
        "cannot tell the fleet of the traffic: Redis is away."
    ]


async def test_a_replica_tells_the_store_of_its_traffic(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "EVERY_S", 0.02)
    await place.announce()
    place.engines[1].default = Script(ids=ids_of("hi there"))
    async with running(place.replica()) as record:
        await until(record.url, "/ready", 200)
        assert (await ask(record.url, "/v1/completions", COMPLETION))[0] == 200
        async with asyncio.timeout(5):
            async for change in place.store.watch(TRAFFIC):
                assert change.value is not None
                told = msgspec.json.decode(change.value, type=TrafficReport)
                if told.finished:
                    break
    assert (told.replica, told.incarnation) == (record.replica, record.incarnation)
    assert told.output_tokens == len(ids_of("hi there"))


async def test_what_autoscaling_wants_is_on_the_pages(place: Place) -> None:
    async with running(place.replica()) as record:
        plan = PoolPlan(role=Role.DECODE, wanted=2, reason="time between tokens", since=5.0)
        await place.store.put("planning/decode", msgspec.json.encode(plan))
        async with asyncio.timeout(5):
            while not (found := (await ask(record.url, "/fleet"))[1]["plans"]):
                await asyncio.sleep(0.02)
        _, metrics = await ask(record.url, "/metrics")
    assert [one["reason"] for one in found] == ["time between tokens"]
    assert f'tandem_planning_wanted_groups{{replica="{record.replica}",role="decode"}} 2.0'.encode() in metrics


def test_only_a_pool_that_may_be_empty_is_waited_for() -> None:
    config = FleetConfig.model_validate({"prefill": {"autoscaling": {}}, "decode": {"autoscaling": {"min_groups": 0}}})
    assert summoned(config) == {Role.DECODE}


def test_a_role_that_the_operator_gives_a_group_when_somebody_asks_is_waited_for() -> None:
    assert summoned(FleetConfig.model_validate({"gateway": {"summoned": ["prefill"]}})) == {Role.PREFILL}
