"""`tandem.client`, sync and async, against the real gRPC server with answers in memory behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from tandem import client as api
from tandem.client import channel
from tandem.client.requests import chat_fields, generate_fields
from tandem.config import TlsConfig
from tandem.gateway.access.tls import grpc_server_credentials, names_in
from tandem.gateway.errors import ApiError
from tandem.gateway.pairing.reply import Step
from tandem.gateway.rpc.server import GrpcServer
from tandem.gateway.rpc.translate import chat_body, generate_body
from tandem.gateway.text.answer import Piece, TokenLogprob, ToolDelta
from tandem.v1 import inference_pb2 as pb
from unit.gateway.certificates import Authority
from unit.gateway.grpc_standin import USAGE, SaidAnswers, SaidReply, Served, serving, steps, too_many

WITHIN_S = 20.0
HI = [{"role": "user", "content": "hi"}]
SKY = {"type": "function", "function": {"name": "sky", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as found:
        yield found


class Both:
    """The four calls of either client, each awaited; streams as lists of their pieces, with the answer at the end."""

    def __init__(self, kind: str, address: str, **options: Any) -> None:
        self._sync = kind == "sync"
        self.client: Any = (api.Client if self._sync else api.AsyncClient)(address, **options)

    async def once(self, method: str, *args: Any, **params: Any) -> api.Answer:
        call = getattr(self.client, method)
        found: Awaitable[api.Answer] = asyncio.to_thread(call, *args, **params) if self._sync else call(*args, **params)
        return await asyncio.wait_for(found, WITHIN_S)

    async def stream(self, method: str, *args: Any, **params: Any) -> tuple[list[api.Piece], api.Answer | None]:
        stream = getattr(self.client, method)(*args, **params)

        async def read() -> list[api.Piece]:
            return await asyncio.to_thread(list, stream) if self._sync else [piece async for piece in stream]

        return await asyncio.wait_for(read(), WITHIN_S), stream.answer

    async def close(self) -> None:
        closed = self.client.close()
        if not self._sync:
            await closed


Make = Callable[..., Both]


@pytest.fixture(params=["sync", "async"])
async def make(request: pytest.FixtureRequest, served: Served) -> AsyncIterator[Make]:
    made: list[Both] = []

    def build(address: str = "", **options: Any) -> Both:
        made.append(Both(request.param, address or served.address, **{"model": "tiny", **options}))
        return made[-1]

    yield build
    for one in made:
        await one.close()


def thought() -> SaidReply:
    call = [ToolDelta(index=0, id="call_1", name="sky")]
    logprob = TokenLogprob(8, "B", b"B", -0.25, [TokenLogprob(9, "C", b"C", -1.5)])
    second = Piece(content="Bl", ids=[5], logprobs=[logprob])
    return SaidReply(
        [
            [
                Step(index=0, piece=Piece(reasoning="Hm", ids=[1])),
                Step(index=1, piece=second),
            ],
            [Step(index=0, piece=Piece(reasoning="m.", content="So", tools=call, ids=[2]))],
            [Step(index=1, piece=Piece(content="ue", ids=[6]), reason="length")],
            [Step(index=0, piece=Piece(tools=[ToolDelta(index=0, arguments='{"a":')]))],
            [Step(index=0, piece=Piece(tools=[ToolDelta(index=0, arguments="1}")]), reason="tool_calls", usage=USAGE)],
        ]
    )


# Answers


async def test_generate_gives_the_whole_answer(served: Served, make: Make) -> None:
    answer = await make().once("generate", "Say hello", max_tokens=5)
    assert (answer.text, answer.finish_reason, answer.id) == ("Hello", "stop", "chatcmpl-1")
    assert (answer.model, answer.created, answer.weight_version) == ("tiny", 1_700_000_000, "1")
    assert answer.usage == api.Usage(prompt_tokens=7, cached_tokens=4, completion_tokens=3, reasoning_tokens=1)
    assert served.body == {"stream": False, "model": "tiny", "prompt": "Say hello", "max_tokens": 5}


async def test_generate_takes_token_ids_and_tells_them(served: Served, make: Make) -> None:
    answer = await make().once("generate", [0, 5, 6], return_token_ids=True)
    assert served.body["prompt"] == [0, 5, 6]
    assert (answer.prompt_token_ids, answer.token_ids) == ((11, 12), (0, 1))


async def test_generate_stream_gives_pieces_and_then_the_answer(served: Served, make: Make) -> None:
    pieces, answer = await make().stream("generate_stream", "Say hello")
    assert [piece.text for piece in pieces] == ["Hel", "lo", ""]
    assert [piece.finish_reason for piece in pieces] == [None, None, "stop"]
    assert answer is not None
    assert (answer.text, answer.usage.completion_tokens, answer.weight_version) == ("Hello", 3, "1")
    assert served.body["stream"] is True


async def test_a_streamed_answer_is_the_same_as_a_whole_one(served: Served, make: Make) -> None:
    served.say = thought
    both = make()
    whole = await both.once("chat", HI, return_token_ids=True, logprobs=1)
    _, streamed = await both.stream("chat_stream", HI, return_token_ids=True, logprobs=1)
    assert streamed == whole
    assert (whole.reasoning, whole.text, whole.finish_reason) == ("Hmm.", "So", "tool_calls")
    assert whole.tool_calls == (api.ToolCall(id="call_1", name="sky", arguments='{"a":1}'),)
    assert (whole.choices[1].text, whole.choices[1].token_ids) == ("Blue", (5, 6))
    (logprob,) = whole.choices[1].logprobs
    assert (logprob.token, logprob.token_id, logprob.logprob, logprob.top[0].token) == ("B", 8, -0.25, "C")


async def test_an_answer_is_the_next_requests_turn(served: Served, make: Make) -> None:
    served.say = thought
    both = make()
    answer = await both.once("chat", HI)
    result = api.Message(role="tool", content="blue", tool_call_id="call_1")
    await both.once("chat", [*HI, answer.message, result])
    call = {"id": "call_1", "type": "function", "function": {"name": "sky", "arguments": '{"a":1}'}}
    assert served.body["messages"][1:] == [
        {"role": "assistant", "content": "So", "reasoning_content": "Hmm.", "tool_calls": [call]},
        {"role": "tool", "content": "blue", "tool_call_id": "call_1"},
    ]


# Beside the request


async def test_the_key_and_the_request_id_are_sent(served: Served, make: Make) -> None:
    await make(api_key="sk-1").once("generate", "a", request_id="mine")
    peer = served.asked[0][2]
    assert (peer.headers[b"authorization"], peer.request_id) == (b"Bearer sk-1", "mine")


async def test_a_call_has_its_own_timeout_or_the_clients(served: Served, make: Make) -> None:
    both = make(timeout=1000)
    await both.once("generate", "a", timeout=100)
    await both.once("generate", "a")
    now = asyncio.get_running_loop().time()
    first, second = (deadline for *_, deadline in served.asked)
    assert first is not None
    assert second is not None
    assert now + 50 < first < now + 110
    assert now + 900 < second < now + 1100


async def test_an_answer_that_is_late_is_a_deadline_exceeded(served: Served, make: Make) -> None:
    served.say = lambda: SaidReply(steps("a")[:1])
    with pytest.raises(api.DeadlineExceeded, match="longer timeout"):
        await make().stream("generate_stream", "a", timeout=0.3)


# Failures


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, api.InvalidRequest),
        (401, api.Unauthenticated),
        (403, api.PermissionDenied),
        (404, api.NotFound),
        (429, api.RateLimited),
        (499, api.Cancelled),
        (500, api.ServerError),
        (504, api.DeadlineExceeded),
    ],
)
async def test_each_kind_of_failure_is_its_own_exception(
    served: Served, make: Make, status: int, kind: type[api.TandemError]
) -> None:
    served.errors = [ApiError(status, "It is so.", code="such", param="n")]
    with pytest.raises(kind, match=r"It is so\.") as caught:
        await make().once("generate", "a", request_id="mine")
    assert (caught.value.reason, caught.value.param, caught.value.request_id) == ("SUCH", "n", "mine")
    assert len(served.asked) == 1, "nothing but UNAVAILABLE is tried again"


async def test_a_limit_says_when_to_try_again(served: Served, make: Make) -> None:
    served.errors = [too_many(retry_after=6.5)]
    with pytest.raises(api.RateLimited) as caught:
        await make().once("chat", HI)
    assert (caught.value.retry_after, caught.value.code) == (6.5, "RESOURCE_EXHAUSTED")


async def test_a_request_that_is_too_large_is_the_callers_fault(make: Make) -> None:
    with pytest.raises(api.InvalidRequest):
        await make().once("generate", "x" * 2_000_000)


def unavailable(retry_after: float = 0.0) -> ApiError:
    return ApiError(503, "No engine is ready.", code="no_capacity", retry_after=retry_after)


@pytest.mark.parametrize("stream", [True, False])
async def test_unavailable_before_the_first_token_is_tried_again(served: Served, make: Make, stream: bool) -> None:
    served.errors = [unavailable(0.01), unavailable(0.01)]
    if stream:
        pieces, _ = await make(attempts=3).stream("generate_stream", "a")
        assert "".join(piece.text for piece in pieces) == "Hello"
    else:
        assert (await make(attempts=3).once("generate", "a")).text == "Hello"
    assert len(served.asked) == 3


async def test_a_retry_waits_as_long_as_the_server_asks_for(served: Served, make: Make) -> None:
    # Longer than it would wait by itself (0.2 s, a fifth more at the most).
    served.errors = [unavailable(0.3)]
    begun = asyncio.get_running_loop().time()
    await make().once("generate", "a")
    assert asyncio.get_running_loop().time() - begun >= 0.3


async def test_attempts_come_to_an_end_and_say_why(served: Served, make: Make) -> None:
    served.errors = [unavailable(0.01) for _ in range(5)]
    with pytest.raises(api.Unavailable, match="No engine is ready") as caught:
        await make(attempts=2).once("generate", "a")
    assert (len(served.asked), caught.value.reason, caught.value.retry_after) == (2, "NO_CAPACITY", 0.01)


async def test_one_attempt_is_one_attempt(served: Served, make: Make) -> None:
    served.errors = [unavailable(0.01)]
    with pytest.raises(api.Unavailable):
        await make(attempts=1).once("generate", "a")
    assert len(served.asked) == 1


async def test_after_the_first_token_nothing_is_tried_again(served: Served, make: Make) -> None:
    served.say = lambda: SaidReply(steps("a")[:1], unavailable(0.01))
    with pytest.raises(api.Unavailable):
        await make(attempts=5).stream("generate_stream", "a")
    assert len(served.asked) == 1


async def test_a_server_that_is_not_there_is_unavailable(make: Make, unused_tcp_port: int) -> None:
    with pytest.raises(api.Unavailable, match=f"127.0.0.1:{unused_tcp_port} is not available"):
        await make(f"127.0.0.1:{unused_tcp_port}", attempts=1).once("generate", "a")


async def test_a_client_connects_again_when_its_server_is_back(served: Served, make: Make) -> None:
    both = make(attempts=2)
    await both.once("generate", "a")
    port = served.server.port
    await served.server.stop(grace=0)
    with pytest.raises(api.Unavailable):
        await both.once("generate", "a")
    server = GrpcServer(served, shortage=lambda: None, longest_s=60, max_request_bytes=2**20)
    await server.start("127.0.0.1", port)
    try:
        async with asyncio.timeout(WITHIN_S):
            while True:
                try:
                    answer = await both.once("generate", "a")
                    break
                except api.Unavailable:
                    # Its port was closed a moment ago: the client waits a little between its tries.
                    continue
        assert answer.text == "Hello"
    finally:
        await server.stop(grace=0)


async def test_closing_a_stream_ends_the_work_on_the_server(served: Served, make: Make) -> None:
    served.say = lambda: SaidReply(steps("a")[:1])
    stream = make().client.generate_stream("a")
    first = await anext(stream) if isinstance(stream, api.AsyncStream) else await asyncio.to_thread(next, stream)
    stream.close()
    async with asyncio.timeout(WITHIN_S):
        await served.replies[0].over.wait()
    assert (first.text, stream.answer) == ("a", None)


async def test_a_stream_that_is_dropped_ends_the_work_on_the_server(served: Served, make: Make) -> None:
    served.say = lambda: SaidReply(steps("a")[:1])
    stream = make().client.generate_stream("a")
    await (anext(stream) if isinstance(stream, api.AsyncStream) else asyncio.to_thread(next, stream))
    del stream
    async with asyncio.timeout(WITHIN_S):
        await served.replies[0].over.wait()


async def test_a_cancelled_task_ends_its_call_and_stays_cancelled(served: Served) -> None:
    served.say = lambda: SaidReply([])
    async with api.AsyncClient(served.address, model="tiny") as client:
        task = asyncio.create_task(client.generate("a"))
        async with asyncio.timeout(WITHIN_S):
            await served.begun.wait()
            task.cancel()
            await asyncio.wait([task])
            await served.replies[0].over.wait()
    assert task.cancelled()


async def test_a_client_closed_in_mid_stream_says_so(served: Served) -> None:
    served.say = lambda: SaidReply(steps("a")[:1])
    client = api.AsyncClient(served.address, model="tiny")
    stream = client.generate_stream("a")
    await anext(stream)
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    await client.close()
    with pytest.raises(api.Cancelled):
        await asyncio.wait_for(waiting, WITHIN_S)


async def test_a_closed_client_takes_no_call(make: Make) -> None:
    both = make()
    await both.close()
    with pytest.raises(ValueError, match="make a new one"):
        await both.once("generate", "a")


async def test_tls_and_a_certificate_of_ones_own(tmp_path: Path, make: Make) -> None:
    authority = Authority(tmp_path)
    server_files = authority.server()
    client_files = authority.client("acme", uri="spiffe://here/acme")
    config = TlsConfig(certificate=server_files.certificate, key=server_files.key, client_ca=authority.file)
    answers = SaidAnswers()
    server = GrpcServer(answers, shortage=lambda: None, longest_s=60, max_request_bytes=2**20)
    port = await server.start("127.0.0.1", 0, credentials=grpc_server_credentials(config))
    tls = api.Tls(ca=authority.file, certificate=client_files.certificate, key=client_files.key)
    try:
        assert (await make(f"localhost:{port}", tls=tls).once("generate", "a")).text == "Hello"
        with pytest.raises(api.Unavailable):
            await make(f"localhost:{port}", tls=api.Tls(ca=authority.file), attempts=1).once("generate", "a")
        with pytest.raises(api.Unavailable):
            await make(f"localhost:{port}", attempts=1).once("generate", "a")
    finally:
        await server.stop(grace=0)
    (asked,) = answers.asked
    assert asked[2].certificate is not None
    assert set(names_in(asked[2].certificate)) >= {"CN:acme", "URI:spiffe://here/acme"}


# What is sent


def test_every_parameter_of_generate_is_sent() -> None:
    params: api.GenerateParams = {
        "model": "other",
        "temperature": 0.0,
        "top_p": 0.7,
        "top_k": -1,
        "min_p": 0.0,
        "frequency_penalty": -0.5,
        "presence_penalty": 0.0,
        "repetition_penalty": 1.1,
        "seed": -7,
        "logit_bias": {5: -100.0},
        "max_tokens": 9,
        "n": 2,
        "stop": "\n",
        "logprobs": 0,
        "response_format": {"type": "json_object"},
        "priority": "low",
        "user": "u",
        "metadata": {"a": "b"},
        "stop_token_ids": [3],
        "include_stop_str_in_output": False,
        "skip_special_tokens": True,
        "prompt_cache_key": "k",
        "return_token_ids": True,
        "ignore_eos": False,
        "timeout": 3.0,
        "request_id": "mine",
    }
    assert params.keys() == api.GenerateParams.__annotations__.keys() - {"regex", "ebnf"}
    body = generate_body(pb.GenerateRequest(**generate_fields("a", params, "tiny")))
    sent = {name: value for name, value in params.items() if name not in ("timeout", "request_id")}
    assert body == {**sent, "stream": True, "prompt": "a", "stop": ["\n"], "logit_bias": {"5": -100.0}}


@pytest.mark.parametrize("form", ["regex", "ebnf"])
def test_a_form_in_the_engines_own_words_is_sent(form: str) -> None:
    params: Any = {form: "a+"}
    body = generate_body(pb.GenerateRequest(**generate_fields("a", params, "tiny")))
    assert (body[form], "response_format" in body) == ("a+", False)


def test_every_parameter_of_a_chat_is_sent() -> None:
    schema = {"name": "s", "schema": {"type": "object", "minProperties": 1}, "strict": False, "description": "d"}
    params: api.ChatParams = {
        "tools": [SKY],
        "tool_choice": {"type": "function", "function": {"name": "sky"}},
        "parallel_tool_calls": False,
        "thinking": False,
        "thinking_budget": 12,
        "logprobs": 3,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }
    turns = [
        {"role": "developer", "content": "Be brief.", "name": "x"},
        {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "sky", "arguments": "{}"}}]},
        {"role": "tool", "content": "", "tool_call_id": "1"},
        api.Message(role="assistant", content="Sky", prefix=True),
    ]
    body = chat_body(pb.ChatOnceRequest(**chat_fields(turns, params, "tiny")))
    call = {"id": "1", "type": "function", "function": {"name": "sky", "arguments": "{}"}}
    assert body == {
        "stream": False,
        "model": "tiny",
        "messages": [
            {"role": "developer", "content": "Be brief.", "name": "x"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": "", "tool_call_id": "1"},
            {"role": "assistant", "content": "Sky", "prefix": True},
        ],
        "tools": [SKY],
        "tool_choice": {"type": "function", "function": {"name": "sky"}},
        "parallel_tool_calls": False,
        "thinking": {"type": "disabled", "budget_tokens": 12},
        "logprobs": True,
        "top_logprobs": 3,
        "response_format": {"type": "json_schema", "json_schema": schema},
    }


@pytest.mark.parametrize("choice", ["auto", "none", "required"])
def test_a_rule_for_tools_is_sent(choice: str) -> None:
    body = chat_body(pb.ChatRequest(**chat_fields(HI, {"tools": [SKY], "tool_choice": choice}, "tiny")))
    assert body["tool_choice"] == choice


def test_what_is_left_out_is_not_sent() -> None:
    params: api.ChatParams = {"temperature": None, "stop": None, "tools": None, "thinking": None}
    body = chat_body(pb.ChatRequest(**chat_fields(HI, params, "tiny")))
    assert body == {"stream": True, "model": "tiny", "messages": HI}


@pytest.mark.parametrize(
    ("messages", "params", "kind"),
    [
        (HI, {"temperatur": 1}, TypeError),
        (HI, {"priority": "urgent"}, ValueError),
        (HI, {"response_format": {"type": "xml"}}, ValueError),
        (HI, {"tools": [{"type": "function"}]}, ValueError),
        (HI, {"tool_choice": "sky"}, ValueError),
        (HI, {"max_tokens": -1}, ValueError),
        (HI, {"regex": "a", "response_format": {"type": "json_object"}}, ValueError),
        ([{"role": "robot", "content": "hi"}], {}, ValueError),
        ([{"role": "user", "contents": "hi"}], {}, ValueError),
        ([{"role": "user", "content": 5}], {}, TypeError),
    ],
)
def test_what_has_no_form_is_refused_before_it_is_sent(messages: Any, params: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        chat_fields(messages, params, "tiny")


@pytest.mark.parametrize("attempts", [0, 6])
def test_the_number_of_attempts_is_checked(attempts: int) -> None:
    with pytest.raises(ValueError, match="from 1 to 5"):
        channel.options(attempts)


def test_tls_may_be_given_as_grpc_has_it() -> None:
    made = grpc.local_channel_credentials()
    assert channel.credentials(made) is made
    assert channel.credentials(False) is None
