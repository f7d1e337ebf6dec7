"""Pairs of engines on a GPU: hooks, resumed streams, aborts, deaths, hangs. The tests at the end hang a group each."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from typing import Any

import pytest

from support.pair import EngineError, EngineGroup, EnginePair
from tandem.bench.client import stream
from tandem.core.pair_events import FailureKind
from tandem.core.types import RankState
from tandem.engine.http1 import Pool
from tandem.engine.plugin.resume import RESUMED

pytestmark = pytest.mark.timeout(900)

PROMPT = [random.Random(3).randrange(300, 900) for _ in range(50)]
TOKENS = 24
PENALTY = {"frequency_penalty": 1.5}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Köln"]}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["city", "tags"],
    "additionalProperties": False,
}


def resumed(pair: EnginePair, whole: list[int], count: int, **sampling: Any) -> list[int]:
    return pair.generate(
        PROMPT + whole[:count], max_new_tokens=TOKENS - count, custom_params={RESUMED: count}, **sampling
    )


def test_a_stream_says_the_same_again(pair: EnginePair) -> None:
    assert pair.generate(PROMPT, ignore_eos=True) == pair.generate(PROMPT, ignore_eos=True)


@pytest.mark.parametrize("count", [1, 5, TOKENS - 1])
def test_a_resumed_stream_says_the_rest(pair: EnginePair, count: int) -> None:
    """Without penalties: they make for near ties, and in bfloat16 prefill and decode do not reckon alike to the last
    bit. How penalties count is what `engine/test_overlap.py` tests, in float32."""
    whole = pair.generate(PROMPT, ignore_eos=True)
    assert resumed(pair, whole, count, ignore_eos=True) == whole[count:]


def test_without_its_past_it_would_say_something_else(pair: EnginePair) -> None:
    whole = pair.generate(PROMPT, ignore_eos=True, **PENALTY)
    assert pair.generate(PROMPT + whole[:5], ignore_eos=True, max_new_tokens=TOKENS - 5, **PENALTY) != whole[5:]


@pytest.mark.parametrize("grammar", [{"json_schema": json.dumps(SCHEMA)}, {"regex": "(ab|cd)+[0-9]{3,40}"}])
def test_a_resumed_stream_with_a_grammar_says_the_rest(pair: EnginePair, grammar: dict[str, Any]) -> None:
    """Also twice: the second time the grammar comes out of SGLang's cache, where nobody has read it."""
    whole = pair.generate(PROMPT, **grammar)
    assert [resumed(pair, whole, 9, **grammar) for _ in range(2)] == [whole[9:]] * 2


async def ended(pair: EnginePair, group: EngineGroup, rid: str) -> FailureKind:
    """Begin one leg whose other side never comes, and end it as who reaps a dead gateway does: how it ended."""
    leg = asyncio.ensure_future(pair.leg(group, PROMPT, 2**50, 0, f"{rid}-0", {}))
    try:
        async with asyncio.timeout(20):
            while not leg.done():
                await pair.client.abort(group.url, f"{rid}-*")
                await asyncio.wait([leg], timeout=0.5)
    finally:
        leg.cancel()
        await asyncio.gather(leg, return_exceptions=True)
    error = leg.exception()
    assert isinstance(error, EngineError)
    return error.failure.kind


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_dead_gateways_request_ends_where_the_other_side_never_came(pair: EnginePair, side: str) -> None:
    assert pair.call(ended(pair, getattr(pair, side), "aaaabbbbcccc")) is FailureKind.ABORTED
    assert len(pair.generate(PROMPT, ignore_eos=True)) == TOKENS


def test_every_process_that_works_shows_its_progress(pair: EnginePair) -> None:
    pair.generate(PROMPT)
    beats = pair.decode.beats(0).values()
    assert sorted(beat.who for beat in beats) == ["HTTP server", "detokenizer", "scheduler DP 0"]
    assert next(beat for beat in beats if beat.who.startswith("scheduler")).forwards > 0


async def running(pair: EnginePair) -> list[int]:
    """How many requests each decode group runs."""
    return [sum(load.running for load in await pair.client.loads(group.url)) for group in pair.decodes]


async def busy(pair: EnginePair) -> int:
    """Requests that run or wait in any engine."""
    loads = [load for group in (pair.prefill, *pair.decodes) for load in await pair.client.loads(group.url)]
    return sum(load.running + load.waiting for load in loads)


async def answer(base: str, tokens: int, found: list[int]) -> list[int]:
    """A greedy answer by way of the gateway; `found` holds what has come so far."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    pool = Pool()
    try:
        async for piece in stream(pool, base, "/v1/completions", {**body, "return_token_ids": True}, within=60):
            found += piece.token_ids
    finally:
        await pool.close()
    return found


async def until(what: str, happens: Any, within: float) -> float:
    """Ask until it is so; the seconds that took."""
    begun = time.monotonic()
    while not await happens():
        assert time.monotonic() < begun + within, f"after {within:g} s still not: {what}"
        await asyncio.sleep(0.01)
    return time.monotonic() - begun


def test_both_engines_are_idle_a_second_after_the_client_has_gone(pair: EnginePair, gateway: str) -> None:
    async def leave() -> float:
        found: list[int] = []
        asking = asyncio.ensure_future(answer(gateway, 3000, found))

        async def streams() -> bool:
            return len(found) > 5

        async def idle() -> bool:
            return await busy(pair) == 0

        await until("tokens come", streams, 30)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        return await until("both are idle", idle, 10)

    assert pair.call(leave()) < 1


def test_a_stream_goes_on_when_its_decode_engine_is_killed(pair: EnginePair, gateway: str) -> None:
    tokens = 1500

    async def kill() -> list[int]:
        found: list[int] = []
        asking = asyncio.ensure_future(answer(gateway, tokens, found))

        async def streams() -> bool:
            return len(found) > 20

        await until("tokens come", streams, 30)
        [serving] = [group for group, count in zip(pair.decodes, await running(pair), strict=True) if count]
        os.kill(serving.pid(0, "scheduler"), signal.SIGKILL)
        before = len(found)
        assert before < tokens
        return await asking

    assert len(pair.call(kill(), 120)) == tokens


def test_a_scheduler_that_stands_still_is_noticed(pair: EnginePair) -> None:
    pid = pair.prefill.pid(0, "scheduler")
    os.kill(pid, signal.SIGSTOP)
    try:
        status = pair.call(pair.watch(pair.prefill, 0, within=90), 100)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert status.state is RankState.DEAD
    assert "was stopped by a signal or a debugger" in status.detail
