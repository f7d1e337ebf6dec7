"""The work queue: one worker for a key, nothing lost, nothing starved."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from tandem_operator.workqueue import WorkQueue


@pytest.fixture
async def queue() -> WorkQueue[str]:
    return WorkQueue(first_delay=0.001, longest_delay=0.004)


async def test_a_key_that_is_asked_for_twice_is_worked_on_once(queue: WorkQueue[str]) -> None:
    queue.add("a")
    queue.add("a")
    assert await queue.get() == "a"
    assert len(queue) == 0


async def test_a_key_that_is_asked_for_during_the_work_comes_again_after_it(queue: WorkQueue[str]) -> None:
    queue.add("a")
    await queue.get()
    queue.add("a")
    assert len(queue) == 0
    queue.done("a")
    assert await queue.get() == "a"


async def test_keys_come_in_the_order_in_which_they_were_asked_for(queue: WorkQueue[str]) -> None:
    for key in "abcab":
        queue.add(key)
    assert [await queue.get() for _ in range(3)] == ["a", "b", "c"]


async def test_a_busy_key_does_not_starve_the_others(queue: WorkQueue[str]) -> None:
    turns: Counter[str] = Counter()
    for key in "abc":
        queue.add(key)
    for _ in range(30):
        key = await queue.get()
        turns[key] += 1
        queue.add(key)  # its object changes all the time
        queue.done(key)
    assert turns == {"a": 10, "b": 10, "c": 10}


async def test_failures_wait_longer_each_time_up_to_a_limit(queue: WorkQueue[str]) -> None:
    queue.add("a")
    delays = []
    for _ in range(4):
        delays.append(queue.failed(await queue.get()))
    assert delays == [0.001, 0.002, 0.004, 0.004]


async def test_after_a_success_the_waiting_begins_anew(queue: WorkQueue[str]) -> None:
    queue.add("a")
    queue.failed(await queue.get())
    queue.done(await queue.get())
    queue.add("a")
    assert queue.failed(await queue.get()) == 0.001


async def test_the_earliest_of_several_times_counts(queue: WorkQueue[str]) -> None:
    queue.add_after("a", 60)
    queue.add_after("a", 0.001)
    queue.add_after("a", 60)
    async with asyncio.timeout(5):
        assert await queue.get() == "a"


async def test_no_two_workers_have_the_same_key(queue: WorkQueue[str]) -> None:
    working: set[str] = set()
    done: Counter[str] = Counter()

    async def worker() -> None:
        while True:
            key = await queue.get()
            assert key not in working
            working.add(key)
            await asyncio.sleep(0)
            working.discard(key)
            done[key] += 1
            queue.done(key)

    workers = [asyncio.create_task(worker()) for _ in range(4)]
    for _ in range(50):
        for key in "abcdef":
            queue.add(key)
        await asyncio.sleep(0)
    while len(queue):
        await asyncio.sleep(0)
    for task in workers:
        task.cancel()
    results = await asyncio.gather(*workers, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    assert set(done) == set("abcdef")
