"""Engines are asked for their loads one question at a time, and a failure changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from tandem.core.pair_events import FailureKind
from tandem.core.routing import Router
from tandem.core.types import DpLoad, Group, GroupState, Role
from tandem.engine.client import EngineError
from tandem.gateway.pairing.load_poller import LoadPoller

GROUP = Group(group="decode-0", role=Role.DECODE, epoch=1, state=GroupState.READY, url="http://d0")


class Engines:
    """Answers each question when it is told to."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[str] = asyncio.Queue()
        self.answers: asyncio.Queue[list[DpLoad] | EngineError] = asyncio.Queue()
        self.open = 0

    async def loads(self, url: str, *, within: float) -> list[DpLoad]:
        self.open += 1
        self.asked.put_nowait(url)
        try:
            answer = await self.answers.get()
        finally:
            self.open -= 1
        if isinstance(answer, EngineError):
            raise answer
        return answer

    async def answer(self, running: int) -> None:
        """Answer the question that is open, and wait for the next."""
        self.answers.put_nowait([DpLoad(dp_rank=0, running=running)])
        await asyncio.wait_for(self.asked.get(), 5)


@pytest.fixture
def engines() -> Engines:
    return Engines()


@pytest.fixture
def router() -> Router:
    made = Router()
    made.put(GROUP)
    return made


@pytest.fixture
async def poller(engines: Engines, router: Router) -> AsyncIterator[LoadPoller]:
    made = LoadPoller(engines, router, period_s=0.001, within_s=1.0, jitter=lambda: 0.5)
    yield made
    await made.close()
    assert engines.open == 0


async def test_what_an_engine_reports_reaches_the_router_again_and_again(
    poller: LoadPoller, engines: Engines, router: Router
) -> None:
    poller.put_group(GROUP)
    assert await engines.asked.get() == "http://d0"
    for running in (3, 5):
        await engines.answer(running)
        assert router.ranks()[0].other_rooms == running


async def test_a_group_is_asked_one_question_at_a_time(poller: LoadPoller, engines: Engines) -> None:
    for _ in range(3):
        poller.put_group(GROUP)
    await engines.asked.get()
    await asyncio.sleep(0.01)
    assert (engines.open, engines.asked.empty()) == (1, True)


async def test_a_failure_leaves_what_was_known_and_the_next_question_is_asked(
    poller: LoadPoller, engines: Engines, router: Router
) -> None:
    poller.put_group(GROUP)
    await engines.asked.get()
    await engines.answer(3)
    engines.answers.put_nowait(EngineError(FailureKind.STALLED, "too slow"))
    await asyncio.wait_for(engines.asked.get(), 5)
    assert (router.ranks()[0].other_rooms, poller.failures) == (3, 1)


@pytest.mark.parametrize("change", ["gone", "failed", "closed"])
async def test_a_group_that_is_not_routable_is_asked_no_more(poller: LoadPoller, engines: Engines, change: str) -> None:
    poller.put_group(GROUP)
    await engines.asked.get()
    if change == "gone":
        poller.remove_group("decode-0")
    elif change == "failed":
        poller.put_group(Group(group="decode-0", role=Role.DECODE, epoch=1, state=GroupState.FAILED))
    else:
        await poller.close()
    await asyncio.sleep(0.01)
    assert (engines.open, engines.asked.empty()) == (0, True)


async def test_a_restarted_group_is_asked_at_its_new_address(poller: LoadPoller, engines: Engines) -> None:
    poller.put_group(GROUP)
    await engines.asked.get()
    poller.put_group(Group(group="decode-0", role=Role.DECODE, epoch=2, state=GroupState.READY, url="http://new"))
    assert await asyncio.wait_for(engines.asked.get(), 5) == "http://new"
