"""Tandem's hooks in the real engine: a resumed request says what it would have said, a dead gateway's requests end, and
a hang is noticed. The tests at the end hang one group after the other."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.oracle import Oracle
from support.pair import EngineError, EngineGroup, EnginePair
from support.penalized import PENALTIES, penalized
from tandem.core.pair_events import FailureKind
from tandem.core.types import RankState
from tandem.engine.plugin.resume import RESUMED
from tandem.gateway.api.grammar import structural_tag

pytestmark = pytest.mark.timeout(300)

PROMPT = [random.Random(3).randrange(300, 900) for _ in range(50)]
TOKENS = 24
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Köln"]}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["city", "tags"],
    "additionalProperties": False,
}
GRAMMARS: list[dict[str, Any]] = [
    {"json_schema": json.dumps(SCHEMA)},
    {"regex": "(ab|cd)+[0-9]{3,40}"},
    {"ebnf": 'root ::= ("x" | "yz" | "w" [0-9]+ " ")+'},
    {
        "structural_tag": structural_tag({"type": "json_schema", "json_schema": SCHEMA}, thinking=True, budget=6),
        "frequency_penalty": 1.2,
    },
]


@pytest.fixture(scope="module")
def pair(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnginePair]:
    """Its decode ranks have room for 400 tokens, so that several long streams must take turns."""
    little = ("--max-total-tokens", "400", "--num-reserved-decode-tokens", "8")
    with tempfile.TemporaryDirectory(prefix="tandem-") as scratch:
        pair = EnginePair(tiny, tmp_path_factory.mktemp("pair"), scratch=Path(scratch), decode=little)
        try:
            yield pair
        finally:
            pair.stop()


def resumed(pair: EnginePair, whole: list[int], count: int, **sampling: Any) -> list[int]:
    return pair.generate(
        PROMPT + whole[:count],
        dp=count % 2,
        max_new_tokens=TOKENS - count,
        custom_params={RESUMED: count},
        **sampling,
    )


@pytest.mark.parametrize("penalties", PENALTIES)
def test_an_uninterrupted_stream_counts_all_its_output(
    pair: EnginePair, oracle: Oracle, penalties: dict[str, Any]
) -> None:
    assert pair.generate(PROMPT, ignore_eos=True, **penalties) == penalized(oracle, PROMPT, TOKENS, **penalties)


@pytest.mark.parametrize("penalties", [{}, *PENALTIES])
@pytest.mark.parametrize("count", [1, 5, TOKENS - 1])
def test_a_resumed_stream_with_penalties_says_the_rest(pair: EnginePair, penalties: dict[str, Any], count: int) -> None:
    whole = pair.generate(PROMPT, ignore_eos=True, **penalties)
    assert resumed(pair, whole, count, ignore_eos=True, **penalties) == whole[count:]


def test_without_its_past_it_would_say_something_else(pair: EnginePair) -> None:
    whole = pair.generate(PROMPT, ignore_eos=True, **PENALTIES[0])
    assert pair.generate(PROMPT + whole[:5], ignore_eos=True, max_new_tokens=TOKENS - 5, **PENALTIES[0]) != whole[5:]


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("count", [1, 9, 13])
def test_a_resumed_stream_with_a_grammar_says_the_rest(pair: EnginePair, grammar: dict[str, Any], count: int) -> None:
    """Also twice: the second time the grammar comes out of SGLang's cache, where nobody has read it."""
    whole = pair.generate(PROMPT, **grammar)
    assert [resumed(pair, whole, count, **grammar) for _ in range(2)] == [whole[count:]] * 2
    assert pair.generate(PROMPT, **grammar) == whole


@pytest.mark.parametrize("sampling", [{}, PENALTIES[0], {"regex": "(ab|cd)+[0-9]{300,400}"}])
def test_streams_that_had_to_take_turns_say_what_they_say_alone(pair: EnginePair, sampling: dict[str, Any]) -> None:
    """Decode has no room for four; SGLang retracts some, and takes them up again."""
    prompts = [[random.Random(seed).randrange(300, 900) for _ in range(50)] for seed in range(4)]
    alone = [pair.generate(prompt, max_new_tokens=70, ignore_eos=True, **sampling) for prompt in prompts]

    async def together() -> list[list[int]]:
        return await asyncio.gather(
            *(pair.both(prompt, max_new_tokens=70, ignore_eos=True, **sampling) for prompt in prompts)
        )

    assert pair.call(together()) == alone
    assert "Retract requests" in Path(pair.call(pair.decode.actors[0].health()).log).read_text()


@pytest.mark.parametrize(
    ("count", "sampling", "why"),
    [
        (3, {"json_schema": json.dumps(SCHEMA)}, "the output to resume does not fit its grammar, from token 0 of 3"),
        (50, {}, "tandem_resumed is 50; it must be a number of tokens, at least 0 and fewer than 50"),
        (-1, {"frequency_penalty": 1.0}, "tandem_resumed is -1; it must be"),
        ("many", {}, "tandem_resumed is 'many'; it must be"),
    ],
)
def test_what_cannot_be_resumed_is_refused_for_good_and_the_engine_goes_on(
    pair: EnginePair, count: object, sampling: dict[str, Any], why: str
) -> None:
    with pytest.raises(EngineError) as refused:
        pair.generate(PROMPT, custom_params={RESUMED: count}, **sampling)
    assert refused.value.failure.kind is FailureKind.BAD_REQUEST
    assert why in refused.value.failure.message
    assert len(pair.generate(PROMPT, ignore_eos=True)) == TOKENS


async def ended(pair: EnginePair, groups: list[EngineGroup], prefix: str) -> list[FailureKind]:
    """Start legs of an own and another gateway's requests, end ours; how ours ended."""
    tasks = [
        asyncio.ensure_future(pair.leg(group, PROMPT, 2**50 + 2 * number + dp, dp, f"{prefix}-{number}{dp}", {}))
        for number, group in enumerate(groups)
        for dp in (0, 1)
    ]
    try:
        done: set[asyncio.Future[list[int]]] = set()
        deadline = time.monotonic() + 20
        # An abort that overtakes its request is forgotten: repeat it, as whoever reaps does.
        while len(done) < len(tasks) and time.monotonic() < deadline:
            for group in groups:
                await pair.client.abort(group.url, f"{prefix}-*")
            done, _ = await asyncio.wait(tasks, timeout=0.5)
    finally:
        for task in tasks:
            task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
    return [one.failure.kind for one in found if isinstance(one, EngineError)]


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_dead_gateways_requests_end_where_the_other_side_never_came(pair: EnginePair, side: str) -> None:
    """In prefill's bootstrap queue, and where decode waits for the KV, on both DP ranks."""
    found = pair.call(ended(pair, [getattr(pair, side)], "aaaabbbbcccc"))
    assert len(found) == 2
    assert len(pair.generate(PROMPT, ignore_eos=True)) == TOKENS


def test_a_dead_gateways_streams_end_and_anothers_goes_on(pair: EnginePair) -> None:
    alone = pair.generate(PROMPT, ignore_eos=True, max_new_tokens=150)

    async def reap() -> tuple[list[int], list[BaseException | list[int]]]:
        other = asyncio.ensure_future(pair.both(PROMPT, rid="ddddbbbbcccc-", dp=0, ignore_eos=True, max_new_tokens=150))
        ours = [
            asyncio.ensure_future(pair.both(PROMPT, rid="aaaabbbbcccc-", dp=dp, ignore_eos=True, max_new_tokens=300))
            for dp in (1, 1)
        ]
        while (await pair.client.loads(pair.decode.url))[1].running < 1:
            await asyncio.sleep(0.05)
        while not all(one.done() for one in ours):
            await pair.client.abort(pair.decode.url, "aaaabbbbcccc-*")
            await pair.client.abort(pair.prefill.url, "aaaabbbbcccc-*")
            await asyncio.wait(ours, timeout=0.5)
        return await other, await asyncio.gather(*ours, return_exceptions=True)

    other, ours = pair.call(reap())
    assert other == alone
    assert [one.failure.kind for one in ours if isinstance(one, EngineError)] == [FailureKind.ABORTED] * 2


async def hurried(pair: EnginePair, number: int) -> int:
    """Begin a leg on DP rank 1 and abort it at once, again and again until it ends: how often. 0: it did not end."""
    rid = f"eeeebbbbcccc-{number:03}"
    leg = asyncio.ensure_future(pair.leg(pair.decode, PROMPT, 2**51 + 2 * number + 1, 1, rid, {}))
    try:
        await asyncio.sleep(number % 10 / 1000)
        for times in range(1, 30):
            await pair.client.abort(pair.decode.url, rid)
            if (await asyncio.wait([leg], timeout=0.3))[0]:
                ended = leg.exception()
                assert isinstance(ended, EngineError)
                assert ended.failure.kind is FailureKind.ABORTED
                return times
        return 0
    finally:
        leg.cancel()
        await asyncio.gather(leg, return_exceptions=True)


def test_an_abort_that_overtakes_its_request_is_made_good_by_the_next(pair: EnginePair) -> None:
    """A request goes straight to its rank, an abort by way of rank 0: on rank 1 it may be there first, which happens to
    about 1 of 100 here. That each abort is sent on is what `unit/engine/test_plugin.py` tests."""

    async def ten(start: int) -> list[int]:
        return await asyncio.gather(*(hurried(pair, start + number) for number in range(10)))

    for start in range(0, 60, 10):
        assert 0 not in pair.call(ten(start))
    assert len(pair.generate(PROMPT, ignore_eos=True)) == TOKENS


def test_a_prefix_that_is_too_short_ends_nothing(pair: EnginePair) -> None:
    async def abort_while_it_runs() -> list[int]:
        stream = asyncio.ensure_future(pair.both(PROMPT, rid="aaaabbbbcccc-", ignore_eos=True))
        while not stream.done():
            await pair.client.abort(pair.decode.url, "aaaa*")
            await pair.client.abort(pair.decode.url, "*")
            await asyncio.wait([stream], timeout=0.1)
        return await stream

    assert len(pair.call(abort_while_it_runs())) == TOKENS


def test_every_process_that_works_shows_its_progress(pair: EnginePair) -> None:
    pair.generate(PROMPT)
    leader, follower = (pair.decode.beats(rank) for rank in (0, 1))
    assert sorted(beat.who for beat in leader.values()) == ["HTTP server", "detokenizer", "scheduler DP 0"]
    assert [beat.who for beat in follower.values()] == ["scheduler DP 1"]
    assert next(beat for beat in follower.values()).forwards > 0


def test_an_idle_engine_shows_progress_too(pair: EnginePair) -> None:
    scheduler = pair.prefill.pid(1, "scheduler")
    before = pair.prefill.beats(1)[scheduler].turns
    deadline = time.monotonic() + 20
    while pair.prefill.beats(1)[scheduler].turns < before + 3:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    """Processes that stand still, and go on afterwards."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def test_a_detokenizer_that_stands_still_is_noticed(pair: EnginePair) -> None:
    with stopped(pair.prefill.pid(0, "detokenizer")):
        status = pair.call(pair.watch(pair.prefill, 0, within=20))
    assert status.state is RankState.DEAD
    assert "was stopped by a signal or a debugger" in status.detail


def test_a_followers_scheduler_that_stands_still_is_noticed(pair: EnginePair) -> None:
    with stopped(pair.prefill.pid(1, "scheduler")):
        status = pair.call(pair.watch(pair.prefill, 1, within=20))
    assert status.state is RankState.DEAD
    assert "was stopped by a signal or a debugger" in status.detail


def test_a_collective_that_never_returns_is_noticed_by_the_rank_that_waits_in_it(pair: EnginePair) -> None:
    """As when the other rank's node froze, and its actor with it."""
    pair.call(pair.blind(pair.decode, 1))
    with stopped(pair.decode.pid(1, "scheduler")):
        status = pair.call(pair.watch(pair.decode, 0, within=40))
    assert status.state is RankState.DEAD
    assert status.detail.startswith("hangs: its scheduler DP 0 has made no progress for ")
