"""Kept answers when the journal loses a reply, is away at a bad moment, or holds what nobody can go on with."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from engine_standin import Script
from gateway_model import ids_of
from gateway_world import saying
from kept_world import WHOLE, Lossy, ShakyJournal, ask, keeping, left_in_half, once, replayed, rest, under_way, work

from tandem.core.answers import AnswerState
from tandem.gateway.answers.journal import JournalDown
from tandem.models.tokenizer import EOS_ID

BROKEN = {"type": "abort", "message": "gone", "status_code": 500}
GOOD = [*ids_of("good answer, really"), EOS_ID]


def good(body: dict[str, Any]) -> Script:
    return Script(ids=GOOD[len(body["input_ids"]) - 2 :], finish={"type": "stop", "matched": EOS_ID})


# Answers that are not to be trusted


def bad_kv(made: Any) -> asyncio.Event:
    """The first answer there turns out to be garbage when the event is set; those that follow are good."""
    go = asyncio.Event()
    made.engines["p1"].scripts.append(Script(ids=ids_of("x"), finish=BROKEN, go=go))
    made.engines["d1"].scripts.append(Script(ids=ids_of("garbage!!"), finish=None))
    made.engines["d1"].choose = lambda body: good(body) if made.engines["d1"].bodies else None
    return go


@pytest.mark.parametrize("loses", [lambda call, fields: False, once(AnswerState.VOID)])
async def test_what_bad_kv_has_made_is_not_kept(loses: Callable[[str, dict[str, Any]], bool]) -> None:
    journal = Lossy(loses)
    async with keeping("p1", "d1", journal=journal, confirm_kv_s=0.01) as made:
        go = bad_kv(made)
        async with under_way(ask(made, stream=True), b"garbage") as first:
            await made.until(lambda: journal.entries == 1)
            go.set()
        assert b"bad_kv" in (await first).body
        await made.until(lambda: journal.states == [AnswerState.VOID])
        second = await ask(made, stream=True).run()
        assert (second.text(), replayed(second)) == ("good answer, really", False)
        await made.until(lambda: len(made.records) == 2)
        assert made.records[0].id != made.records[1].id


async def test_who_follows_an_answer_of_bad_kv_fails_too() -> None:
    async with keeping("p1", "d1", confirm_kv_s=0.01) as made:
        go = bad_kv(made)
        async with (
            under_way(ask(made, stream=True), b"garbage") as first,
            under_way(ask(made, stream=True), b"garbage") as second,
        ):
            go.set()
        assert b"bad_kv" in (await first).body
        assert b"bad_kv" in (await second).body


async def test_who_follows_what_was_begun_anew_is_told_to_ask_again() -> None:
    journal = Lossy()
    async with keeping("p1", "d1", journal=journal) as made:
        go = asyncio.Event()
        made.engines["d1"].scripts.append(saying("hi there", go=go))
        async with under_way(ask(made, stream=True), b"her"), under_way(ask(made, stream=True), b"her") as second:
            [(name, kept)] = journal._table._answers.items()
            kept.owner = "somebody:1"
            assert await journal.restart(name, owner="somebody:1")
            assert b"begun anew" in (await second).body
            go.set()


# Taking over


async def test_a_take_whose_reply_was_lost_is_a_take() -> None:
    journal = Lossy(lambda call, fields: call == "take")
    async with keeping("p1", "d1", journal=journal) as one, keeping("p2", "d2", journal=journal) as two:
        one.engines["d1"].scripts.append(Script(ids=WHOLE[:-1], finish=None))
        two.engines["d2"].choose = rest
        first = ask(one, stream=True)
        async with under_way(first, b" all"):
            async with under_way(ask(two, stream=True), b"h") as following:
                journal.kill(one.driver.incarnation)
                assert (await following).text() == "hi there, you all"
            first.leave()
        await two.until(lambda: len(two.records) == 1 and journal.states == [AnswerState.DONE])
        assert journal.lost == 1
        assert (await ask(two, stream=True).run()).text() == "hi there, you all"


async def test_a_client_that_leaves_while_its_answer_is_taken_leaves_it_to_the_next() -> None:
    journal = Lossy()
    journal.gate = asyncio.Event()
    async with keeping("p1", "d1", journal=journal) as one, keeping("p2", "d2", journal=journal) as two:
        one.engines["d1"].scripts.append(Script(ids=WHOLE[:-1], finish=None))
        two.engines["d2"].choose = rest
        first, second = ask(one, stream=True), ask(two, stream=True)
        async with under_way(first, b" all"):
            async with under_way(second, b"h"):
                journal.kill(one.driver.incarnation)
                await two.until(lambda: journal.taken)
                second.leave()
            first.leave()
        journal.gate.set()
        await two.until(lambda: journal.states == [AnswerState.FREE])
        assert (await ask(two, stream=True).run()).text() == "hi there, you all"


async def test_a_journal_that_takes_nothing_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.gateway.answers.kept.RETRY_S", 0.0)

    class Mute(ShakyJournal):
        async def take(self, name: str, *, before: str, owner: str) -> bool:
            raise JournalDown("it cannot be written to")

    journal = Mute()
    async with keeping("p1", "d1", journal=journal) as one, keeping("p2", "d2", journal=journal) as two:
        one.engines["d1"].scripts.append(Script(ids=WHOLE[:-1], finish=None))
        two.engines["d2"].choose = rest
        first = ask(one, stream=True)
        async with under_way(first, b" all"):
            async with under_way(ask(two, stream=True), b"h") as following:
                journal.kill(one.driver.incarnation)
                assert (await following).text() == "hi there, you all"
            first.leave()


async def test_two_that_go_on_alone_have_records_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.gateway.answers.kept.AWAY_S", 0.0)
    journal = ShakyJournal()
    async with keeping("p1", "d1", journal=journal) as one, keeping("p2", "d2", journal=journal) as two:
        go = asyncio.Event()
        one.engines["d1"].scripts.append(Script(ids=WHOLE, finish={"type": "stop"}, go=go))
        two.engines["d2"].choose = rest
        async with under_way(ask(one, stream=True), b" all"):
            await one.until(lambda: journal.entries == 1)
            calls = [ask(two, stream=True) for _ in range(2)]
            tasks = [asyncio.create_task(call.run()) for call in calls]
            for call in calls:
                await call.until_body(b" all")
            journal.away = True
            assert [(await task).text() for task in tasks] == ["hi there, you all"] * 2
            go.set()
        journal.away = False
        await two.until(lambda: len(two.records) == 2)
        assert len({record.id for record in two.records}) == 2
        # Of the answer each has made the last token itself.
        assert [(record.prompt_tokens, record.completion_tokens) for record in two.records] == [(0, 1)] * 2


# One gateway, twice the owner


async def test_a_lease_that_lapses_makes_no_two_requests_of_one_name() -> None:
    journal = ShakyJournal()
    async with keeping("p1", "d1", journal=journal) as made:
        go = asyncio.Event()
        made.engines["d1"].scripts.append(Script(ids=WHOLE[:1], finish={"type": "length"}, go=go))
        first = asyncio.create_task(ask(made).run())
        await made.engines["d1"].until(lambda: made.engines["d1"].running)
        journal.kill(made.driver.incarnation)
        second = asyncio.create_task(ask(made).run())
        await made.engines["d1"].until(lambda: len(made.engines["d1"].bodies) == 2)
        journal.dead.clear()
        go.set()
        assert ((await second).status, (await first).status in (200, 503)) == (200, True)
        await made.until(lambda: not made.driver.table.open_requests)


# Weights that are no more


@pytest.mark.parametrize("lost", [False, True])
async def test_a_part_of_weights_that_no_group_has_is_dropped(lost: bool) -> None:
    journal = Lossy(lambda call, fields: lost and call == "restart" and not journal.lost)
    async with keeping("p1", "d1", journal=journal, idempotency={"orphan_s": 0}) as made:
        for name in ("p1", "d1"):
            made.group(name, weight_version="v1")
        made.engines["d1"].scripts.append(Script(ids=ids_of("old"), finish=None))
        call = ask(made, stream=True)
        async with under_way(call, b"old"):
            call.leave()
        await made.until(lambda: len(made.records) == 1 and journal.states == [AnswerState.FREE])
        for name in ("p1", "d1"):
            made.engines[name].weights = "v2"
            made.group(name, weight_version="v2", epoch=2)
        made.engines["d1"].choose = good
        if lost:
            found = await ask(made, stream=True).run()
            assert (found.status, found.headers["retry-after"]) == (503, "1")
        second = await ask(made, stream=True).run()
        assert second.text() == "good answer, really"
        await made.until(lambda: journal.states[-1:] == [AnswerState.DONE])
        third = await ask(made, stream=True).run()
        assert (third.text(), replayed(third), work(made)) == ("good answer, really", True, 2)
        ids = [record.id for record in made.records]
        assert len(set(ids)) == len(ids)
        if not lost:
            # The prompt is counted once, and tokens that were counted for the old part are not again.
            assert sum(record.prompt_tokens for record in made.records) == 2
            assert sum(record.completion_tokens for record in made.records) == len(GOOD)


async def test_a_part_waits_for_its_weights_while_a_group_is_coming() -> None:
    journal = Lossy()
    async with keeping("p1", "d1", journal=journal, idempotency={"orphan_s": 0}) as made:
        for name in ("p1", "d1"):
            made.group(name, weight_version="v1")
        await left_in_half(made, journal)
        made.group("d1", weight_version="v1", state="failed")
        async with under_way(ask(made, stream=True), b" all") as second:
            made.group("d1", weight_version="v1", epoch=2)
        assert (await second).text() == "hi there, you all"


# Many, and large ones


async def test_so_many_follow_one_answer_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.gateway.answers.answers.KEY_FOLLOWERS", 2)
    async with keeping("p1", "d1") as made:
        go = asyncio.Event()
        made.engines["d1"].scripts.append(saying("hi there", go=go))
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(under_way(ask(made, stream=True), b"her"))
            found = await ask(made, stream=True).run()
            assert (found.status, found.headers["retry-after"]) == (429, "2")
            go.set()
        # Their places are free again.
        assert (await ask(made, stream=True).run()).text() == "hi there"


async def test_so_many_of_a_tenant_follow_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.gateway.answers.answers.TENANT_FOLLOWERS", 1)
    async with keeping("p1", "d1") as made:
        go = asyncio.Event()
        made.engines["d1"].default = saying("hi there", go=go)
        async with contextlib.AsyncExitStack() as stack:
            for key in ("a", "b", "a"):
                await stack.enter_async_context(under_way(ask(made, key=key, stream=True), b"her"))
            assert (await ask(made, key="b", stream=True).run()).status == 429
            go.set()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_long_answer_is_replayed_in_turns(stream: bool) -> None:
    text = "hi there, you all " * 500
    async with keeping("p1", "d1") as made:
        made.engines["d1"].scripts.append(saying(text))
        first, second = await ask(made, stream=stream).run(), await ask(made, stream=stream).run()
        if not stream:
            assert first.json() == second.json()
            return
        assert first.text() == second.text() == text
        # Nobody has waited for all of it at once.
        assert len(second.events()) > 3
