"""Several gateways that keep answers in one journal: what one began, another goes on with."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from engine_standin import Script
from gateway_world import saying
from kept_world import WHOLE, ShakyJournal, ask, keeping, replayed, rest, under_way, work

from tandem.config import IdempotencyConfig
from tandem.gateway.answers.answers import Answers
from tandem.gateway.rpc.front import ServiceAnswers
from tandem.gateway.rpc.server import GrpcServer
from tandem.v1 import inference_pb2 as pb
from tandem.v1 import inference_pb2_grpc as stubs


async def test_another_gateway_goes_on_with_the_answer_of_a_dead_one() -> None:
    journal = ShakyJournal()
    async with keeping("p1", "d1", journal=journal) as one, keeping("p2", "d2", journal=journal) as two:
        go = asyncio.Event()
        one.engines["d1"].scripts.append(Script(ids=WHOLE, finish={"type": "stop"}, go=go))
        two.engines["d2"].choose = rest
        async with under_way(ask(one, stream=True), b" all"):
            await one.until(lambda: journal.entries == 1)
            journal.kill(one.driver.incarnation)
            second = await ask(two, stream=True).run()
            assert (second.text(), replayed(second)) == ("hi there, you all", True)
            behind = two.engines["d2"].bodies[0]["input_ids"]
            assert (len(behind) > 2, behind) == (True, [5, 6, *WHOLE][: len(behind)])
            # The first is not dead, only thought so. What it counts now has the same id, so it counts once.
            go.set()
        await two.until(lambda: len(two.records) == 1)
        [record] = two.records
        assert (record.completion_tokens, record.prompt_tokens, record.migrations) == (len(WHOLE), 2, 1)
    assert {other.id for other in one.records} <= {record.id}


async def test_an_owner_that_was_thought_dead_ends_its_work_at_its_next_token() -> None:
    journal = ShakyJournal()
    async with keeping("p1", "d1", journal=journal) as one, keeping("p2", "d2", journal=journal) as two:
        one.engines["d1"].scripts.append(Script(ids=WHOLE[:-1], finish=None))
        call = ask(one, stream=True)
        async with under_way(call, b"hi") as first:
            journal.kill(one.driver.incarnation)
            await journal.seize()
            await one.engines["d1"].idle()
            assert b"another gateway has taken this request over" in (await first).body
        assert one.engines["d1"].aborted != []
    assert (one.records, two.records) == ([], [])


async def test_who_follows_takes_over_when_the_owner_dies() -> None:
    journal = ShakyJournal()
    async with keeping("p1", "d1", journal=journal) as one, keeping("p2", "d2", journal=journal) as two:
        one.engines["d1"].scripts.append(Script(ids=WHOLE[:-1], finish=None))
        two.engines["d2"].choose = rest
        first, second = ask(one, stream=True), ask(two, stream=True)
        async with under_way(first, b" all"):
            async with under_way(second, b"h") as following:
                journal.kill(one.driver.incarnation)
                assert (await following).text() == "hi there, you all"
            first.leave()
        await two.until(lambda: len(two.records) == 1)


async def test_who_follows_goes_on_alone_when_the_journal_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tandem.gateway.answers.kept.AWAY_S", 0.0)
    journal = ShakyJournal()
    async with keeping("p1", "d1", journal=journal) as one, keeping("p2", "d2", journal=journal) as two:
        go = asyncio.Event()
        one.engines["d1"].scripts.append(saying("hi there, you all", go=go))
        two.engines["d2"].choose = rest
        first, second = ask(one, stream=True), ask(two, stream=True)
        async with under_way(first, b" all"):
            async with under_way(second, b"h") as following:
                journal.away = True
                assert (await following).text() == "hi there, you all"
            go.set()
        journal.away = False
        await two.until(lambda: len(two.records) == 1)
        await one.until(lambda: len(one.records) == 1)
        # Both have worked, and the prompt is counted once.
        assert [record.prompt_tokens for record in (*one.records, *two.records)] == [2, 0]
        assert one.records[0].id != two.records[0].id


async def test_an_answer_of_a_gateway_that_stops_goes_on_at_once_where_it_is_followed() -> None:
    journal = ShakyJournal()
    async with keeping("p1", "d1", journal=journal) as one, keeping("p2", "d2", journal=journal) as two:
        one.engines["d1"].scripts.append(Script(ids=WHOLE[:-1], finish=None))
        two.engines["d2"].choose = rest
        first, second = ask(one, stream=True), ask(two, stream=True)
        async with under_way(first, b" all"), under_way(second, b"h") as following:
            one.driver.withdraw_all()
            assert (await following).text() == "hi there, you all"
        await two.until(lambda: len(two.records) == 1)
        await one.until(lambda: len(one.records) == 1)
        # Each is counted for what it did.
        assert [record.prompt_tokens for record in (*one.records, *two.records)] == [2, 0]
        assert one.records[0].completion_tokens + two.records[0].completion_tokens == len(WHOLE)


async def test_whoever_goes_on_samples_with_the_same_seeds() -> None:
    journal = ShakyJournal()
    async with keeping("p1", "d1", journal=journal) as one, keeping("p2", "d2", journal=journal) as two:
        one.engines["d1"].default = Script(ids=WHOLE[:-1], finish=None)
        two.engines["d2"].choose = rest
        call = ask(one, n=2, stream=True)
        async with under_way(call, b" all"):
            await one.until(lambda: journal.entries > 0)
            journal.kill(one.driver.incarnation)
            assert (await ask(two, n=2, stream=True).run()).complete
            call.leave()
        seeds = [
            {body["sampling_params"]["sampling_seed"] for body in engine.bodies}
            for engine in (one.engines["d1"], two.engines["d2"])
        ]
        assert (seeds[0], len(seeds[0])) == (seeds[1], 2)


async def test_a_takeover_takes_nothing_of_the_limits() -> None:
    journal, fleet = ShakyJournal(), {"default_tenant": {"requests_per_minute": 1}}
    async with (
        keeping("p1", "d1", journal=journal, fleet=fleet) as one,
        keeping("p2", "d2", journal=journal, fleet=fleet) as two,
    ):
        assert (await ask(two, key="k2").run()).status == 200
        one.engines["d1"].scripts.append(Script(ids=WHOLE[:-1], finish=None))
        two.engines["d2"].choose = rest
        call = ask(one)
        asking = asyncio.create_task(call.run())
        await one.until(lambda: journal.entries == 2)
        journal.kill(one.driver.incarnation)
        assert (await ask(two).run()).json()["choices"][0]["text"] == "hi there, you all"
        call.leave()
        await asking


async def test_over_grpc_the_key_is_metadata() -> None:
    async with keeping("p1", "d1") as made:
        made.engines["d1"].scripts.append(saying("hi there"))
        answers = Answers(made.service, ShakyJournal(), IdempotencyConfig())
        front = ServiceAnswers(made.service, lambda: "7", answers)
        server = GrpcServer(front, shortage=lambda: None, longest_s=60, max_request_bytes=2**20)
        port = await server.start("127.0.0.1", 0)
        try:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                call = stubs.InferenceStub(channel).GenerateOnce
                request = pb.GenerateOnceRequest(model="tiny", prompt=pb.Prompt(text="hi"))
                found = [await call(request, metadata=(("idempotency-key", "k1"),), timeout=20) for _ in range(2)]
        finally:
            await server.stop(grace=0)
            await answers.close()
        assert (found[0].choices[0].text, found[0]) == ("hi there", found[1])
        assert work(made) == 1
