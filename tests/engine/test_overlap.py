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
from support.penalized import PENALTIES, penalized
from tandem.engine.plugin.resume import RESUMED

pytestmark = pytest.mark.timeout(300)

PROMPT = [random.Random(3).randrange(300, 900) for _ in range(50)]
TOKENS = 24


@pytest.fixture(scope="module")
def pair(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnginePair]:
    with tempfile.TemporaryDirectory(prefix="tandem-") as scratch:
        pair = EnginePair(tiny, tmp_path_factory.mktemp("overlap"), scratch=Path(scratch), overlap=True)
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


def test_streams_with_other_penalties_beside_one_another_say_what_they_say_alone(pair: EnginePair) -> None:
    """They come and go at other times, so that rows are merged and dropped while tokens are in flight."""
    asked = [{**penalties, "max_new_tokens": 10 * (1 + number)} for number, penalties in enumerate([{}, *PENALTIES])]
    alone = [pair.generate(PROMPT, ignore_eos=True, **one) for one in asked]

    async def together() -> list[list[int]]:
        return await asyncio.gather(*(pair.both(PROMPT, ignore_eos=True, **one) for one in asked))

    assert [pair.call(together()) for _ in range(3)] == [alone] * 3


def test_a_stream_says_at_least_its_min_new_tokens(pair: EnginePair) -> None:
    """`stop_token_ids` holds what it would say third."""
    whole = pair.generate(PROMPT, ignore_eos=True)
    stop = {"stop_token_ids": [whole[2]], "min_new_tokens": 6}
    said = pair.generate(PROMPT, **stop)
    assert whole[2] not in said[:6]
    assert len(said) > 6
