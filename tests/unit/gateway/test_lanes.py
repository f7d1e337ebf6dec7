"""Large bodies: each tenant has a lane, and nobody waits behind another's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator

import pytest

from tandem.gateway.errors import ApiError
from tandem.gateway.text.lanes import INLINE_BYTES, THREADS, WAITING, Lanes

LARGE = INLINE_BYTES + 1


@pytest.fixture
async def lanes() -> AsyncIterator[Lanes]:
    made = Lanes()
    yield made
    made.close()


async def test_a_small_job_is_done_here_and_a_large_one_elsewhere(lanes: Lanes) -> None:
    here = threading.get_ident()
    assert await lanes.work("acme", INLINE_BYTES, threading.get_ident) == here
    assert await lanes.work("acme", LARGE, threading.get_ident) != here


async def test_one_tenants_jobs_do_not_hold_up_anothers(lanes: Lanes) -> None:
    go = threading.Event()
    stuck = [asyncio.create_task(lanes.work("greedy", LARGE, go.wait)) for _ in range(3 * THREADS)]
    async with asyncio.timeout(5):
        assert await lanes.work("polite", LARGE, lambda: "done") == "done"
        go.set()
        assert await asyncio.gather(*stuck) == [True] * len(stuck)


async def test_too_many_of_one_tenant_are_told_to_come_back(lanes: Lanes) -> None:
    go = threading.Event()
    stuck = [asyncio.create_task(lanes.work("greedy", LARGE, go.wait)) for _ in range(WAITING)]
    await asyncio.sleep(0)
    with pytest.raises(ApiError) as refused:
        await lanes.work("greedy", LARGE, go.wait)
    assert (refused.value.status, refused.value.code, refused.value.retry_after) == (429, "overloaded", 1.0)
    go.set()
    async with asyncio.timeout(5):
        await asyncio.gather(*stuck)
        assert await lanes.work("greedy", LARGE, lambda: 1) == 1


async def test_who_leaves_while_it_waits_frees_its_place(lanes: Lanes) -> None:
    go = threading.Event()
    first = asyncio.create_task(lanes.work("acme", LARGE, go.wait))
    second = asyncio.create_task(lanes.work("acme", LARGE, go.wait))
    await asyncio.sleep(0)
    second.cancel()
    go.set()
    async with asyncio.timeout(5):
        assert await first
        assert await lanes.work("acme", LARGE, lambda: 2) == 2


async def test_who_gives_up_leaves_no_second_thread_to_its_tenant(lanes: Lanes) -> None:
    go, began = threading.Event(), threading.Event()

    def stuck() -> None:
        began.set()
        go.wait()

    given_up = asyncio.create_task(lanes.work("greedy", LARGE, stuck))
    await asyncio.to_thread(began.wait, 5)
    given_up.cancel()
    await asyncio.wait([given_up])
    began.clear()
    second = asyncio.create_task(lanes.work("greedy", LARGE, stuck))
    assert not await asyncio.to_thread(began.wait, 0.05)
    go.set()
    async with asyncio.timeout(5):
        await second


async def test_what_a_job_raises_comes_back(lanes: Lanes) -> None:
    with pytest.raises(ZeroDivisionError):
        await lanes.work("acme", LARGE, lambda: 1 // 0)
