"""Streams that lose their pair: the client sees the same answer as ever."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from engine_standin import Engine, Script
from gateway_model import ids_of
from gateway_world import Answer, World, world

from tandem.core.types import GroupState
from tandem.gateway.api.tools import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEP
from tandem.models.tokenizer import EOS_ID

BROKEN = {"type": "abort", "message": "gone", "status_code": 500}
STOP = {"type": "stop", "matched": EOS_ID}
TEXT = "hm, let me see</think>hello you, 😀 is here"
OPENING = f"hm</think>I look{CALLS_BEGIN}{CALL_BEGIN}function{SEP}look\n```json\n"
CALLING = f'{OPENING}{{"at": "wörld"}}\n```{CALL_END}{CALLS_END}'
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def plays(engine: Engine, text: str, *, breaks: tuple[int, ...] = (), cut: bool = False) -> None:
    """The engine says the text, what is left of it to who goes on; attempt i breaks off behind `breaks[i]` tokens."""
    whole, left = [*ids_of(text), EOS_ID], list(breaks)

    def choose(body: dict[str, Any]) -> Script:
        behind = (body["sampling_params"].get("custom_params") or {}).get("tandem_resumed", 0)
        if not left:
            return Script(ids=whole[behind:], finish=STOP)
        until = left.pop(0)
        # SGLang repeats the last token beside an abort.
        said = whole[behind:until] if cut else [*whole[behind:until], whole[until - 1]]
        return Script(ids=said, finish=BROKEN, cut=cut)

    engine.choose = choose


def chunks(answer: Answer) -> list[dict[str, Any]]:
    """What a streaming chat said, without what differs from request to request."""
    found = [event["choices"][0]["delta"] for event in answer.events()[:-1] if event["choices"]]
    return [{key: value for key, value in delta.items() if value} for delta in found]


def said(answer: Answer) -> dict[str, str]:
    """All text of a streaming chat, by kind."""
    whole: dict[str, str] = {}
    for delta in chunks(answer):
        for kind, value in delta.items():
            if isinstance(value, str):
                whole[kind] = whole.get(kind, "") + value
    return whole


async def chat(*breaks: int, text: str = TEXT, cut: bool = False, **fields: Any) -> tuple[Answer, World]:
    async with world("p0", "d0") as w:
        plays(w.engines["d0"], text, breaks=breaks, cut=cut)
        return await w.chat(stream=True, stream_options={"include_usage": True}, **fields), w


@pytest.mark.parametrize("cut", [False, True], ids=["an abort", "a cut connection"])
@pytest.mark.parametrize("place", range(1, len(ids_of(TEXT)) + 1))
async def test_a_stream_that_breaks_off_anywhere_is_the_same_stream(place: int, cut: bool) -> None:
    (undisturbed, _), (found, _) = await chat(), await chat(place, cut=cut)
    assert said(found) == said(undisturbed)
    assert found.events()[-1] == "[DONE]"
    assert found.events()[-2]["usage"]["completion_tokens"] == len(ids_of(TEXT)) + 1


async def test_a_stream_that_breaks_off_again_and_again_is_the_same_stream() -> None:
    places = range(1, len(ids_of(TEXT)) + 1)
    (undisturbed, _), (found, w) = await chat(), await chat(*places)
    assert said(found) == said(undisturbed)
    assert (w.records[0].outcome, w.records[0].migrations) == ("ok", len(places))


@pytest.mark.parametrize(
    "behind",
    [f"hm</think>I look{CALLS_BEGIN}", OPENING[:-12], OPENING, f'{OPENING}{{"at": "w', CALLING.removesuffix(CALLS_END)],
    ids=["the opening", "the name", "the fence", "half an argument", "the call"],
)
async def test_a_tool_call_across_the_break_is_the_same_call(behind: str) -> None:
    found, w = await chat(len(ids_of(behind)), text=CALLING, tools=[LOOK])
    calls = [call for delta in chunks(found) for call in delta.get("tool_calls", [])]
    assert [call["function"]["name"] for call in calls if "name" in call["function"]] == ["look"]
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"at": "wörld"}
    assert said(found)["content"] == "I look"
    assert found.events()[-3]["choices"][0]["finish_reason"] == "tool_calls"
    assert w.records[0].migrations == 1


async def test_the_delivered_tokens_that_another_pair_reads_are_not_counted_as_prompt() -> None:
    (undisturbed, _), (found, w) = await chat(), await chat(3, 7)
    assert len(w.engines["d0"].bodies[-1]["input_ids"]) == len(w.engines["d0"].bodies[0]["input_ids"]) + 7
    usage = found.events()[-2]["usage"]
    assert usage == undisturbed.events()[-2]["usage"]
    assert usage["prompt_tokens"] == w.records[0].prompt_tokens == len(w.engines["d0"].bodies[0]["input_ids"])


async def test_whoever_goes_on_gets_the_prompt_and_what_was_delivered() -> None:
    _, w = await chat(4, max_tokens=50, frequency_penalty=0.5)
    for engine in w.engines.values():
        first, second = engine.bodies
        assert second["input_ids"] == first["input_ids"] + ids_of(TEXT)[:4]
        assert second["sampling_params"]["max_new_tokens"] == 46
        assert second["sampling_params"]["custom_params"] == {"tandem_resumed": 4}
        assert second["sampling_params"]["frequency_penalty"] == 0.5
        assert second["bootstrap_room"] != first["bootstrap_room"]


async def test_a_stop_string_across_the_break_is_found() -> None:
    text = "</think>one two END three"
    place = len(ids_of("</think>one two E"))
    found, w = await chat(place, text=text, stop=["END"])
    assert said(found)["content"] == "one two "
    assert (w.records[0].outcome, w.records[0].migrations) == ("ok", 1)


async def test_an_answer_that_is_not_streamed_is_the_same() -> None:
    async with world("p0", "d0") as w:
        plays(w.engines["d0"], "one two three", breaks=(2,))
        answer = (await w.complete()).json()
    assert answer["choices"][0]["text"] == "one two three"
    assert answer["usage"]["completion_tokens"] == len(ids_of("one two three")) + 1


async def test_logprobs_go_on_with_their_tokens() -> None:
    async with world("p0", "d0") as w:
        plays(w.engines["d0"], "one two three", breaks=(2,))
        broken = (await w.complete(logprobs=1)).json()["choices"][0]
        whole = (await w.complete(logprobs=1)).json()["choices"][0]
    assert broken["logprobs"] == whole["logprobs"]


async def test_a_lost_group_is_left_for_another_at_once() -> None:
    async with world("p0", "d0", "d1") as w:
        for name in ("d0", "d1"):
            w.engines[name].choose = lambda body: None
        first = Script(ids=ids_of("one two"), finish=None)
        w.engines["d0"].default = w.engines["d1"].default = first
        call = w.call("/v1/completions", {"model": "tiny", "prompt": [5], "stream": True})
        running = asyncio.create_task(call.run())
        await w.until(lambda: w.metric("tandem_delivered_tokens_total") == len(first.ids))
        (begun,) = [name for name in ("d0", "d1") if w.engines[name].bodies]
        other = "d1" if begun == "d0" else "d0"
        w.engines[other].default = Script(ids=[*ids_of(" three"), EOS_ID], finish=STOP)
        w.group(begun, state=GroupState.FAILED)
        answer = await running
        await w.quiet()
    assert answer.text() == "one two three"


async def test_a_stream_is_moved_off_a_group_that_drains_when_its_time_has_come() -> None:
    async with world("p0", "d0", "d1") as w:
        w.group("d1", state=GroupState.CORDONED)
        w.engines["d0"].default = Script(ids=ids_of("one two"), finish=None)
        w.engines["d1"].default = Script(ids=[*ids_of(" three"), EOS_ID], finish=STOP)
        call = w.call("/v1/completions", {"model": "tiny", "prompt": [5], "stream": True})
        running = asyncio.create_task(call.run())
        await w.until(lambda: w.metric("tandem_delivered_tokens_total") == 2)
        w.group("d0", state=GroupState.DRAINING, migrate_at=time.time())
        w.group("d1")
        answer = await running
        await w.quiet()
        assert w.metric("tandem_migrations_total", reason="moved") == 1
    assert answer.text() == "one two three"


async def test_a_stream_stays_where_it_is_while_nobody_else_could_go_on() -> None:
    async with world("p0", "d0", "d1") as w:
        w.group("d1", weight_version="v2")
        go = asyncio.Event()
        w.engines["d0"].default = Script(ids=[*ids_of("one two"), EOS_ID], finish=STOP, go=go)
        call = w.call("/v1/completions", {"model": "tiny", "prompt": [5], "stream": True})
        running = asyncio.create_task(call.run())
        await w.until(lambda: w.metric("tandem_delivered_tokens_total") == 2)
        w.group("d0", state=GroupState.DRAINING, migrate_at=time.time())
        await asyncio.sleep(0.05)  # had it been moved, it would have been now
        assert w.engines["d0"].aborted == []
        go.set()
        assert (await running).text() == "one two"


async def test_a_stream_never_mixes_weights() -> None:
    async with world("p0", "d0", "p1", "d1") as w:
        w.group("p1", weight_version="v2")
        w.group("d1", weight_version="v2")
        w.engines["d0"].default = Script(ids=ids_of("one two"), finish=None)
        w.group("p1", weight_version="v2", state=GroupState.CORDONED)
        call = w.call("/v1/completions", {"model": "tiny", "prompt": [5], "stream": True})
        running = asyncio.create_task(call.run())
        await w.until(lambda: w.metric("tandem_delivered_tokens_total") == 2)
        w.group("p1", weight_version="v2")
        w.group("d0", state=GroupState.FAILED)
        await w.until(lambda: w.driver.table.parked == 1)
        assert w.engines["d1"].bodies == []
        w.engines["d0"].default = Script(ids=[*ids_of(" three"), EOS_ID], finish=STOP)
        w.group("d0", epoch=2)
        assert (await running).text() == "one two three"


async def test_an_engine_with_other_weights_than_it_was_chosen_for_is_not_believed() -> None:
    async with world("p0", "d0", "d1") as w:
        for name in w.engines:
            w.group(name, weight_version="v1")
        w.engines["d0"].weights = "v2"
        answer = await w.complete(n=4)
    assert answer.json()["system_fingerprint"] == answer.headers["x-tandem-weight-version"] == "v1"
    assert [choice["finish_reason"] for choice in answer.json()["choices"]] == ["length"] * 4
    assert w.metric("tandem_leg_failures_total", role="decode", kind="bad_kv") > 0


async def test_a_request_waits_for_a_group_that_is_starting() -> None:
    async with world("p0", "d0") as w:
        w.group("d0", state=GroupState.STARTING, url="")
        running = asyncio.create_task(w.complete())
        await w.until(lambda: w.driver.table.parked == 1)
        w.group("d0", epoch=2)
        assert (await running).status == 200


async def test_it_is_told_to_come_back_when_that_takes_too_long() -> None:
    async with world("p0", "d0", capacity_wait_s=0.05) as w:
        w.group("d0", state=GroupState.STARTING, url="")
        answer = await w.complete()
    assert (answer.status, answer.json()["error"]["code"]) == (503, "no_capacity")
    assert "retry-after" in answer.headers


async def test_a_pair_whose_legs_have_different_first_tokens_is_never_shown() -> None:
    async with world("p0", "d0", confirm_kv_s=5) as w:
        prefill, decode = w.engines["p0"], w.engines["d0"]
        prefill.scripts.extend([Script(ids=ids_of("a")), Script(ids=ids_of("b"))])
        decode.scripts.extend([Script(ids=ids_of("b")), Script(ids=ids_of("b"))])
        assert (await w.complete(stream=True)).text() == "b"
        assert len(decode.bodies) == 2


async def test_a_prefill_that_aborts_after_decode_has_begun_takes_its_first_tokens_back() -> None:
    async with world("p0", "d0", confirm_kv_s=5) as w:
        prefill, decode = w.engines["p0"], w.engines["d0"]
        go = asyncio.Event()
        prefill.scripts.append(Script(ids=ids_of("x"), finish=BROKEN, go=go))
        decode.scripts.append(Script(ids=ids_of("garbage"), finish=None))
        decode.default = Script(ids=ids_of("good"))
        running = asyncio.create_task(w.complete(stream=True))
        await decode.until(lambda: decode.running)
        go.set()
        assert (await running).text() == "good"


async def test_all_ids_of_a_gateway_begin_with_its_incarnation_and_have_one_length() -> None:
    async with world("p0", "d0") as w:
        await asyncio.gather(*(w.complete() for _ in range(3)))
        rids = [body["rid"] for engine in w.engines.values() for body in engine.bodies]
        assert {rid.partition("-")[0] for rid in rids} == {w.driver.incarnation}
        assert len({len(rid) for rid in rids}) == 1
        assert len(set(rids)) == 6
