"""Claims on namespaces: of two releases that look at one, one acts there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from tandem_operator.claims import Claims
from tandem_operator.names import CLAIM, Object
from unit.operator.lease_server import Server

DURATION = 0.6
"""Seconds; it runs out by the test's clock, and the looks between are real."""


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Release:
    """One release's operator, as far as claims go."""

    def __init__(self, server: Server, name: str, clock: Clock) -> None:
        self.needed = True
        self.gained: list[str] = []
        self.told: list[str] = []
        self.lost = asyncio.Event()
        self.claims = Claims(
            server,  # type: ignore[arg-type]
            name,
            duration=DURATION,
            needed=lambda _: self.needed,
            gained=self.gained.append,
            waits=self._waits,
            lost=self.lost,
            clock=clock,
        )

    async def _waits(self, _: str, holder: str) -> None:
        self.told.append(holder)

    def acts(self) -> bool:
        return self.claims.may_act("ai")


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await asyncio.sleep(0.005)


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def a(server: Server, clock: Clock) -> AsyncIterator[Release]:
    made = Release(server, "a/tandem-operator", clock)
    yield made
    await made.claims.close()


@pytest.fixture
async def b(server: Server, clock: Clock) -> AsyncIterator[Release]:
    made = Release(server, "b/tandem-operator", clock)
    yield made
    await made.claims.close()


async def test_a_namespace_is_claimed_before_anything_is_done_in_it(server: Server, a: Release) -> None:
    assert not a.acts()
    await until(a.acts)
    assert a.gained == ["ai"]
    assert server.lease is not None
    assert server.lease["spec"]["holderIdentity"] == "a/tandem-operator"


async def test_another_release_waits_and_says_for_whom(a: Release, b: Release) -> None:
    await until(a.acts)
    await until(lambda: b.acts() or b.told)
    assert b.told[0] == "a/tandem-operator"
    assert not b.acts()
    assert not b.gained


async def test_it_takes_over_when_the_first_is_gone(a: Release, b: Release, clock: Clock) -> None:
    await until(a.acts)
    await until(lambda: b.acts() or b.told)
    await a.claims.close()
    looks = len(b.told)
    await until(lambda: b.acts() or len(b.told) > looks + 1)
    assert not b.acts()
    clock.now += DURATION
    await until(b.acts)
    assert b.gained == ["ai"]


async def test_the_next_leader_of_the_same_release_goes_on_at_once(server: Server, a: Release, clock: Clock) -> None:
    await until(a.acts)
    await a.claims.close()
    successor = Release(server, "a/tandem-operator", clock)
    await until(successor.acts)
    assert successor.told == []
    await successor.claims.close()


async def test_a_claim_that_cannot_be_renewed_is_lost_before_others_may_have_it(
    server: Server, a: Release, b: Release, clock: Clock
) -> None:
    await until(a.acts)
    await until(lambda: b.acts() or b.told)
    server.away = True
    clock.now += DURATION * 0.7
    async with asyncio.timeout(5):
        await a.lost.wait()
    assert not a.acts()
    server.away = False
    looks = len(b.told)
    await until(lambda: b.acts() or len(b.told) > looks + 1)
    assert not b.acts()


async def test_a_namespace_in_which_nothing_is_left_is_given_back(server: Server, a: Release, b: Release) -> None:
    await until(a.acts)
    a.needed = False
    await until(b.acts)
    assert b.told in ([], ["a/tandem-operator"])
    assert not a.lost.is_set()


async def test_where_nothing_is_there_is_nothing_to_claim(server: Server, a: Release) -> None:
    a.needed = False
    assert a.acts()
    assert server.lease is None


async def test_a_namespace_that_is_being_deleted_is_cleared_up_without_a_claim(server: Server, a: Release) -> None:
    server.ending = True
    await until(a.acts)
    assert server.lease is None


async def test_a_namespace_that_was_deleted_and_made_again_is_claimed_like_any_other(
    server: Server, a: Release
) -> None:
    server.ending = True
    await until(a.acts)
    server.ending, server.lease = False, theirs("b/tandem-operator")
    async with asyncio.timeout(5):
        await a.lost.wait()
    assert not a.acts()


def theirs(holder: str) -> Object:
    """Another release's Lease."""
    spec = {"holderIdentity": holder, "renewTime": "2026-01-01T00:00:00Z", "leaseDurationSeconds": 60}
    return {"metadata": {"name": CLAIM, "namespace": "ai", "resourceVersion": "7"}, "spec": spec}
