"""Several answers to one request: choices of one prompt, and prompts of one completion."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from engine_standin import Script
from gateway_model import CARD, ids_of, tokenizer, vocabulary
from gateway_world import Answer, Call, World, saying, world

from tandem.core.answer_times import kept, rises
from tandem.core.pair_events import Fail, Failure, FailureKind
from tandem.core.routing import RouteAsk
from tandem.core.tenants import Priority
from tandem.gateway.api.choices import sampling_for
from tandem.gateway.api.requests import completion_request
from tandem.gateway.errors import ApiError
from tandem.gateway.observe.metrics import Metrics
from tandem.gateway.observe.tracing import Tracing
from tandem.gateway.pairing.bell import Bell
from tandem.gateway.pairing.engine_body import EngineRequest
from tandem.gateway.pairing.reply import Reply, Run
from tandem.gateway.pairing.ticket import Ticket
from tandem.gateway.text.answer import Answer as Reader

COUNTS = ("prompt_tokens", "completion_tokens", "total_tokens")
BROKEN = {"type": "abort", "message": "gone", "status_code": 500}
GIVEN_UP = [Script(ids=[], finish=BROKEN)] * 3
"""No pair will have what is left of it."""
WORDS = ["one", "two", "three", "four", "five", "six"]


SEED = 7


def seeds_of(n: int) -> list[int]:
    """The seeds of the choices of a request with SEED."""
    wanted = completion_request({"model": "tiny", "prompt": [5], "n": n, "seed": SEED}, CARD)
    form = tokenizer().tool_format
    return [sampling_for(wanted, i, thinking=False, limit=1, form=form)["sampling_seed"] for i in range(n)]


def say(
    w: World, *each: str | Script | list[Script], prompts: Sequence[Sequence[int]] = (), engine: str = "d0"
) -> None:
    """What the engine says to each choice of each prompt (none = of any), in whatever order they come; of a list, to
    each attempt. The request must have SEED."""
    seeds = seeds_of(len(each) // (len(prompts) or 1))
    keys = itertools.product([tuple(prompt) for prompt in prompts] or [()], seeds)
    table = dict(zip(keys, each, strict=True))

    def choose(body: dict[str, Any]) -> Script | None:
        prompt = tuple(body["input_ids"]) if prompts else ()
        found = table[prompt, body["sampling_params"]["sampling_seed"]]
        if isinstance(found, list):
            return found.pop(0) if found else None
        return saying(found) if isinstance(found, str) else found

    w.engines[engine].choose = choose


def streamed(answer: Answer) -> dict[int, str]:
    """The text of each choice of a stream."""
    texts: dict[int, str] = {}
    for event in answer.events()[:-1]:
        for choice in event["choices"]:
            text = choice["text"] if "text" in choice else choice["delta"].get("content") or ""
            texts[choice["index"]] = texts.get(choice["index"], "") + text
    return texts


def seeds(w: World) -> list[int | None]:
    return [body["sampling_params"].get("sampling_seed") for body in w.engines["d0"].bodies]


def rid_of(w: World, choice: int) -> str:
    """The engine's name of a choice of a request with SEED."""
    (found,) = (
        body["rid"]
        for body in w.engines["d0"].bodies
        if body["sampling_params"]["sampling_seed"] == seeds_of(3)[choice]
    )
    return str(found)


async def begun(w: World, **fields: Any) -> tuple[Call, asyncio.Task[Answer]]:
    """A streamed completion that has sent something, and whose answer goes on."""
    call = w.call("/v1/completions", {"model": "tiny", "prompt": [5, 6], "stream": True, **fields})
    running = asyncio.create_task(call.run())
    await call.until_body()
    return call, running


async def test_choices_are_numbered_and_the_prompt_counts_once() -> None:
    async with world("p0", "d0") as w:
        say(w, *WORDS[:3])
        found = (await w.complete(n=3, seed=SEED)).json()
    assert [(c["index"], c["text"], c["finish_reason"]) for c in found["choices"]] == [
        (0, "one", "stop"),
        (1, "two", "stop"),
        (2, "three", "stop"),
    ]
    assert found["usage"]["prompt_tokens"] == 2
    assert found["usage"]["completion_tokens"] == sum(len(ids_of(word)) + 1 for word in WORDS[:3])


async def test_each_prompt_of_a_list_is_answered_n_times_and_counts_once() -> None:
    async with world("p0", "d0") as w:
        prompts = [[5], [6, 7], [8, 9, 10]]
        say(w, *WORDS, prompts=prompts)
        found = (await w.complete(prompt=prompts, n=2, seed=SEED)).json()
        asked = sorted(body["input_ids"] for body in w.engines["d0"].bodies)
    assert [choice["text"] for choice in found["choices"]] == WORDS
    assert asked == [[5], [5], [6, 7], [6, 7], [8, 9, 10], [8, 9, 10]]
    assert found["usage"]["prompt_tokens"] == 6


async def test_a_stream_of_choices_has_the_same_texts_reasons_and_usage() -> None:
    async with world("p0", "d0") as w:
        say(w, *WORDS[:4], prompts=[tokenizer().encode("a"), tokenizer().encode("b c")])
        fields = {"prompt": ["a", "b c"], "n": 2, "seed": SEED}
        whole = (await w.complete(**fields)).json()
        answer = await w.complete(**fields, stream=True, stream_options={"include_usage": True})
    *events, usage, done = answer.events()
    ends = sorted(c["index"] for event in events for c in event["choices"] if c["finish_reason"] == "stop")
    assert streamed(answer) == dict(enumerate(WORDS[:4]))
    assert (ends, done) == ([0, 1, 2, 3], "[DONE]")
    assert [usage["usage"][name] for name in COUNTS] == [whole["usage"][name] for name in COUNTS]


async def test_choices_of_a_chat_stream_each_tell_their_role() -> None:
    async with world("p0", "d0") as w:
        say(w, "hm</think>one", "hm</think>two")
        answer = await w.chat(n=2, seed=SEED, stream=True)
    roles = [c["index"] for e in answer.events()[:-1] for c in e["choices"] if "role" in c["delta"]]
    assert (sorted(roles), streamed(answer)) == ([0, 1], {0: "one", 1: "two"})


async def test_cached_tokens_are_those_of_each_prompt_once() -> None:
    async with world("p0", "d0") as w:
        go = w.engines["d0"].default.go = asyncio.Event()
        running = asyncio.create_task(w.complete(prompt=[[5, 6, 7], [8]], n=2))
        await w.until(lambda: w.metric("tandem_legs_total", role="prefill", group="p0", outcome="ok") == 4)
        go.set()
        usage = (await running).json()["usage"]
    # The stand-in says 2 of each prompt; of one that has a single token it cannot be more than that.
    assert (usage["prompt_tokens"], usage["prompt_cache_hit_tokens"]) == (4, 3)


async def test_choices_without_a_seed_get_different_ones() -> None:
    async with world("p0", "d0") as w:
        await w.complete(n=3)
        assert None not in seeds(w)
        assert len(set(seeds(w))) == 3


async def test_a_seed_gives_each_choice_its_own_and_the_same_again() -> None:
    async with world("p0", "d0") as w:
        await w.complete(n=3, seed=7)
        await w.complete(n=3, seed=7)
        await w.complete(seed=7)
        await w.complete()
        found = seeds(w)
    assert len(set(found[:3])) == 3
    assert set(found[3:6]) == set(found[:3])
    assert found[6:] == [7, None]


async def test_both_legs_of_a_choice_have_its_seed_and_a_room_of_its_own() -> None:
    async with world("p0", "d0") as w:
        await w.complete(n=3)
        of = {
            name: {body["bootstrap_room"]: body["sampling_params"]["sampling_seed"] for body in w.engines[name].bodies}
            for name in ("p0", "d0")
        }
    assert of["p0"] == of["d0"]
    assert len(of["p0"]) == 3


@pytest.mark.parametrize("stream", [False, True])
async def test_an_echo_puts_each_prompt_before_its_answers(stream: bool) -> None:
    async with world("p0", "d0") as w:
        say(w, *WORDS[:4], prompts=[tokenizer().encode("A: "), tokenizer().encode("B: ")])
        answer = await w.complete(prompt=["A: ", "B: "], n=2, seed=SEED, echo=True, stream=stream)
    texts = (
        [text for _, text in sorted(streamed(answer).items())]
        if stream
        else [choice["text"] for choice in answer.json()["choices"]]
    )
    assert texts == ["A: one", "A: two", "B: three", "B: four"]


async def test_stop_strings_end_each_choice_where_it_has_one() -> None:
    async with world("p0", "d0") as w:
        say(w, Script(ids=ids_of("one END more"), finish=None), "two", "three END")
        found = (await w.complete(n=3, seed=SEED, stop=["END"])).json()
        await w.engines["d0"].idle()
        assert [choice["text"] for choice in found["choices"]] == ["one ", "two", "three "]
        assert rid_of(w, 0) in w.engines["d0"].aborted
        assert rid_of(w, 1) not in w.engines["d0"].aborted


async def test_a_choice_that_is_over_does_not_end_the_others() -> None:
    async with world("p0", "d0") as w:
        go = asyncio.Event()
        say(w, saying("two words", go=go), "one")
        body = {"model": "tiny", "prompt": [5, 6], "n": 2, "seed": SEED, "stream": True}
        call = w.call("/v1/completions", body)
        running = asyncio.create_task(call.run())
        await call.until_body(b'"index":1,"text":"","logprobs":null,"finish_reason":"stop"')
        go.set()
        answer = await running
    assert streamed(answer) == {0: "two words", 1: "one"}


async def test_a_choice_that_fails_fails_the_whole_answer_and_aborts_the_others() -> None:
    async with world("p0", "d0") as w:
        go = asyncio.Event()
        say(w, Script(finish=None), [Script(finish=BROKEN, go=go), *GIVEN_UP], Script(finish=None))
        running = asyncio.create_task(w.complete(n=3, seed=SEED))
        await w.engines["d0"].until(lambda: len(w.engines["d0"].running) == 3)
        await w.until(lambda: w.metric("tandem_delivered_tokens_total") == 8)
        go.set()
        answer = await running
        for one in w.engines.values():
            await one.idle()
        assert (answer.status, answer.json()["error"]["code"]) == (503, "engine_failure")
        assert sorted(w.engines["d0"].aborted) == sorted([rid_of(w, 0), rid_of(w, 2)])


async def test_a_choice_that_fails_in_mid_stream_is_an_error_event_and_aborts_the_others() -> None:
    async with world("p0", "d0") as w:
        go = asyncio.Event()
        say(w, Script(finish=None), [Script(finish=BROKEN, go=go), *GIVEN_UP])
        _, running = await begun(w, n=2, seed=SEED)
        await w.until(lambda: w.metric("tandem_delivered_tokens_total") == 5)
        go.set()
        answer = await running
        for one in w.engines.values():
            await one.idle()
        assert answer.complete
        assert answer.events()[-1]["error"]["code"] == "engine_failure"
        assert w.engines["d0"].aborted == [rid_of(w, 0)]


class NoDriver:
    """Hears which choices are not wanted any more."""

    def __init__(self) -> None:
        self.gone: list[str] = []

    def client_gone(self, ticket: Ticket) -> None:
        self.gone.append(ticket.request)


def half_read(driver: NoDriver) -> Reply:
    """A reply of two choices that nothing drives."""
    bell = Bell()
    reply = Reply(bell, [[5]], Metrics().tenant("a"), 0.0, None, Tracing(None).request({}))
    for index in range(2):
        ticket = Ticket(f"r-{index}", EngineRequest([5], {}), RouteAsk([5]), bell)
        answer = Reader(vocabulary(), stops=(), chat=False, thinking=False)
        reply.add(Run(index, ticket, answer, driver, reply))  # type: ignore[arg-type]
    return reply


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("last", ["", "half"])
async def test_what_has_come_with_a_failure_goes_out_before_it(failing: int, last: str) -> None:
    driver = NoDriver()
    reply = half_read(driver)
    fails, other = reply.runs[failing].ticket, reply.runs[1 - failing].ticket
    fails.deliver(1, ids_of(last))
    fails.finish(Fail(request="r", failure=Failure(kind=FailureKind.BROKEN, message="cut"), delivered=1))
    other.deliver(2, ids_of("said"))
    texts = {step.index: step.piece.content for step in await reply.next()}
    assert texts == {1 - failing: "said"} | ({failing: last} if last else {})
    other.deliver(2, ids_of("too late"))
    with pytest.raises(ApiError):
        await reply.next()
    assert other.request in driver.gone


def gave(reply: Reply, outcome: str, *came: tuple[float, int, float]) -> dict[float, int]:
    """What is counted of an answer for aims of 2 s and so many seconds between tokens: answers that kept both.
    `came`: when tokens came, how many, and when the ones before had (0 = none)."""
    metrics = reply._metrics
    for at, tokens, last in came:
        reply.came(tokens, last, at)
    reply.close(outcome)
    cells = rises([((), metrics._metrics.answer_times.told())])
    assert cells is not None
    return {aim: round(kept(cells, 2.0, aim)) for aim in (0.05, 0.1, 0.2)}


async def test_an_answer_is_as_slow_as_its_gaps_are_on_average() -> None:
    # 9 tokens 40 ms apart and one that is late by far: 100 ms on average.
    came = [(1 + 0.04 * number, 1, 1 + 0.04 * (number - 1)) for number in range(1, 10)]
    assert gave(half_read(NoDriver()), "ok", (1.0, 1, 0), *came, (1.99, 1, 1.36)) == {0.05: 0, 0.1: 1, 0.2: 1}


async def test_tokens_that_came_together_share_their_gap_and_choices_their_average() -> None:
    came = [(1.0, 1, 0), (1.1, 1, 0), (1.2, 2, 1.0), (1.3, 2, 1.1)]
    assert gave(half_read(NoDriver()), "ok", *came) == {0.05: 0, 0.1: 1, 0.2: 1}


async def test_an_answer_that_came_late_kept_no_aim_however_fast_it_was() -> None:
    assert gave(half_read(NoDriver()), "ok", (2.5, 1, 0), (2.51, 1, 2.5)) == {0.05: 0, 0.1: 0, 0.2: 0}


@pytest.mark.parametrize(("outcome", "counted"), [("ok", 1), ("client_gone", 1), ("engine_failure", 0)])
async def test_what_failed_was_no_answer_and_what_a_client_left_was(outcome: str, counted: int) -> None:
    assert gave(half_read(NoDriver()), outcome, (1.0, 1, 0))[0.2] == counted


async def test_what_nobody_saw_begin_is_no_answer() -> None:
    assert gave(half_read(NoDriver()), "client_gone")[0.2] == 0


async def test_a_client_that_leaves_ends_the_legs_of_all_choices() -> None:
    async with world("p0", "d0") as w:
        for one in w.engines.values():
            one.default = Script(finish=None)
        call, running = await begun(w, n=3)
        await w.until(lambda: w.metric("tandem_delivered_tokens_total") == 9)
        call.leave()
        await running
        for one in w.engines.values():
            await one.idle()
            assert sorted(one.aborted) == sorted(body["rid"] for body in one.bodies)
            assert len(one.bodies) == 3


async def test_a_choice_is_retried_alone() -> None:
    async with world("p0", "d0") as w:
        # Were the partner to answer, the room would be lost before the failure is seen.
        say(w, [], [Script(ids=[], finish=None)], engine="p0")
        say(w, "one", [Script(status=500), saying("two")])
        found = (await w.complete(n=2, seed=SEED)).json()
        assert [choice["text"] for choice in found["choices"]] == ["one", "two"]
        assert len(w.engines["d0"].bodies) == 3


async def test_logprobs_of_choices_stay_apart() -> None:
    async with world("p0", "d0") as w:
        say(w, "one", "two")
        found = (await w.complete(n=2, seed=SEED, logprobs=0)).json()
    for choice, word in zip(found["choices"], ["one", "two"], strict=True):
        assert "".join(choice["logprobs"]["tokens"]) == word


async def test_every_token_of_every_choice_is_counted_as_delivered() -> None:
    async with world("p0", "d0") as w:
        say(w, *WORDS[:3])
        usage = (await w.complete(n=3, seed=SEED)).json()["usage"]
        assert w.metric("tandem_delivered_tokens_total") == usage["completion_tokens"]
        assert w.metric("tandem_time_to_first_token_seconds_count") == 1


async def test_each_choice_takes_a_slot_of_what_may_run() -> None:
    async with world("p0", "d0") as w:
        w.service.admission.set_capacity(4)
        decode = w.engines["d0"]
        go = decode.default.go = asyncio.Event()
        first = asyncio.create_task(w.complete(n=3))
        await decode.until(lambda: len(decode.bodies) == 3)
        second = asyncio.create_task(w.complete(n=2))
        await w.until(lambda: w.service.admission.waiting(Priority.NORMAL) == 1)
        assert len(decode.bodies) == 3
        go.set()
        assert [(await call).status for call in (first, second)] == [200, 200]
