"""The door of a gateway: waiting, leaving, and what clients are told."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest

from tandem.core.tenants import ANONYMOUS, Priority, Tenant
from tandem.gateway.access.admission import Admission, Ask, Permit, RateLimited, span
from tandem.gateway.access.limits import Denial, Grant, LocalLimits
from tandem.gateway.errors import ApiError

_names = itertools.count()


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watcher:
    """See `AdmissionObserver`."""

    def __init__(self) -> None:
        self.lengths: dict[Priority, int] = {}
        self.admissions: list[str] = []
        self.refusals: list[str] = []

    def queued(self, priority: Priority, length: int) -> None:
        self.lengths[priority] = length

    def admitted(self, tenant: str, priority: Priority, waited: float) -> None:
        self.admissions.append(tenant)

    def refused(self, tenant: str, priority: Priority, reason: str) -> None:
        self.refusals.append(reason)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watcher() -> Watcher:
    return Watcher()


@pytest.fixture
async def door(clock: Clock, watcher: Watcher) -> AsyncIterator[Admission]:
    """One gateway of one, with one slot."""
    admission = Admission(LocalLimits("g", lambda: 1, clock), slots=1, observer=watcher)
    await admission.start()
    yield admission
    await admission.close()


def ask(tenant: Tenant = ANONYMOUS, *, tokens: int = 10, patience: float = 60.0, **changes: object) -> Ask:
    fields = {
        "tenant": tenant,
        "request": f"r{next(_names)}",
        "input_tokens": tokens,
        "max_output_tokens": 1000,
        "priority": tenant.priority,
        "deadline": asyncio.get_running_loop().time() + patience,
    }
    return Ask(**(fields | changes))  # type: ignore[arg-type]


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def headers_of(headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in headers}


async def test_the_next_enters_when_one_has_left(door: Admission, watcher: Watcher) -> None:
    first = await door.enter(ask())
    second = asyncio.create_task(door.enter(ask()))
    await turns()
    assert watcher.lengths[Priority.NORMAL] == 1
    first.leave(5)
    permit = await second
    assert permit.waited >= 0
    assert watcher.lengths[Priority.NORMAL] == 0
    permit.leave(5)
    assert door.running == 0


async def test_leaving_twice_frees_one_place(door: Admission) -> None:
    first = await door.enter(ask())
    waiting = [asyncio.create_task(door.enter(ask())) for _ in range(2)]
    await turns()
    first.leave(1)
    first.leave(1)
    await turns()
    assert [task.done() for task in waiting] == [True, False]
    for task in waiting:
        (await task).leave(0)


async def test_a_client_that_leaves_the_queue_is_gone(door: Admission, watcher: Watcher) -> None:
    first = await door.enter(ask())
    waiting = asyncio.create_task(door.enter(ask()))
    await turns()
    waiting.cancel()
    await turns()
    assert waiting.cancelled()
    assert watcher.lengths[Priority.NORMAL] == 0
    first.leave(1)
    assert door.running == 0


@pytest.mark.parametrize("cancelled_first", [True, False])
async def test_a_client_that_leaves_just_as_its_turn_comes_takes_no_place(
    door: Admission, cancelled_first: bool
) -> None:
    first = await door.enter(ask())
    waiting = asyncio.create_task(door.enter(ask()))
    behind = asyncio.create_task(door.enter(ask()))
    await turns()
    if cancelled_first:
        waiting.cancel()
    first.leave(1)
    waiting.cancel()
    await turns()
    assert waiting.cancelled()
    (await behind).leave(1)
    assert door.running == 0


async def test_whoever_waits_to_its_deadline_gets_429_with_a_time_to_come_back(
    door: Admission, watcher: Watcher
) -> None:
    await door.enter(ask())
    with pytest.raises(ApiError) as caught:
        await door.enter(ask(patience=0.01))
    assert caught.value.status == 429
    assert caught.value.code == "overloaded"
    assert int(headers_of(caught.value.headers())["retry-after"]) >= 1
    assert watcher.refusals == ["deadline"]


async def test_a_limit_is_told_as_openai_tells_it(door: Admission, clock: Clock, watcher: Watcher) -> None:
    tenant = Tenant(name="acme", requests_per_minute=2, input_tokens_per_minute=1000)
    for _ in range(2):
        permit = await door.enter(ask(tenant, tokens=100))
        permit.leave(10)
    assert headers_of(permit.headers()) == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m1s",
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "800",
        "x-ratelimit-reset-tokens": "1m1s",
    }
    clock.now += 40
    with pytest.raises(RateLimited) as caught:
        await door.enter(ask(tenant, tokens=100))
    error = caught.value
    assert (error.status, error.type, error.code) == (429, "requests", "rate_limit_exceeded")
    assert error.message == "Rate limit reached for acme: 2 requests per minute. Please try again in 20.25s."
    told = headers_of(error.headers())
    assert told["retry-after"] == "21"
    assert told["retry-after-ms"] == "20250"
    assert told["x-ratelimit-remaining-requests"] == "0"
    assert watcher.refusals == ["limit_requests"]


async def test_a_request_that_can_never_run_is_told_not_to_come_again(door: Admission) -> None:
    with pytest.raises(RateLimited, match="too large") as caught:
        await door.enter(ask(Tenant(name="a", input_tokens_per_minute=1000), tokens=1001))
    assert caught.value.type == "tokens"
    told = headers_of(caught.value.headers())
    assert told["x-should-retry"] == "false"
    assert "retry-after" not in told


async def test_output_counts_when_it_is_known(door: Admission, clock: Clock) -> None:
    tenant = Tenant(name="a", output_tokens_per_minute=100)
    (await door.enter(ask(tenant))).leave(250)
    with pytest.raises(RateLimited) as caught:
        await door.enter(ask(tenant))
    clock.now += caught.value.retry_after
    (await door.enter(ask(tenant))).leave(1)


async def test_more_than_may_run_at_once_is_refused(door: Admission, watcher: Watcher) -> None:
    tenant = Tenant(name="a", concurrency=1)
    permit = await door.enter(ask(tenant))
    with pytest.raises(RateLimited) as caught:
        await door.enter(ask(tenant))
    assert caught.value.code == "rate_limit_exceeded"
    assert watcher.refusals == ["concurrency"]
    permit.leave(1)
    (await door.enter(ask(tenant))).leave(1)


async def test_what_the_queue_refuses_uses_no_limit_up(clock: Clock) -> None:
    door = Admission(LocalLimits("g", lambda: 1, clock), slots=1, max_waiting=0)
    tenant = Tenant(name="a", requests_per_minute=1)
    other = await door.enter(ask())
    with pytest.raises(ApiError):
        await door.enter(ask(tenant))
    other.leave(1)
    (await door.enter(ask(tenant))).leave(1)


async def test_a_client_that_leaves_the_queue_has_used_no_limit_up(door: Admission) -> None:
    tenant = Tenant(name="a", requests_per_minute=1)
    first = await door.enter(ask())
    waiting = asyncio.create_task(door.enter(ask(tenant)))
    await turns()
    waiting.cancel()
    await turns()
    first.leave(1)
    (await door.enter(ask(tenant))).leave(1)


async def test_nobody_asks_for_a_higher_class_than_its_tenant_has(door: Admission) -> None:
    permit = await door.enter(ask(Tenant(name="a", priority=Priority.LOW), priority=Priority.HIGH))
    assert permit.priority is Priority.LOW
    permit.leave(1)
    permit = await door.enter(ask(Tenant(name="a", priority=Priority.HIGH), priority=Priority.LOW))
    assert permit.priority is Priority.LOW


async def test_more_capacity_lets_more_in(door: Admission) -> None:
    await door.enter(ask())
    waiting = asyncio.create_task(door.enter(ask()))
    await turns()
    door.set_capacity(2)
    assert isinstance(await waiting, Permit)


async def test_prefill_is_free_again_at_the_first_token(door: Admission) -> None:
    door.set_capacity(10, prefill_tokens=100)
    first = await door.enter(ask(tokens=100))
    waiting = asyncio.create_task(door.enter(ask(tokens=100)))
    await turns()
    assert not waiting.done()
    first.started()
    assert isinstance(await waiting, Permit)


async def test_a_gateway_that_stops_tells_those_who_wait(door: Admission) -> None:
    await door.enter(ask())
    waiting = asyncio.create_task(door.enter(ask()))
    await turns()
    await door.close()
    for asked in (waiting, door.enter(ask())):
        with pytest.raises(ApiError) as caught:
            await asked
        assert (caught.value.status, caught.value.code) == (503, "stopping")


async def test_a_replica_alone_grants_its_share_of_a_limit(clock: Clock) -> None:
    limits = LocalLimits("g", lambda: 4, clock)
    tenant = Tenant(name="a", requests_per_minute=100, concurrency=8)
    grants = [await limits.take(tenant, 1, 10) for _ in range(26)]
    assert sum(isinstance(grant, Grant) for grant in grants) == 25
    assert isinstance(grants[0], Grant)
    assert grants[0].concurrency == 2


async def test_a_replica_alone_does_not_refuse_for_ever_what_is_larger_than_its_share(clock: Clock) -> None:
    limits = LocalLimits("g", lambda: 4, clock)
    tenant = Tenant(name="a", input_tokens_per_minute=1000)
    assert isinstance(await limits.take(tenant, 600, 10), Grant)
    denied = await limits.take(tenant, 600, 10)
    assert isinstance(denied, Denial)
    assert denied.shortage is not None
    assert 120 < denied.shortage.wait_s < 200
    clock.now += denied.shortage.wait_s
    assert isinstance(await limits.take(tenant, 600, 10), Grant)


async def test_idle_tenants_cost_nothing(clock: Clock) -> None:
    limits = LocalLimits("g", lambda: 1, clock)
    for index in range(1000):
        grant = await limits.take(Tenant(name=f"t{index}", requests_per_minute=5), 1, 10)
        assert isinstance(grant, Grant)
        limits.settle(grant, 5)
        clock.now += 1
    assert len(limits.accounts()) < 150


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0.0, "0ms"), (0.0171, "18ms"), (1.0, "1s"), (8.64, "8.64s"), (360.0, "6m0s"), (3723.0, "1h2m3s")],
)
def test_times_are_written_as_openai_writes_them(seconds: float, told: str) -> None:
    assert span(seconds) == told
