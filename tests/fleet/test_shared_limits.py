"""Limits that four gateways share through a real Redis."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from support.redis_server import RedisServer, Silence
from tandem.core.rate_limit import Account, Budget
from tandem.core.tenants import Tenant
from tandem.gateway.access.limits import Denial, Grant, quota_of
from tandem.gateway.access.shared_limits import DEADLINE_S, SharedLimits

REPLICAS = 4
PATIENT_S = 10.0
"""A deadline that no busy machine misses, for tests that are about numbers."""
_fleets = itertools.count()


class Clock:
    """Seconds that pass when the test says so; starts as a slot does."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


Opener = Callable[..., Awaitable[list[SharedLimits]]]


@pytest.fixture
async def open_gateways() -> AsyncIterator[Opener]:
    """Start four gateways' limits, each with its own connection."""
    opened: list[SharedLimits] = []

    async def open_them(url: str, clock: Clock | None, deadline: float = PATIENT_S) -> list[SharedLimits]:
        fleet = f"fleet-{next(_fleets)}"
        for index in range(REPLICAS):
            limits = SharedLimits(
                url, fleet=fleet, replica=f"g{index}", replicas=lambda: REPLICAS, deadline=deadline, clock=clock
            )
            await limits.start()
            opened.append(limits)
        return opened

    yield open_them
    for limits in opened:
        await limits.close()


async def ask_all(
    gateways: list[SharedLimits], tenant: Tenant, tokens: int, times: int, answer: int = 0
) -> tuple[int, list[Denial]]:
    """Each gateway is asked `times` times at once; what is granted ends at once with so long an answer."""
    asked = [gateway.take(tenant, tokens, 1000) for gateway in gateways for _ in range(times)]
    replies = await asyncio.gather(*asked)
    granted = 0
    for number, reply in enumerate(replies):
        if isinstance(reply, Grant):
            granted += 1
            gateways[number // times].settle(reply, answer)
    return granted, [reply for reply in replies if isinstance(reply, Denial)]


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():
            await asyncio.sleep(0.01)


def all_shared(gateways: list[SharedLimits]) -> Callable[[], bool]:
    return lambda: all(gateway.shared for gateway in gateways)


@pytest.mark.parametrize(
    ("tenant", "tokens"),
    [(Tenant(name="a", requests_per_minute=300), 10), (Tenant(name="a", input_tokens_per_minute=30_000), 100)],
)
async def test_ten_times_the_limit_at_four_gateways_is_admitted_within_a_percent_of_it(
    redis_server: RedisServer, open_gateways: Opener, tenant: Tenant, tokens: int
) -> None:
    clock = Clock()
    gateways = await open_gateways(redis_server.url, clock)
    granted = []
    for _ in range(3 * 60):  # three minutes: 52 requests in each second, 5 of which may be
        count, _ = await ask_all(gateways, tenant, tokens, 13)
        granted.append(count)
        clock.now += 1
    assert all(gateway.shared for gateway in gateways)
    for minute in range(3):
        assert sum(granted[minute * 60 : minute * 60 + 60]) == pytest.approx(300, rel=0.01)
    for start in range(len(granted) - 60):
        assert sum(granted[start : start + 60]) <= 300


async def test_redis_counts_as_the_pure_arithmetic_does(redis_server: RedisServer, open_gateways: Opener) -> None:
    clock = Clock()
    gateways = await open_gateways(redis_server.url, clock)
    tenant = Tenant(name="a", requests_per_minute=6, input_tokens_per_minute=1300, output_tokens_per_minute=900)
    quota, account, draw = quota_of(tenant), Account(), random.Random(7)
    outcomes = Counter[str]()
    for _ in range(600):
        clock.now += draw.choice([0, 0.125, 0.5, 3, 20])
        tokens, answer = draw.randint(1, 400), draw.randint(1, 300)
        shortage = account.shortage(quota, tokens, clock.now)
        gateway = draw.choice(gateways)
        reply = await gateway.take(tenant, tokens, answer)
        if shortage is None:
            assert isinstance(reply, Grant)
            refund = draw.random() < 0.1
            account.spend(quota, (1, tokens, 0), clock.now)
            account.spend(quota, (-1, -tokens, 0) if refund else (0, 0, answer), clock.now)
            gateway.settle(reply, answer, refund=refund)
            await gateway.take(Tenant(name="other", concurrency=1), 1, 1)  # what was settled went before
            await gateway.take(Tenant(name="other", concurrency=1), 1, 1)
            outcomes["granted"] += 1
        else:
            assert isinstance(reply, Denial)
            assert reply.shortage is not None
            assert reply.shortage.budget is shortage.budget
            assert reply.shortage.wait_s == pytest.approx(shortage.wait_s, abs=0.001)
            outcomes[shortage.budget] += 1
        told = {reading.budget: reading for reading in account.readings(quota, clock.now)}
        if isinstance(reply, Denial):
            for reading in reply.readings:
                assert reading.remaining == told[reading.budget].remaining
                assert reading.reset_s == pytest.approx(told[reading.budget].reset_s, abs=0.001)
    assert min(outcomes[kind] for kind in ("granted", *Budget)) > 5


async def test_output_is_debited_when_it_is_known_and_evens_out(
    redis_server: RedisServer, open_gateways: Opener
) -> None:
    clock = Clock()
    gateways = await open_gateways(redis_server.url, clock)
    tenant = Tenant(name="a", output_tokens_per_minute=60_000)
    used = 0
    for _ in range(5 * 60):
        count, _ = await ask_all(gateways, tenant, 10, 3, answer=900)
        used += 900 * count
        clock.now += 1
    assert used == pytest.approx(5 * 60_000, rel=0.02)


async def test_what_is_said_about_when_to_come_back_is_true_to_the_millisecond(
    redis_server: RedisServer, open_gateways: Opener
) -> None:
    clock = Clock()
    first, second, *_ = await open_gateways(redis_server.url, clock)
    tenant = Tenant(name="a", input_tokens_per_minute=1000)
    for tokens in (300, 300, 300):
        assert isinstance(await first.take(tenant, tokens, 10), Grant)
        clock.now += 7.1
    denied = await second.take(tenant, 500, 10)
    assert isinstance(denied, Denial)
    assert denied.shortage is not None
    assert denied.shortage.budget is Budget.INPUT
    assert denied.shortage.wait_s < 60
    clock.now += denied.shortage.wait_s - 0.002
    assert isinstance(await first.take(tenant, 500, 10), Denial)
    clock.now += 0.002
    assert isinstance(await second.take(tenant, 500, 10), Grant)


async def test_a_request_that_could_never_run_is_told_so(redis_server: RedisServer, open_gateways: Opener) -> None:
    gateways = await open_gateways(redis_server.url, Clock())
    denied = await gateways[0].take(Tenant(name="a", input_tokens_per_minute=1000), 1001, 10)
    assert isinstance(denied, Denial)
    assert denied.shortage is not None
    assert math.isinf(denied.shortage.wait_s)


async def test_concurrency_is_counted_over_all_gateways(redis_server: RedisServer, open_gateways: Opener) -> None:
    gateways = await open_gateways(redis_server.url, Clock())
    tenant = Tenant(name="a", concurrency=3)
    grants = [await gateway.take(tenant, 10, 10) for gateway in gateways]
    assert [isinstance(grant, Grant) for grant in grants] == [True, True, True, False]
    assert isinstance(grants[0], Grant)
    gateways[0].settle(grants[0], 5)
    await asyncio.gather(*(gateway.take(Tenant(name="other", concurrency=1), 1, 1) for gateway in gateways))
    assert isinstance(await gateways[3].take(tenant, 10, 10), Grant)


async def test_what_a_dead_gateway_ran_is_forgotten_when_its_lease_ends(
    redis_server: RedisServer, open_gateways: Opener
) -> None:
    clock = Clock()
    gateways = await open_gateways(redis_server.url, clock)
    tenant = Tenant(name="a", concurrency=1)
    assert isinstance(await gateways[0].take(tenant, 10, 10), Grant)
    clock.now += 29
    assert isinstance(await gateways[1].take(tenant, 10, 10), Denial)
    clock.now += 2
    assert isinstance(await gateways[1].take(tenant, 10, 10), Grant)


async def test_a_refund_gives_back_what_was_taken(redis_server: RedisServer, open_gateways: Opener) -> None:
    clock = Clock()
    first, second, *_ = await open_gateways(redis_server.url, clock)
    tenant = Tenant(name="a", requests_per_minute=1, input_tokens_per_minute=100)
    grant = await first.take(tenant, 100, 10)
    assert isinstance(grant, Grant)
    first.settle(grant, 0, refund=True)
    await first.take(Tenant(name="other", concurrency=1), 1, 1)
    await first.take(Tenant(name="other", concurrency=1), 1, 1)
    assert isinstance(await second.take(tenant, 100, 10), Grant)


async def test_a_client_that_leaves_while_redis_is_asked_uses_nothing_up(
    redis_server: RedisServer, open_gateways: Opener
) -> None:
    gateways = await open_gateways(redis_server.url, Clock())
    tenant = Tenant(name="a", requests_per_minute=1, concurrency=1)
    asking = asyncio.create_task(gateways[0].take(tenant, 10, 10))
    await asyncio.sleep(0)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await asking
    assert asking.cancelled()
    for _ in range(3):
        await gateways[0].take(Tenant(name="other", concurrency=1), 1, 1)
    assert isinstance(await gateways[1].take(tenant, 10, 10), Grant)


async def test_idle_tenants_leave_nothing_in_redis_for_long(redis_server: RedisServer, open_gateways: Opener) -> None:
    from redis.asyncio import Redis

    gateways = await open_gateways(redis_server.url, None)
    tenant = Tenant(name="idle", requests_per_minute=9, input_tokens_per_minute=99, output_tokens_per_minute=9)
    grant = await gateways[0].take(tenant, 10, 10)
    assert isinstance(grant, Grant)
    gateways[0].settle(grant, 20)
    await gateways[0].take(Tenant(name="other", concurrency=1), 1, 1)
    async with Redis.from_url(redis_server.url) as redis:
        keys = [key async for key in redis.scan_iter("*:limits:idle:*")]
        assert len(keys) >= 3
        for key in keys:
            assert 0 < await redis.ttl(key) < 60 * 5


async def test_redis_may_die_and_come_back_without_its_data_and_no_request_notices() -> None:
    server = RedisServer()
    server.start()
    clock = Clock()
    gateways = [
        SharedLimits(server.url, fleet="f", replica=f"g{i}", replicas=lambda: REPLICAS, deadline=PATIENT_S, clock=clock)
        for i in range(REPLICAS)
    ]
    try:
        for gateway in gateways:
            await gateway.start()
        tenant = Tenant(name="a", requests_per_minute=300)
        granted: list[int] = []

        async def seconds(count: int) -> None:
            for _ in range(count):
                granted.append((await ask_all(gateways, tenant, 10, 13))[0])
                clock.now += 1

        await seconds(60)
        server.stop()
        await seconds(120)
        assert not any(gateway.shared for gateway in gateways)
        server.start()
        await until(all_shared(gateways))
        await seconds(120)
        assert all(gateway.shared for gateway in gateways)
    finally:
        for gateway in gateways:
            await gateway.close()
        server.remove()
    assert sum(granted) == pytest.approx(5 * 300, rel=0.01)
    for start in range(len(granted) - 60):
        assert sum(granted[start : start + 60]) <= 300 * 1.01


async def test_what_was_granted_alone_is_debited_when_redis_is_back(open_gateways: Opener) -> None:
    server = RedisServer()
    server.start()
    try:
        clock = Clock()
        gateways = await open_gateways(server.url, clock)
        tenant = Tenant(name="a", requests_per_minute=100)
        server.stop()
        # The first call finds out; nobody waits for a Redis that is not there.
        granted, _ = await ask_all(gateways[:3], tenant, 10, 100)
        assert granted == 75
        server.start()
        await until(all_shared(gateways))
        granted, _ = await ask_all(gateways, tenant, 10, 100)
        assert granted == 25
    finally:
        for gateway in gateways:
            await gateway.close()
        server.remove()


async def test_a_redis_that_comes_back_empty_is_told_what_it_knew(open_gateways: Opener) -> None:
    server = RedisServer()
    server.start()
    try:
        clock = Clock()
        gateways = await open_gateways(server.url, clock)
        tenant = Tenant(name="a", requests_per_minute=100)
        assert (await ask_all(gateways, tenant, 10, 25))[0] == 100
        clock.now += 30
        server.stop()
        server.start()
        assert (await ask_all(gateways, tenant, 10, 25))[0] == 0
        await until(all_shared(gateways))
        assert (await ask_all(gateways, tenant, 10, 25))[0] == 0
        clock.now += 30.25
        assert (await ask_all(gateways, tenant, 10, 50))[0] == 100
    finally:
        for gateway in gateways:
            await gateway.close()
        server.remove()


async def test_what_was_granted_alone_counts_from_when_it_was_used(
    redis_server: RedisServer, open_gateways: Opener
) -> None:
    clock = Clock()
    gateways = await open_gateways(redis_server.url, clock)
    tenant = Tenant(name="a", requests_per_minute=100)
    gateways[0]._line.take_down("the test says so")
    granted, _ = await ask_all(gateways[:1], tenant, 10, 100)
    assert granted == 25
    clock.now += 50
    await until(all_shared(gateways))
    granted, _ = await ask_all(gateways, tenant, 10, 100)
    assert granted == 75
    clock.now += 10.5
    granted, _ = await ask_all(gateways, tenant, 10, 100)
    assert granted == 25


async def test_a_redis_that_hangs_costs_each_request_no_more_than_the_deadline(redis_server: RedisServer) -> None:
    limits = SharedLimits(redis_server.url, fleet="hang", replica="g", replicas=lambda: 1)
    await limits.start()
    tenant = Tenant(name="a", requests_per_minute=1000)
    try:
        await until(lambda: limits.shared)
        with redis_server.frozen():
            begun = time.monotonic()
            replies = await asyncio.gather(*(limits.take(tenant, 1, 1) for _ in range(20)))
            first = time.monotonic() - begun
            assert all(isinstance(reply, Grant) for reply in replies)
            assert not limits.shared
            begun = time.monotonic()
            assert isinstance(await limits.take(tenant, 1, 1), Grant)
            second = time.monotonic() - begun
        assert first < DEADLINE_S + 1.0  # the rest is the machine's
        assert second < DEADLINE_S  # nobody waits again
        await until(lambda: limits.shared)
    finally:
        await limits.close()


async def test_a_redis_that_was_never_there_stops_nobody() -> None:
    with Silence() as port:
        limits = SharedLimits(f"redis://:secret@127.0.0.1:{port}/0", fleet="f", replica="g", replicas=lambda: 2)
        await limits.start()
        try:
            assert not limits.shared
            grants = [await limits.take(Tenant(name="a", requests_per_minute=4), 1, 1) for _ in range(3)]
            assert [isinstance(grant, Grant) for grant in grants] == [True, True, False]
        finally:
            await limits.close()


def test_an_address_that_is_none_is_refused_without_its_password() -> None:
    with pytest.raises(ValueError, match="not a Redis URL") as caught:
        SharedLimits("http://:secret@host", fleet="f", replica="g", replicas=lambda: 1)
    assert "secret" not in str(caught.value)
