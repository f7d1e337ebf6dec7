"""Penalties where the scheduler makes up a batch before it knows the tokens of the last one, as it does on GPUs."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.oracle import Oracle
from support.pair import EnginePair
from support.penalized import FAVOURED, PENALTIES, penalized
from tandem.engine.plugin.resume import RESUMED

pytestmark = pytest.mark.timeout(300)

PROMPT = [random.Random(3).randrange(300, 900) for _ in range(50)]
TOKENS = 24


@pytest.fixture(scope="module")
def pair(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnginePair]:
    """Its decode ranks have room for 400 tokens, so that several long streams must take turns."""
    little = ("--max-total-tokens", "400", "--num-reserved-decode-tokens", "8")
    with tempfile.TemporaryDirectory(prefix="tandem-") as scratch:
        folder = tmp_path_factory.mktemp("overlap")
        pair = EnginePair(tiny, folder, scratch=Path(scratch), decode=little, overlap=True)
        try:
            yield pair
        finally:
            pair.stop()


@pytest.mark.parametrize("penalties", PENALTIES)
def test_penalties_count_every_token_once_before_the_next_is_chosen(
    pair: EnginePair, oracle: Oracle, penalties: dict[str, Any]
) -> None:
    assert pair.generate(PROMPT, ignore_eos=True, **penalties) == penalized(oracle, PROMPT, TOKENS, **penalties)


@pytest.mark.parametrize("penalties", PENALTIES)
@pytest.mark.parametrize("count", [1, 5, TOKENS - 2])
def test_a_resumed_stream_with_penalties_says_the_rest(pair: EnginePair, penalties: dict[str, Any], count: int) -> None:
    whole = pair.generate(PROMPT, ignore_eos=True, **penalties)
    rest = pair.generate(
        PROMPT + whole[:count],
        max_new_tokens=TOKENS - count,
        custom_params={RESUMED: count},
        ignore_eos=True,
        **penalties,
    )
    assert rest == whole[count:]


def test_the_scheduler_does_overlap(pair: EnginePair) -> None:
    """Else these tests would show nothing."""
    assert all("'disable_overlap_schedule': False" in log for log in pair.decode.logs())
    assert all("'disable_overlap_schedule': True" in log for log in pair.prefill.logs())


@pytest.mark.parametrize("order", [1, -1])
def test_streams_that_come_and_go_beside_one_another_say_what_they_say_alone(pair: EnginePair, order: int) -> None:
    """Those with penalties end first, or those without: rows are merged and dropped while tokens are in flight."""
    lengths = range(10, 70, 10)[::order]
    asked = [
        {**penalties, "max_new_tokens": length} for penalties, length in zip([*PENALTIES, {}, {}], lengths, strict=True)
    ]
    alone = [pair.generate(PROMPT, ignore_eos=True, **one) for one in asked]

    async def together() -> list[list[int]]:
        return await asyncio.gather(*(pair.both(PROMPT, ignore_eos=True, **one) for one in asked))

    assert [pair.call(together()) for _ in range(3)] == [alone] * 3


@pytest.mark.parametrize("penalties", [PENALTIES[0], PENALTIES[3]])
def test_streams_that_had_to_take_turns_say_what_they_say_alone(pair: EnginePair, penalties: dict[str, Any]) -> None:
    """Decode has no room for four; SGLang retracts some, and takes them up again."""
    wanted = {"ignore_eos": True, "max_new_tokens": 150, **penalties}
    alone = pair.generate(PROMPT, **wanted)

    async def together() -> list[list[int]]:
        return await asyncio.gather(*(pair.both(PROMPT, **wanted) for _ in range(4)))

    assert pair.call(together()) == [alone] * 4
    assert any("Retract requests" in log for log in pair.decode.logs())


@pytest.mark.parametrize("count", [0, 3])
def test_a_stream_does_not_stop_before_its_min_new_tokens(pair: EnginePair, oracle: Oracle, count: int) -> None:
    """Also one that is resumed: what it has said is taken off, as the gateway does."""
    bias, stop = {**FAVOURED, "400": 20.0}, [400]
    whole = penalized(oracle, PROMPT, TOKENS, logit_bias=bias, stop_token_ids=stop, min_new_tokens=6)
    assert whole.index(400) == 6
    said = pair.generate(
        PROMPT + whole[:count],
        stop_token_ids=stop,
        min_new_tokens=6 - count,
        max_new_tokens=TOKENS - count,
        custom_params={RESUMED: count},
        logit_bias=bias,
    )
    assert said == whole[count:]
