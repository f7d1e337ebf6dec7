"""Leader election, with a clock and a server of the test's own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tandem_operator.lease import LeaderLease
from tandem_operator.names import LEASE, Key
from unit.operator.lease_server import Server

KEY = Key(LEASE, "ai", "tandem-operator")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def candidate(server: Server, clock: Clock, name: str, **more: Any) -> LeaderLease:
    return LeaderLease(server, KEY, name, clock=clock, **more)  # type: ignore[arg-type]


async def test_only_one_of_two_gets_the_lease(server: Server, clock: Clock) -> None:
    a, b = candidate(server, clock, "a"), candidate(server, clock, "b")
    assert [await a.try_once(), await b.try_once(), await a.try_once()] == [True, False, True]


async def test_the_lease_of_a_leader_that_is_silent_is_taken_over(server: Server, clock: Clock) -> None:
    a, b = candidate(server, clock, "a"), candidate(server, clock, "b")
    await a.try_once()
    assert not await b.try_once()
    clock.now += 15.1
    assert await b.try_once()
    assert not await a.try_once()


async def test_a_leader_that_renews_keeps_it(server: Server, clock: Clock) -> None:
    a, b = candidate(server, clock, "a"), candidate(server, clock, "b")
    await a.try_once()
    for _ in range(5):
        assert not await b.try_once()
        clock.now += 10
        await asyncio.sleep(0.001)  # the time of renewal, by which it is noticed, is the real one
        assert await a.try_once()


async def test_a_lease_that_was_released_is_free_at_once(server: Server, clock: Clock) -> None:
    a, b = candidate(server, clock, "a"), candidate(server, clock, "b")
    await a.try_once()
    await a.release()
    assert await b.try_once()
    assert server.lease is not None
    assert server.lease["spec"]["leaseTransitions"] == 1


async def test_who_does_not_have_it_cannot_release_it(server: Server, clock: Clock) -> None:
    a, b = candidate(server, clock, "a"), candidate(server, clock, "b")
    await a.try_once()
    await b.release()
    assert not await b.try_once()


async def test_a_leader_that_cannot_reach_the_server_gives_up_before_others_may_take_over(server: Server) -> None:
    clock = asyncio.get_running_loop().time
    a = LeaderLease(server, KEY, "a", duration=0.3, clock=clock)  # type: ignore[arg-type]
    await a.try_once()
    server.away = True
    began = clock()
    await a.hold()
    assert clock() - began < 0.3


async def test_a_leader_that_was_replaced_notices(server: Server) -> None:
    a = LeaderLease(server, KEY, "a", duration=0.3)  # type: ignore[arg-type]
    await a.try_once()
    assert server.lease is not None
    server.lease["spec"]["holderIdentity"] = "b"
    async with asyncio.timeout(5):
        await a.hold()
