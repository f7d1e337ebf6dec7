"""The canary: what is asked of engines with new weights, and which answers are not good enough."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from support.canary_engine import Reply, engine, good, saying
from tandem.core.types import Role
from tandem.fleet.canary import FAKE_HOST, TOKENS, Canary, CanaryError


@pytest.fixture
async def canary() -> AsyncIterator[Canary]:
    made = Canary(within=5)
    yield made
    await made.close()


def changed(**meta: Any) -> Reply:
    def reply(body: dict[str, Any]) -> dict[str, Any]:
        answer = good(body)
        answer["meta_info"] |= meta
        return answer

    return reply


async def test_a_group_alone_is_asked_on_every_dp_rank_without_a_partner(canary: Canary) -> None:
    async with engine(Role.PREFILL) as prefill:
        assert await canary.alone(prefill.group, [1, 2]) == 7
    assert [body["routed_dp_rank"] for body in prefill.asked] == [0, 1]
    assert all(body["bootstrap_room"] % 2 == body["routed_dp_rank"] for body in prefill.asked)
    assert {(body["bootstrap_host"], body["sampling_params"]["temperature"]) for body in prefill.asked} == {
        (FAKE_HOST, 0)
    }
    assert len({len(body["rid"]) for body in prefill.asked}) == 1


async def test_prefill_ranks_that_disagree_fail(canary: Canary) -> None:
    def reply(body: dict[str, Any]) -> dict[str, Any]:
        return saying(body, [7 + body["routed_dp_rank"]])

    async with engine(Role.PREFILL, reply=reply) as prefill:
        with pytest.raises(CanaryError, match=r"disagree about the first token: \[7, 8\]"):
            await canary.alone(prefill.group, [1])


async def test_a_token_without_a_finite_probability_fails(canary: Canary) -> None:
    lost = changed(output_token_logprobs=[[None, 7 + n, None] for n in range(TOKENS)])
    async with engine(Role.PREFILL, 1) as prefill, engine(Role.DECODE, 1, lost) as decode:
        with pytest.raises(CanaryError, match="decode-0 answered with a token of no finite probability"):
            await canary.together(prefill.group, decode.group, [1])


async def test_a_decode_group_alone_is_not_asked_for_probabilities_which_nobody_has_written(canary: Canary) -> None:
    async with engine(Role.DECODE, 2) as decode:
        await canary.alone(decode.group, [1])
    assert [body.get("return_logprob") for body in decode.asked] == [None, None]


async def test_an_abort_is_a_failure(canary: Canary) -> None:
    async with engine(Role.DECODE, 1, changed(finish_reason={"type": "abort", "message": "no KV"})) as decode:
        with pytest.raises(CanaryError, match=r"the canary on decode-0 failed: .*no KV"):
            await canary.alone(decode.group, [1])


async def test_an_engine_that_is_not_there_is_a_failure(canary: Canary) -> None:
    async with engine(Role.DECODE, 1) as decode:
        pass
    with pytest.raises(CanaryError, match="the canary on decode-0 failed"):
        await canary.alone(decode.group, [1])


async def test_a_pair_gets_the_prompt_at_both_ends_over_every_dp_rank(canary: Canary) -> None:
    async with engine(Role.PREFILL) as prefill, engine(Role.DECODE, 3) as decode:
        assert await canary.together(prefill.group, decode.group, [1]) == (tuple(range(7, 7 + TOKENS)),)
    rooms = [{body["bootstrap_room"] for body in one.asked} for one in (prefill, decode)]
    assert rooms[0] == rooms[1]
    assert [body["routed_dp_rank"] for body in prefill.asked] == [0, 1, 0]
    assert [body["routed_dp_rank"] for body in decode.asked] == [0, 1, 2]
    assert [body["disagg_prefill_dp_rank"] for body in decode.asked] == [0, 1, 0]
    assert {(body["bootstrap_host"], body["bootstrap_port"]) for body in decode.asked} == {("10.0.0.1", 9)}


async def test_a_decode_group_that_begins_with_another_token_than_prefill_fails(canary: Canary) -> None:
    def other(body: dict[str, Any]) -> dict[str, Any]:
        return saying(body, list(range(20, 20 + TOKENS)))

    async with engine(Role.PREFILL, 1) as prefill, engine(Role.DECODE, 1, other) as decode:
        with pytest.raises(CanaryError, match="decode-0 did not begin with the token that prefill-0 computed"):
            await canary.together(prefill.group, decode.group, [1])


async def test_decode_ranks_that_answer_differently_fail(canary: Canary) -> None:
    def reply(body: dict[str, Any]) -> dict[str, Any]:
        return saying(body, [7] * TOKENS if body["routed_dp_rank"] else [7, *[9] * (TOKENS - 1)])

    async with engine(Role.PREFILL, 1) as prefill, engine(Role.DECODE, 2, reply) as decode:
        with pytest.raises(CanaryError, match="answer differently to the same prompt"):
            await canary.together(prefill.group, decode.group, [1])


def parting(body: dict[str, Any]) -> dict[str, Any]:
    """Each DP rank answers otherwise, but for the first token."""
    return saying(body, [7, *[20 + body["routed_dp_rank"]] * (TOKENS - 1)])


async def test_where_answers_are_not_exact_they_need_only_begin_alike() -> None:
    canary = Canary(within=5, exact=False)
    async with engine(Role.PREFILL, 1) as prefill, engine(Role.DECODE, 2, parting) as decode:
        answers = await canary.together(prefill.group, decode.group, [1])
    await canary.close()
    assert answers == ((7, *[20] * (TOKENS - 1)), (7, *[21] * (TOKENS - 1)))
    assert (canary.alike([7, 20], [7, 21]), canary.alike([7, 20], [8, 20])) == (True, False)


async def test_where_answers_are_not_exact_decode_must_still_begin_with_prefills_token() -> None:
    canary = Canary(within=5, exact=False)
    async with (
        engine(Role.PREFILL, 1) as prefill,
        engine(Role.DECODE, 1, lambda body: saying(body, [9] * TOKENS)) as decode,
    ):
        with pytest.raises(CanaryError, match="did not begin with the token that prefill-0 computed"):
            await canary.together(prefill.group, decode.group, [1])
    await canary.close()
