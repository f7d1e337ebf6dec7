"""Limits, keys and usage records over four whole gateway replicas that share a real Redis, which dies in between."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import subprocess
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest

from support.redis_server import RedisServer
from tandem.config import FleetConfig
from tandem.core.types import Group, GroupState, Role
from tandem.core.usage import UsageRecord
from tandem.engine.http1 import Pool, Response
from tandem.gateway import assembly
from tandem.gateway.access.keys import KeyRecord, keep, mint, revoke
from tandem.gateway.access.shared_limits import SharedLimits
from tandem.gateway.replica import GatewayReplica
from tandem.gateway.usage.stream import UsageStream
from tandem.state import Store, open_store
from unit.gateway.engine_standin import Engine, Script, engine
from unit.gateway.gateway_model import model_folder

REPLICAS = 4
PATIENT_S = 10.0
"""Four replicas, their clients and the engines share one interpreter here: a Redis that is merely slow to be heard must
not count as gone. One that was killed is found out at once, whatever the deadline."""
WITHIN_S = 20.0
UNEVEN = (1500, 1000, 480, 20)
"""3,000 requests. The last replica gets fewer than its share of 300: shares alone would not make up the limit."""
ANSWER = 3
"""Output tokens of each request."""
_fleets = itertools.count()


class KeptRedis(RedisServer):
    """A Redis that still has everything when it is started again, as the state of a fleet must."""

    def start(self) -> None:
        options = ["--port", "0", "--unixsocket", str(self._socket), "--dir", str(self._folder)]
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "redis-server", *options, "--save", "", "--appendonly", "yes"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "ready to accept connections" in line.lower():
                threading.Thread(target=self._process.stdout.read, daemon=True).start()
                return
        raise RuntimeError(f"redis-server ended with {self._process.wait(5)} instead of starting")


class Place:
    """Four replicas, their engines and their Redis; and a client that notes what it was answered."""

    def __init__(self, redis: KeptRedis, name: str, store: Store, engines: dict[str, Engine]) -> None:
        self.redis = redis
        self.name = name
        self.store = store
        self.engines = engines
        self.replicas: list[GatewayReplica] = []
        self.urls: list[str] = []
        self.limits: list[SharedLimits] = []
        self.keys: dict[str, bytes] = {}
        self.records: dict[str, KeyRecord] = {}
        self.answered: dict[str, Counter[int]] = {}
        self.slowest = 0.0
        self._pool = Pool()

    async def ask(self, tenant: str, replica: int) -> int:
        """Send one request; the status."""
        body = orjson.dumps({"model": "tiny", "prompt": [5, 6], "max_tokens": 9})
        headers = [(b"authorization", b"Bearer " + self.keys[tenant])]
        began = time.monotonic()
        begun = self._pool.begin("POST", f"{self.urls[replica]}/v1/completions", body=body, headers=headers)
        response = begun if isinstance(begun, Response) else await begun
        try:
            status = await response.head(WITHIN_S)
            await response.read(WITHIN_S)
        finally:
            response.close()
        if status == 429:
            assert response.headers[b"retry-after"]
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.answered.setdefault(tenant, Counter())[status] += 1
        return status

    async def drive(self, tenant: str, each: int | Sequence[int], *, at_once: int = 6) -> int:
        """Send so many requests to each replica, `at_once` at a time; how many were served."""
        counts = [each] * REPLICAS if isinstance(each, int) else each

        async def worker(replica: int, numbers: Iterator[int]) -> int:
            return sum([await self.ask(tenant, replica) == 200 for _ in numbers])

        numbers = [iter(range(count)) for count in counts]
        workers = [worker(replica, numbers[replica]) for replica in range(REPLICAS) for _ in range(at_once)]
        return sum(await asyncio.gather(*workers))

    async def settled(self) -> None:
        """Return when Redis knows all that the replicas have told it so far: a request that it counts comes after."""
        for replica in range(REPLICAS):
            assert await self.ask("calm", replica) == 200

    async def back_in_redis(self) -> None:
        """Return when limits are counted together again."""
        await until(lambda: all(limits.shared for limits in self.limits))
        await self.settled()

    async def statement(self, tenants: Collection[str]) -> list[UsageRecord]:
        """Stop the replicas; the usage records of these tenants in the end, at least one for each of their requests."""
        await self.stop()
        expected = sum(self.answered[tenant].total() for tenant in tenants)
        stream = UsageStream(self.redis.url, fleet=self.name)
        found: list[UsageRecord] = []
        try:
            async with asyncio.timeout(WITHIN_S):
                while len(found) < expected:
                    all_records = [msgspec.json.decode(line, type=UsageRecord) async for line in stream.read()]
                    found = [record for record in all_records if record.tenant in tenants]
                    await asyncio.sleep(0.01)
        finally:
            await stream.close()
        return found

    async def stop(self) -> None:
        """Stop the replicas. Idempotent."""
        await self._pool.close()
        await asyncio.gather(*(asyncio.to_thread(replica.stop, 2) for replica in self.replicas))


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WITHIN_S):
        while not holds():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def place(folder: Path, monkeypatch: pytest.MonkeyPatch, **tenants: dict[str, Any]) -> AsyncIterator[Place]:
    """Four replicas that have announced themselves; each of `tenants`, and `calm`, has a key."""
    if shutil.which("redis-server") is None:
        pytest.skip("needs redis-server (Debian, Ubuntu: apt install redis-server); CI has it")
    tenants["calm"] = {"requests_per_minute": 100_000, "concurrency": 1000}
    name = f"quotas-{next(_fleets)}"
    gateway = {"port": 0, "grpc_port": 0, "auth": "required", "replicas": REPLICAS}
    admission = {"running_per_decode_rank": 1000}
    config = FleetConfig.model_validate(
        {"name": name, "gateway": gateway, "tenants": tenants, "admission": admission, "metering": {"sink": "redis"}}
    )
    model_folder(folder / "tiny")
    redis = KeptRedis()
    redis.start()
    try:
        store = await open_store(redis.url, fleet=name, folder=folder, deadline=WITHIN_S)
        async with engine("prefill") as prefill, engine("decode") as decode:
            made = Place(redis, name, store, {"prefill": prefill, "decode": decode})
            for one in (prefill, decode):
                one.default = Script(ids=[70] * (ANSWER if one is decode else 1))
                group = Group(group=one.role, role=Role(one.role), epoch=1, state=GroupState.READY, url=one.url)
                await store.put(f"groups/{one.role}", msgspec.json.encode(group))
            for tenant in tenants:
                made.records[tenant], key = mint(tenant, now=time.time())
                made.keys[tenant] = key.encode()
                assert await keep(store, made.records[tenant])
            monkeypatch.setattr(assembly, "open_limits", partial(_patient, made.limits))
            for _ in range(REPLICAS):
                replica = GatewayReplica(
                    config, model_path=folder / "tiny", store_url=redis.url, folder=folder / "store"
                )
                made.replicas.append(replica)
                made.urls.append((await asyncio.to_thread(replica.start, WITHIN_S)).url)
            await until(lambda: {limits._local._replicas() for limits in made.limits} == {REPLICAS})
            try:
                yield made
            finally:
                await made.stop()
        await store.close()
    finally:
        redis.remove()


def _patient(made: list[SharedLimits], url: str, **told: Any) -> SharedLimits:
    made.append(SharedLimits(url, **told, deadline=PATIENT_S))
    return made[-1]


async def test_ten_times_the_limit_over_four_replicas_serves_the_limit_and_harms_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with place(tmp_path, monkeypatch, greedy={"requests_per_minute": 300}, polite={}) as fleet:
        began = time.monotonic()
        served, unharmed = await asyncio.gather(fleet.drive("greedy", UNEVEN), fleet.drive("polite", 50, at_once=1))
        took = time.monotonic() - began
        assert took < 60, "the machine is too slow: the first of the minute are free again"
        print(f"3,000 requests in {took:.1f} s: {served} served, and {unharmed} of 200 of the other tenant")
        assert abs(served - 300) <= 3
        assert unharmed == 200
        assert set(fleet.answered["greedy"]) == {200, 429}
        records = await fleet.statement(["greedy", "polite"])
        assert len({record.id for record in records}) == len(records) == 3200
        assert Counter(record.outcome for record in records) == {
            "ok": served + 200,
            "rate_limit_exceeded": 3000 - served,
        }
        assert sum(record.completion_tokens for record in records) == ANSWER * (served + 200)


async def test_as_many_run_at_once_as_may_over_four_replicas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with place(tmp_path, monkeypatch, greedy={"concurrency": 20}) as fleet:
        decode = fleet.engines["decode"]
        for _ in range(2):
            go = asyncio.Event()
            decode.default = Script(ids=[70] * ANSWER, go=go)
            before = fleet.answered.setdefault("greedy", Counter())[429]
            driving = asyncio.create_task(fleet.drive("greedy", (120, 60, 18, 2), at_once=120))
            await until(lambda before=before: fleet.answered["greedy"][429] - before >= 180)
            await decode.until(lambda: len(decode.running) >= 20)
            # All 200 have been answered or run: more cannot come.
            assert len(decode.running) == 20
            decode.default = Script(ids=[70] * ANSWER)
            assert await fleet.drive("calm", 5) == 20
            go.set()
            assert await driving == 20
            await fleet.settled()


async def test_a_redis_that_dies_fails_no_request_and_limits_hold_exactly_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"greedy": {"requests_per_minute": 200}, "part": {"requests_per_minute": 300}}
    async with place(tmp_path, monkeypatch, **limits, few={"concurrency": 8}) as fleet:
        enough = asyncio.Event()
        calm = asyncio.create_task(_trickle(fleet, enough))
        with_redis = await fleet.drive("greedy", 10)
        assert with_redis == 40
        fleet.redis.stop()
        # Each replica has its share, and knows what it granted before.
        assert await fleet.drive("greedy", 100) == 200 - 40
        assert not any(limits.shared for limits in fleet.limits)
        assert await fleet.drive("part", 25) == 100
        await _few_at_once(fleet)
        fleet.redis.start()
        await fleet.back_in_redis()
        assert await fleet.drive("greedy", 50) == 0
        assert await fleet.drive("part", (300, 300, 300, 10)) == 200
        enough.set()
        await calm
        answered = fleet.answered
        print({tenant: dict(counted) for tenant, counted in answered.items()}, f"slowest {fleet.slowest:.2f} s")
        assert set(answered["calm"]) == {200}
        assert {status for counted in answered.values() for status in counted} == {200, 429}
        records = await fleet.statement(list(answered))
        assert len({record.id for record in records}) == len(records)
        told = Counter((record.tenant, record.outcome == "ok") for record in records)
        assert told == {
            (tenant, status == 200): number
            for tenant, counted in answered.items()
            for status, number in counted.items()
        }


async def _trickle(fleet: Place, enough: asyncio.Event) -> None:
    """A tenant far below its limits, all the time."""
    for replica in itertools.cycle(range(REPLICAS)):
        await fleet.ask("calm", replica)
        await asyncio.sleep(0.01)
        if enough.is_set():
            return


async def _few_at_once(fleet: Place) -> None:
    """Without Redis each replica runs its share of `few`'s eight."""
    decode, go = fleet.engines["decode"], asyncio.Event()
    usual, decode.default = decode.default, Script(ids=[70] * ANSWER, go=go)
    driving = asyncio.create_task(fleet.drive("few", 10, at_once=10))
    await until(lambda: fleet.answered.get("few", Counter())[429] >= 32)
    decode.default = usual
    go.set()
    assert await driving == 8


async def test_a_revoked_key_stops_working_on_every_replica(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with place(tmp_path, monkeypatch, acme={}) as fleet:
        assert await fleet.drive("acme", 5) == 20
        await revoke(fleet.store, fleet.records["acme"].id, now=time.time())
        began = time.monotonic()

        async def refused(replica: int) -> None:
            while await fleet.ask("acme", replica) != 401:
                await asyncio.sleep(0.005)

        async with asyncio.timeout(WITHIN_S):
            await asyncio.gather(*(refused(replica) for replica in range(REPLICAS)))
        took = time.monotonic() - began
        print(f"the key was refused by all replicas after {took * 1000:.0f} ms")
        assert took < 2
        assert await fleet.drive("acme", 5) == 0
        assert set(fleet.answered["acme"]) == {200, 401}
