"""What real engines say of their KV caches makes two gateways' routers know the same, and know it right."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator

import msgspec
import pytest

from support.fleet import Fleet
from tandem.core.routing import Pair, RouteAsk, Router
from tandem.core.types import FleetSnapshot, Group, Role
from tandem.engine.http1 import Pool
from tandem.gateway.pairing.kv_events import KvEvents

pytestmark = pytest.mark.timeout(120)

LAG_S = 15.0
"""Far above the lag that is promised (`SYNC_S` and an idle engine's second): the machine may be busy."""
_seeds = itertools.count(7000)


@pytest.fixture
def prompt() -> list[int]:
    """Three blocks of 64 tokens and a bit, that no request has had before."""
    rng = random.Random(next(_seeds))
    return [rng.randrange(300, 900) for _ in range(200)]


@pytest.fixture
async def groups(fleet: Fleet) -> list[Group]:
    pool = Pool()
    try:
        _, body = await pool.fetch("GET", f"{fleet.base}/fleet", within=10)
    finally:
        await pool.close()
    return list(msgspec.json.decode(body, type=FleetSnapshot).groups)


@pytest.fixture
async def gateways(groups: list[Group]) -> AsyncIterator[list[tuple[Router, KvEvents]]]:
    """Two replicas that have just started."""
    made = []
    for _ in range(2):
        router = Router()
        events = KvEvents(router.index)
        for group in groups:
            router.put(group)
            events.put_group(group)
        made.append((router, events))
    yield made
    for _, events in made:
        events.close()


def held(router: Router, prompt: list[int]) -> dict[tuple[str, int], int]:
    """DP rank → blocks of the prompt that its engine says it has; ranks with none are left out."""
    depths = router.index.match(router.index.keys(prompt), 0.0)
    slots = {(worker.group, worker.dp_rank): router.index.join(worker) for worker in router.index.workers}
    return {rank: depths[slot] for rank, slot in slots.items() if depths[slot]}


async def until_all_hold(gateways: list[tuple[Router, KvEvents]], prompt: list[int], blocks: int) -> None:
    async with asyncio.timeout(LAG_S):
        while not all(list(held(router, prompt).values()) == [blocks] * (1 if blocks else 0) for router, _ in gateways):
            await asyncio.sleep(0.02)


async def test_every_prefill_dp_rank_says_where_it_tells_what_it_caches(groups: list[Group]) -> None:
    for group in groups:
        told = [source.dp_rank for rank in group.ranks for source in rank.kv_events]
        assert told == (list(range(group.dp_size)) if group.role is Role.PREFILL else [])


async def test_a_computed_prompt_is_known_to_both_gateways_on_the_rank_that_computed_it(
    fleet: Fleet, gateways: list[tuple[Router, KvEvents]], prompt: list[int]
) -> None:
    await asyncio.to_thread(fleet.complete, prompt, 2)
    await until_all_hold(gateways, prompt, 3)
    (one, _), (other, _) = gateways
    assert held(one, prompt) == held(other, prompt)
    (group, dp_rank), *_ = held(one, prompt)
    for router, events in gateways:
        pair = router.choose(RouteAsk([*prompt[:192], 1, 2, 3]))
        assert isinstance(pair, Pair)
        assert (pair.prefill.group, pair.prefill.dp_rank) == (group, dp_rank)
        assert (pair.choice.cached_tokens, pair.choice.confirmed) == (192, True)
        assert (router.index.orphans, events.counts.forgotten) == (0, 0)


async def test_a_gateway_that_starts_later_learns_what_was_computed_before(
    fleet: Fleet, groups: list[Group], gateways: list[tuple[Router, KvEvents]], prompt: list[int]
) -> None:
    await asyncio.to_thread(fleet.complete, prompt, 2)
    await until_all_hold(gateways, prompt, 3)
    router = Router()
    events = KvEvents(router.index)
    for group in groups:
        router.put(group)
        events.put_group(group)
    try:
        await until_all_hold([(router, events)], prompt, 3)
        assert held(router, prompt) == held(gateways[0][0], prompt)
    finally:
        events.close()


async def test_what_an_engine_drops_is_forgotten(
    fleet: Fleet, groups: list[Group], gateways: list[tuple[Router, KvEvents]], prompt: list[int]
) -> None:
    await asyncio.to_thread(fleet.complete, prompt, 2)
    await until_all_hold(gateways, prompt, 3)
    leader = next(group.url for group in groups if group.role is Role.PREFILL)
    pool = Pool()
    try:
        async with asyncio.timeout(LAG_S):  # it refuses while a request is still about to leave it
            while (await pool.fetch("POST", f"{leader}/flush_cache", within=10))[0] != 200:
                await asyncio.sleep(0.1)
    finally:
        await pool.close()
    await until_all_hold(gateways, prompt, 0)
    assert all(events.counts.cleared for _, events in gateways)
