"""Claims on namespaces: of two releases that look at one, one acts there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from tandem_operator.claims import Claims
from unit.operator.lease_server import Server

DURATION = 0.6


class Release:
    """One release's operator, as far as claims go."""

    def __init__(self, server: Server, name: str) -> None:
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
async def a(server: Server) -> AsyncIterator[Release]:
    made = Release(server, "a/tandem-operator")
    yield made
    await made.claims.close()


@pytest.fixture
async def b(server: Server) -> AsyncIterator[Release]:
    made = Release(server, "b/tandem-operator")
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


async def test_it_takes_over_when_the_first_is_gone(a: Release, b: Release) -> None:
    await until(a.acts)
    await until(lambda: b.acts() or b.told)
    await a.claims.close()
    await until(b.acts)
    assert b.gained == ["ai"]


async def test_the_next_leader_of_the_same_release_goes_on_at_once(server: Server, a: Release) -> None:
    await until(a.acts)
    await a.claims.close()
    successor = Release(server, "a/tandem-operator")
    await until(successor.acts)
    assert successor.told == []
    await successor.claims.close()


async def test_a_claim_that_cannot_be_renewed_is_lost_before_others_may_have_it(server: Server, a: Release) -> None:
    clock = asyncio.get_running_loop().time
    await until(a.acts)
    server.away = True
    began = clock()
    async with asyncio.timeout(5):
        await a.lost.wait()
    assert clock() - began < DURATION
    assert not a.acts()


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
