"""How kept answers end, and are counted, when their gateway dies, or the journal does not hear of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from engine_standin import Script
from gateway_world import saying
from kept_world import WHOLE, Lossy, ShakyJournal, ask, keeping, left_in_half, once, replayed, rest, under_way, work

from tandem.core.answers import AnswerState
from tandem.core.usage import UsageRecord
from tandem.gateway.answers.journal import JournalDown
from tandem.gateway.answers.kept import Kept
from tandem.models.tokenizer import EOS_ID


class Unclosed(ShakyJournal):
    """Nobody can close an answer while it is so."""

    shut = True

    async def append(self, name: str, **fields: Any) -> Any:
        if self.shut and fields["state"] is AnswerState.DONE:
            raise JournalDown("it is away")
        return await super().append(name, **fields)


async def test_an_answer_that_was_counted_and_not_closed_is_counted_again_under_the_same_id() -> None:
    journal = Unclosed()
    async with keeping("p1", "d1", journal=journal) as one, keeping("p2", "d2", journal=journal) as two:
        go = asyncio.Event()
        one.engines["d1"].scripts.append(Script(ids=WHOLE, finish={"type": "stop", "matched": EOS_ID}, go=go))
        two.engines["d2"].choose = rest
        async with under_way(ask(one, stream=True), b" all"):
            await one.until(lambda: journal.entries == 1)
            go.set()
        journal.kill(one.driver.incarnation)
        journal.shut = False
        assert (await ask(two, stream=True).run()).text() == "hi there, you all"
        await two.until(lambda: bool(two.records))
        (first,), (second,) = one.records, two.records
        assert (first.id, first.prompt_tokens, first.completion_tokens) == (
            (second.id, second.prompt_tokens, second.completion_tokens)
        )


async def test_who_was_told_the_end_takes_no_answer_over_while_it_still_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Lossy()
    told, read = asyncio.Event(), asyncio.Event()
    settle = Kept.settle

    async def slowly(kept: Kept, record: UsageRecord, *, known: bool) -> None:
        if kept.owns and kept._service is one.service:
            await read.wait()  # it stands still before it closes its answer
        await settle(kept, record, known=known)
        if not kept.owns:
            told.set()
            await read.wait()  # its client reads slowly

    async with keeping("p1", "d1", journal=journal) as one, keeping("p2", "d2", journal=journal) as two:
        monkeypatch.setattr(Kept, "settle", slowly)
        one.engines["d1"].scripts.append(Script(ids=WHOLE, finish={"type": "stop", "matched": EOS_ID}))
        async with under_way(ask(one, stream=True), b" all"), under_way(ask(two, stream=True), b" all") as second:
            await told.wait()
            journal.kill(one.driver.incarnation)
            assert (await ask(two, stream=True).run()).text() == "hi there, you all"
            await two.until(lambda: journal.states == [AnswerState.DONE])
            read.set()
        assert (await second).text() == "hi there, you all"
        await two.until(lambda: bool(two.records))
        assert [record.completion_tokens for record in two.records] == [len(WHOLE)]


async def test_an_answer_that_ends_while_the_journal_is_away_leaves_its_key_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tandem.gateway.answers.recorder.LAST_TRIES_S", 0.0)
    journal = Lossy()
    async with keeping("p1", "d1", journal=journal) as one, keeping("p2", "d2", journal=journal) as two:
        go = asyncio.Event()
        one.engines["d1"].scripts.append(saying("hi there", go=go))
        async with under_way(ask(one, stream=True), b"her"):
            await one.until(lambda: journal.entries == 1)
            journal.away = True
            go.set()
        await one.until(lambda: len(one.records) == 1)
        journal.away = False
        second = await ask(one, stream=True).run()
        assert (second.complete, work(one), replayed(second)) == (True, 2, False)
        await one.until(lambda: len(one.records) == 2)
        # Elsewhere, too.
        assert (await ask(two, stream=True).run()).complete


async def test_what_a_gateway_owns_and_does_not_know_it_frees() -> None:
    journal = Lossy()
    async with keeping("p1", "d1", journal=journal, idempotency={"orphan_s": 0}) as made:
        await left_in_half(made, journal)
        [(name, kept)] = journal._table._answers.items()
        assert await journal.take(name, before=kept.owner, owner=f"{made.driver.incarnation}:999")
        assert (await ask(made, stream=True).run()).text() == "hi there, you all"


async def test_tokens_are_billed_also_if_the_reply_to_the_last_entry_was_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tandem.gateway.answers.recorder.RETRY_S", 0.05)
    journal = Lossy(once(AnswerState.FREE))
    async with keeping("p1", "d1", journal=journal) as one, keeping("p2", "d2", journal=journal) as two:
        one.engines["d1"].scripts.append(Script(ids=WHOLE[:-1], finish=None))
        two.engines["d2"].choose = rest
        async with under_way(ask(one, stream=True), b" all"), under_way(ask(two, stream=True), b"h") as following:
            one.driver.withdraw_all()
            assert (await following).text() == "hi there, you all"
        await one.until(lambda: len(one.records) == 1)
        await two.until(lambda: len(two.records) == 1)
        assert journal.lost == 1
        assert one.records[0].completion_tokens + two.records[0].completion_tokens == len(WHOLE)
