"""The whole fleet, gateway to decode ranks, says token for token what transformers says."""

from __future__ import annotations

import random

import pytest

from support.fleet import Fleet
from support.oracle import Oracle
from tandem.bench.client import RequestFailed

pytestmark = pytest.mark.timeout(300)

TOKENS = 24
LENGTHS = (1, 2, 3, 17, 64, 130, 257, 600, 1000, 2000)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Twelve prompts of 1 to 2,000 tokens; three of them begin with the same 200."""
    rng = random.Random(7)
    own = [[rng.randrange(300, 900) for _ in range(length)] for length in LENGTHS[:-3]]
    shared = [rng.randrange(300, 900) for _ in range(200)]
    long = [[rng.randrange(300, 900) for _ in range(length)] for length in LENGTHS[-3:]]
    return own + long[1:] + [shared + [rng.randrange(300, 900) for _ in range(tail)] for tail in (1, 50, 400)]


@pytest.fixture(scope="module")
def expected(oracle: Oracle, prompts: list[list[int]]) -> list[list[int]]:
    return [oracle.complete(prompt, TOKENS) for prompt in prompts]


def test_streams_one_at_a_time_equal_the_oracle(
    fleet: Fleet, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    assert [fleet.complete(prompt, TOKENS) for prompt in prompts] == expected


def test_streams_all_at_once_equal_the_oracle(
    fleet: Fleet, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    assert fleet.complete_all(prompts, TOKENS) == expected


def test_the_context_can_be_filled_to_the_last_token(fleet: Fleet) -> None:
    """4,096 tokens, of which SGLang keeps two for itself."""
    assert len(fleet.complete([500] * 4089, 5)) == 5


@pytest.mark.parametrize(("prompt", "answer"), [(4091, 1), (4089, 6), (5000, 1)])
def test_a_request_beyond_the_context_is_refused_with_openais_code(fleet: Fleet, prompt: int, answer: int) -> None:
    with pytest.raises(RequestFailed, match=r"HTTP 400: .*maximum context length is 4094.*context_length_exceeded"):
        fleet.complete([500] * prompt, answer)
