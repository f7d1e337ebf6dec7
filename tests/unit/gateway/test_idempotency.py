"""Requests with an `Idempotency-Key`: the same one again gets the same answer, and the engines work once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from engine_standin import Script
from gateway_world import Answer, Call, World, saying
from kept_world import ASKS, KEY, WHOLE, ShakyJournal, ask, keeping, replayed, rest, under_way, work

from tandem.core.answers import AnswerState
from tandem.core.tenants import Priority


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", sorted(ASKS))
async def test_the_same_request_again_gets_the_same_bytes(kind: str, stream: bool) -> None:
    async with keeping("p1", "d1") as made:
        made.engines["d1"].scripts.append(saying("hi there"))
        first = await ask(made, kind, stream=stream).run()
        second = await ask(made, kind, stream=stream).run()
        assert (first.status, second.status, work(made)) == (200, 200, 1)
        assert (replayed(first), replayed(second)) == (False, True)
        if stream:
            assert text_of(second) == text_of(first) != ""
        else:
            assert without_times(second) == without_times(first)


def without_times(answer: Answer) -> Any:
    return {**answer.json(), "completed_at": None}


def text_of(answer: Answer) -> str:
    """All that a stream says, whatever the pieces."""
    found = ""
    for event in answer.events():
        if event == "[DONE]":
            continue
        for choice in event.get("choices", ()):
            delta = choice.get("delta", {})
            found += choice.get("text", "") + delta.get("reasoning_content", "") + delta.get("content", "")
        delta = event.get("delta", "")
        found += delta if isinstance(delta, str) else delta.get("text", "") + delta.get("thinking", "")
    return found


def states(journal: ShakyJournal) -> list[AnswerState]:
    return [kept.state for kept in journal._table._answers.values()]


@contextlib.asynccontextmanager
async def untold(journal: ShakyJournal) -> AsyncIterator[tuple[World, Call, asyncio.Task[Answer]]]:
    """An answer that is complete, and whose record is not written yet: its client is not told the end."""
    async with keeping("p1", "d1", journal=journal) as made:
        made.engines["d1"].scripts.append(saying("hi there"))
        made.meter.disk.clear()
        call = ask(made, stream=True)
        running = asyncio.create_task(call.run())
        await made.until(lambda: bool(made.records))
        yield made, call, running


async def test_before_a_client_is_told_the_end_its_answer_is_counted_and_then_closed() -> None:
    journal = ShakyJournal()
    async with untold(journal) as (made, call, running):
        await asyncio.sleep(0.05)  # the end would have come
        assert not call.answer.complete
        assert states(journal) == [AnswerState.OPEN]
        made.meter.disk.set()
        assert ((await running).text(), len(made.records)) == ("hi there", 1)
        assert states(journal) == [AnswerState.DONE]


async def test_an_answer_whose_client_leaves_before_it_is_told_the_end_is_counted_and_closed() -> None:
    journal = ShakyJournal()
    async with untold(journal) as (made, call, running):
        call.leave()
        await running
        made.meter.disk.set()
        await made.until(lambda: states(journal) == [AnswerState.DONE])
        assert len(made.records) == 1


async def test_an_answer_that_runs_on_without_its_client_is_counted_while_the_journal_is_away() -> None:
    journal = ShakyJournal()
    async with keeping("p1", "d1", journal=journal) as made:
        go = asyncio.Event()
        made.engines["d1"].scripts.append(saying("hi there", go=go))
        call = ask(made, stream=True)
        async with under_way(call, b"her"):
            call.leave()
        journal.away = True
        go.set()
        await made.until(lambda: len(made.records) == 1)
        journal.away = False
        await made.until(lambda: states(journal) == [AnswerState.DONE])


async def test_requests_without_a_key_are_served_anew() -> None:
    async with keeping("p1", "d1") as made:
        one, two = await made.complete(), await made.complete()
        assert (one.json()["id"] != two.json()["id"], work(made)) == (True, 2)


async def test_a_key_of_another_request_is_refused() -> None:
    async with keeping("p1", "d1") as made:
        await ask(made).run()
        found = await ask(made, max_tokens=5).run()
        assert (found.status, found.json()["error"]["code"]) == (422, "idempotency_key_reused")
        other = await ask(made, "chat").run()
        assert (other.status, work(made)) == (422, 1)


async def test_the_order_of_fields_makes_no_other_request() -> None:
    async with keeping("p1", "d1") as made:
        for body in (b'{"model": "tiny", "prompt": [5, 6]}', b'{"prompt":[5,6],"model":"tiny"}'):
            assert (await made.call("/v1/completions", body, KEY).run()).status == 200
        assert work(made) == 1


@pytest.mark.parametrize("key", ["", "x" * 256, "k\u00e4"])
async def test_what_is_no_key_is_refused(key: str) -> None:
    async with keeping("p1", "d1") as made:
        found = await ask(made, key=key).run()
        assert (found.status, found.json()["error"]["code"]) == (400, "invalid_idempotency_key")


async def test_the_keys_of_two_tenants_are_two() -> None:
    async with keeping("p1", "d1", auth="required", fleet={"tenants": {"a": {}, "b": {}}}) as made:
        path, body = ASKS["completion"]
        for tenant in ("a", "b", "a"):
            assert (await made.call(path, body, {**KEY, **await made.key(tenant)}).run()).status == 200
        assert work(made) == 2


async def test_one_joins_an_answer_that_is_under_way() -> None:
    async with keeping("p1", "d1") as made:
        go = asyncio.Event()
        made.engines["d1"].scripts.append(saying("hi there", go=go))
        async with under_way(ask(made, stream=True), b"her") as first:
            async with under_way(ask(made, stream=True), b"her") as second:
                go.set()
            assert (await first).text() == (await second).text() == "hi there"
            assert (work(made), replayed(await second)) == (1, True)


async def test_of_two_at_once_one_is_sent_to_the_engines() -> None:
    async with keeping("p1", "d1") as made:
        found = await asyncio.gather(*(ask(made).run() for _ in range(8)))
        assert ({one.json()["id"] for one in found} == {found[0].json()["id"]}, work(made)) == (True, 1)


async def test_an_answer_is_billed_once() -> None:
    async with keeping("p1", "d1") as made:
        for _ in range(3):
            await ask(made).run()
        await made.until(lambda: len(made.records) == 1)
        [record] = made.records
        assert (record.prompt_tokens, record.completion_tokens, record.outcome) == (2, 3, "ok")


async def test_a_replay_takes_nothing_of_the_limits() -> None:
    fleet = {"default_tenant": {"requests_per_minute": 1}}
    async with keeping("p1", "d1", fleet=fleet) as made:
        assert [(await ask(made).run()).status for _ in range(3)] == [200, 200, 200]
        assert (await ask(made, key="k2").run()).status == 429


async def test_all_choices_come_again_with_logprobs_and_ids() -> None:
    async with keeping("p1", "d1") as made:
        fields = {"n": 2, "logprobs": 2, "return_token_ids": True}
        first, second = await ask(made, **fields).run(), await ask(made, **fields).run()
        assert (first.json(), work(made)) == (second.json(), 2)


async def test_stop_strings_stop_a_replay_where_they_stopped_the_answer() -> None:
    async with keeping("p1", "d1") as made:
        made.engines["d1"].scripts.append(saying("one two three"))
        found = [(await ask(made, stop=["tw"]).run()).json()["choices"][0] for _ in range(2)]
        assert [(one["text"], one["finish_reason"]) for one in found] == [("one ", "stop")] * 2


async def test_an_answer_runs_on_for_a_client_that_comes_back() -> None:
    async with keeping("p1", "d1") as made:
        go = asyncio.Event()
        made.engines["d1"].scripts.append(saying("hi there", go=go))
        call = ask(made, stream=True)
        async with under_way(call, b"her"):
            call.leave()
        async with under_way(ask(made, stream=True), b"her") as second:
            go.set()
        assert ((await second).text(), work(made), made.engines["d1"].aborted) == ("hi there", 1, [])
        await made.until(lambda: len(made.records) == 1)
        assert made.records[0].outcome == "ok"


async def test_nobody_who_comes_back_in_time_ends_it() -> None:
    async with keeping("p1", "d1", idempotency={"orphan_s": 0.02}) as made:
        made.engines["d1"].scripts.append(saying("hi there", go=asyncio.Event()))
        call = ask(made, stream=True)
        async with under_way(call, b"her"):
            call.leave()
        await made.engines["d1"].idle()
        await made.until(lambda: len(made.records) == 1)
        assert (made.records[0].outcome, made.engines["d1"].aborted != []) == ("client_gone", True)


async def test_what_was_ended_for_want_of_a_client_goes_on_when_it_is_back() -> None:
    async with keeping("p1", "d1", idempotency={"orphan_s": 0.02}) as made:
        made.engines["d1"].scripts.append(Script(ids=WHOLE[:-1], finish=None))
        made.engines["d1"].choose = lambda body: rest(body) if len(body["input_ids"]) > 2 else None
        call = ask(made, stream=True)
        async with under_way(call, b"ther"):
            call.leave()
        await made.until(lambda: len(made.records) == 1)
        second = await ask(made, stream=True).run()
        assert (second.text(), len(made.engines["d1"].bodies)) == ("hi there, you all", 2)
        await made.until(lambda: len(made.records) == 2)
        # Together they are the answer, once.
        one, two = made.records
        assert (one.id != two.id, one.prompt_tokens + two.prompt_tokens) == (True, 2)
        assert one.completion_tokens + two.completion_tokens == len(WHOLE)


async def test_a_failure_is_not_kept() -> None:
    async with keeping("p1", "d1") as made:
        made.engines["d1"].scripts.append(Script(error={"message": "no", "code": 400}, ids=[]))
        assert (await ask(made).run()).status == 400
        await made.until(lambda: len(made.records) == 1)
        second = await ask(made).run()
        assert (second.status, work(made)) == (200, 2)


async def test_who_follows_is_told_of_the_failure() -> None:
    async with keeping("p1", "d1") as made:
        go = asyncio.Event()
        made.engines["d1"].scripts.append(Script(error={"message": "no", "code": 400}, ids=[], go=go))
        both = [asyncio.create_task(ask(made).run()) for _ in range(2)]
        await made.engines["d1"].until(lambda: made.engines["d1"].running)
        go.set()
        assert [(await one).status for one in both] == [400, 400]


async def test_a_journal_that_is_away_fails_no_request() -> None:
    journal = ShakyJournal()
    async with keeping("p1", "d1", journal=journal) as made:
        journal.away = True
        found = await ask(made).run()
        assert (found.status, found.headers.get("x-tandem-idempotency")) == (200, "unavailable")
        await made.until(lambda: len(made.records) == 1)


async def test_a_journal_that_goes_away_in_between_holds_up_no_end_and_has_all_of_it_later() -> None:
    journal = ShakyJournal()
    async with keeping("p1", "d1", journal=journal) as made:
        go = asyncio.Event()
        made.engines["d1"].scripts.append(saying("hi there", go=go))
        async with under_way(ask(made, stream=True), b"her") as first:
            journal.away = True
            go.set()
            assert (await first).complete
        assert len(made.records) == 1  # whatever becomes of this gateway before the journal is back
        journal.away = False
        await made.until(lambda: states(journal) == [AnswerState.DONE])
        second = await ask(made, stream=True).run()
        assert (second.text(), (await first).text(), work(made)) == ("hi there", "hi there", 1)


async def test_a_claim_whose_outcome_nobody_heard_of_holds_up_nobody() -> None:
    journal = ShakyJournal()
    async with keeping("p1", "d1", journal=journal) as made:
        journal.mute = True
        assert (await ask(made).run()).headers.get("x-tandem-idempotency") == "unavailable"
        journal.mute = False
        second = await ask(made).run()
        assert (second.status, work(made)) == (200, 2)


async def test_a_client_that_leaves_in_the_queue_leaves_its_key_to_the_next() -> None:
    async with keeping("p1", "d1") as made:
        made.service.admission.set_capacity(1)
        go = asyncio.Event()
        made.engines["d1"].scripts.append(saying("hi", go=go))
        async with under_way(ask(made, key="other", stream=True)):
            call = ask(made)
            waiting = asyncio.create_task(call.run())
            await made.until(lambda: sum(made.service.admission.waiting(one) for one in Priority) == 1)
            call.leave()
            await waiting
            go.set()
        assert (await ask(made).run()).status == 200
