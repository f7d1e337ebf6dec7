"""`tandem.v1.Inference` over a real loopback connection, with answers in memory behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2

from tandem.gateway.errors import ApiError
from tandem.gateway.http.exchange import ClientLeft
from tandem.gateway.pairing.reply import Step
from tandem.gateway.text.answer import Piece, TokenLogprob, ToolDelta
from tandem.v1 import inference_pb2 as pb
from unit.gateway.grpc_standin import USAGE, SaidReply, Served, serving, steps, too_many

WITHIN_S = 20.0
GENERATE = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="Say hello"))
CHAT = pb.ChatRequest(model="tiny", messages=[pb.Message(role=pb.MESSAGE_ROLE_USER, content="hi")])
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as found:
        yield found


def once(request: pb.GenerateRequest) -> pb.GenerateOnceRequest:
    return pb.GenerateOnceRequest.FromString(request.SerializeToString())


async def failure(call: Any, told: list[Any] | None = None) -> grpc.aio.AioRpcError:
    """The error that a call ends with; `told` takes what comes before it."""

    async def read() -> None:
        if not hasattr(call, "__aiter__"):
            await call
            return
        async for message in call:
            if told is not None:
                told.append(message)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(read(), WITHIN_S)
    return caught.value


# Answers


async def test_generate_streams_text_as_it_comes_and_ends_with_the_usage(served: Served) -> None:
    found = [message async for message in served.stub.Generate(GENERATE)]
    assert [delta.text for message in found for delta in message.deltas] == ["Hel", "lo", ""]
    assert (found[0].info.id, found[0].info.model, found[0].info.created) == ("chatcmpl-1", "tiny", 1_700_000_000)
    assert [message.HasField("info") for message in found] == [True, False, False]
    assert [message.weight_version for message in found] == ["1", "", ""]
    assert found[-1].deltas[0].finish_reason == pb.FINISH_REASON_STOP
    assert (found[-1].usage.prompt_tokens, found[-1].usage.cached_tokens) == (USAGE.prompt, USAGE.cached)
    assert (found[-1].usage.completion_tokens, found[-1].usage.reasoning_tokens) == (3, 1)
    assert (served.replies[0].settled, served.replies[0].closed) == (1, [None])


async def test_generate_once_returns_the_whole_text(served: Served) -> None:
    found = await served.stub.GenerateOnce(once(GENERATE))
    assert [(choice.index, choice.text) for choice in found.choices] == [(0, "Hello")]
    assert found.choices[0].finish_reason == pb.FINISH_REASON_STOP
    assert (found.info.id, found.weight_version, found.usage.completion_tokens) == ("chatcmpl-1", "1", 3)
    assert (served.replies[0].settled, served.replies[0].closed) == (1, [None])


async def test_token_ids_are_told_only_to_who_asks(served: Served) -> None:
    asked = pb.GenerateRequest(model="tiny", prompt=GENERATE.prompt, options=pb.Options(return_token_ids=True))
    plain = [message async for message in served.stub.Generate(GENERATE)]
    told = [message async for message in served.stub.Generate(asked)]
    whole = await served.stub.GenerateOnce(once(asked))
    assert [list(delta.token_ids) for message in plain for delta in message.deltas] == [[], [], []]
    assert [list(delta.token_ids) for message in told for delta in message.deltas] == [[0], [1], []]
    assert list(told[0].info.prompt_token_ids) == [11, 12]
    assert list(plain[0].info.prompt_token_ids) == []
    assert list(whole.choices[0].token_ids) == [0, 1]
    assert served.body["return_token_ids"] is True


def thought() -> SaidReply:
    call = [ToolDelta(index=0, id="call_1", name="sky")]
    more = [ToolDelta(index=0, arguments='{"at":'), ToolDelta(index=1, id="call_2", name="sea")]
    last = [ToolDelta(index=0, arguments='"noon"}'), ToolDelta(index=1, arguments="{}")]
    return SaidReply(
        [
            [Step(index=0, piece=Piece(reasoning="Hm", ids=[1])), Step(index=1, piece=Piece(content="Bl", ids=[5]))],
            [Step(index=0, piece=Piece(reasoning="m.", content="\n", tools=call))],
            [Step(index=0, piece=Piece(tools=more)), Step(index=1, piece=Piece(content="ue"), reason="length")],
            [Step(index=0, piece=Piece(tools=last), reason="tool_calls", usage=USAGE)],
        ]
    )


async def test_chat_streams_reasoning_content_and_tool_calls_of_every_choice(served: Served) -> None:
    served.say = thought
    deltas = [delta async for message in served.stub.Chat(CHAT) for delta in message.deltas]
    first = [delta for delta in deltas if delta.index == 0]
    assert [delta.reasoning_content for delta in first] == ["Hm", "m.", "", ""]
    assert [delta.content for delta in deltas if delta.index == 1] == ["Bl", "ue"]
    assert [(call.index, call.id, call.name, call.arguments) for delta in first for call in delta.tool_calls] == [
        (0, "call_1", "sky", ""),
        (0, "", "", '{"at":'),
        (1, "call_2", "sea", ""),
        (0, "", "", '"noon"}'),
        (1, "", "", "{}"),
    ]
    assert first[-1].finish_reason == pb.FINISH_REASON_TOOL_CALLS


async def test_chat_once_puts_the_parts_of_each_choice_together(served: Served) -> None:
    served.say = thought
    found = await served.stub.ChatOnce(pb.ChatOnceRequest(model="tiny", messages=CHAT.messages))
    first, second = found.choices
    assert (first.message.role, first.message.reasoning_content) == (pb.MESSAGE_ROLE_ASSISTANT, "Hmm.")
    assert [(call.id, call.name, call.arguments) for call in first.message.tool_calls] == [
        ("call_1", "sky", '{"at":"noon"}'),
        ("call_2", "sea", "{}"),
    ]
    assert (second.message.content, second.finish_reason) == ("Blue", pb.FINISH_REASON_LENGTH)


async def test_a_message_that_only_calls_tools_has_no_content(served: Served) -> None:
    piece = Piece(tools=[ToolDelta(index=0, id="call_1", name="sky", arguments="{}")])
    served.say = lambda: SaidReply([[Step(index=0, piece=piece, reason="tool_calls", usage=USAGE)]])
    found = await served.stub.ChatOnce(pb.ChatOnceRequest(model="tiny", messages=CHAT.messages))
    assert not found.choices[0].message.HasField("content")


async def test_log_probabilities_are_told_token_by_token(served: Served) -> None:
    other = TokenLogprob(9, "b", b"b", -1.5)
    logprob = TokenLogprob(8, "\ufffd", b"\xf0\x9f", -0.25, [other], reasoning=True)
    piece = Piece(content="a", logprobs=[logprob])
    served.say = lambda: SaidReply([[Step(index=0, piece=piece, reason="stop", usage=USAGE)]])
    found = await served.stub.GenerateOnce(once(GENERATE))
    (told,) = found.choices[0].logprobs
    assert (told.chosen.token_id, told.chosen.token_bytes, told.chosen.logprob) == (8, b"\xf0\x9f", -0.25)
    assert ([one.token for one in told.top], told.reasoning) == (["b"], True)


async def test_a_step_with_nothing_to_tell_is_no_message(served: Served) -> None:
    silent = [Step(index=0, piece=Piece(ids=[3]))]
    served.say = lambda: SaidReply([steps("a")[0], silent, silent, *steps("b")])
    found = [message async for message in served.stub.Generate(GENERATE)]
    assert [[delta.text for delta in message.deltas] for message in found] == [["a"], ["b"], [""]]


async def test_new_weights_in_mid_stream_are_told(served: Served) -> None:
    class Refreshed(SaidReply):
        async def next(self) -> object:
            found = await super().next()
            self.weight_version = "2" if self.asked > 1 else "1"
            return found

    served.say = lambda: Refreshed(steps("a", "b", "c"))
    found = [message async for message in served.stub.Generate(GENERATE)]
    assert [message.weight_version for message in found] == ["1", "2", "", ""]


async def test_an_unknown_reason_to_end_is_told_as_other(served: Served) -> None:
    served.say = lambda: SaidReply(steps("a", reason="abort"))
    found = await served.stub.GenerateOnce(once(GENERATE))
    assert found.choices[0].finish_reason == pb.FINISH_REASON_OTHER


# Who calls, and how long


async def test_metadata_arrives_as_headers_and_the_request_id_comes_back(served: Served) -> None:
    call = served.stub.GenerateOnce(
        once(GENERATE),
        metadata=(("authorization", "Bearer sk-1"), ("x-request-id", "mine"), ("x-two", "a"), ("x-two", "b")),
    )
    await call
    peer = served.asked[0][2]
    assert (peer.headers[b"authorization"], peer.headers[b"x-two"]) == (b"Bearer sk-1", b"a, b")
    assert (peer.request_id, peer.certificate) == ("mine", None)
    assert dict(await call.trailing_metadata())["x-request-id"] == "mine"


async def test_a_call_without_a_request_id_gets_one_also_when_it_fails(served: Served) -> None:
    served.errors = [too_many()]
    error = await failure(served.stub.Generate(GENERATE))
    assert dict(error.trailing_metadata())["x-request-id"] == served.asked[0][2].request_id != ""


async def test_the_clients_deadline_becomes_the_requests(served: Served) -> None:
    await served.stub.GenerateOnce(once(GENERATE), timeout=100)
    await served.stub.GenerateOnce(once(GENERATE))
    now = asyncio.get_running_loop().time()
    first, second = (deadline for *_, deadline in served.asked)
    assert first is not None
    assert now + 50 < first < now + 105, "gRPC rounds a deadline up, by one percent at most"
    assert second is None


async def test_a_passed_deadline_ends_the_call_and_closes_the_reply(served: Served) -> None:
    served.say = lambda: SaidReply(steps("a")[:1])
    error = await failure(served.stub.Generate(GENERATE, timeout=0.4))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    async with asyncio.timeout(WITHIN_S):
        await served.replies[0].over.wait()
    assert isinstance(served.replies[0].closed[0], asyncio.CancelledError)


async def test_a_cancelled_stream_closes_its_reply_at_once(served: Served) -> None:
    served.say = lambda: SaidReply(steps("a")[:1])
    call = served.stub.Generate(GENERATE)
    await call.read()
    call.cancel()
    async with asyncio.timeout(WITHIN_S):
        await served.replies[0].over.wait()
    assert isinstance(served.replies[0].closed[0], asyncio.CancelledError)


async def test_a_cancelled_unary_call_closes_its_reply_at_once(served: Served) -> None:
    served.say = lambda: SaidReply([])
    call = served.stub.GenerateOnce(once(GENERATE))
    async with asyncio.timeout(WITHIN_S):
        await served.begun.wait()
        call.cancel()
        await served.replies[0].over.wait()
    assert isinstance(served.replies[0].closed[0], asyncio.CancelledError)


async def test_a_call_cancelled_while_it_waits_to_begin_stops_waiting(served: Served) -> None:
    served.hang = True
    call = served.stub.Generate(GENERATE)
    async with asyncio.timeout(WITHIN_S):
        await served.begun.wait()
        call.cancel()
        await served.given_up.wait()
    assert served.replies == []


async def test_a_connection_that_is_gone_closes_all_its_replies(served: Served) -> None:
    served.say = lambda: SaidReply(steps("a")[:1])
    async with grpc.aio.insecure_channel(served.address) as channel:
        stub = type(served.stub)(channel)
        calls = [stub.Generate(GENERATE) for _ in range(3)]
        for call in calls:
            await call.read()
    async with asyncio.timeout(WITHIN_S):
        await asyncio.gather(*(reply.over.wait() for reply in served.replies))


async def test_a_client_that_does_not_read_holds_the_reply_back_and_is_left_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tandem.gateway.rpc.inference.SLOW_READER_S", 0.2)
    text = "x" * 65_536
    async with serving(lambda: SaidReply(steps(*[text] * 4096)), longest_s=0.8) as served:
        call = served.stub.Generate(GENERATE)
        await call.read()
        async with asyncio.timeout(WITHIN_S):
            await served.replies[0].over.wait()
        assert isinstance(served.replies[0].closed[0], asyncio.CancelledError)
        assert served.replies[0].asked < 2048, "what nobody reads is not produced"


# Errors


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, grpc.StatusCode.INVALID_ARGUMENT),
        (401, grpc.StatusCode.UNAUTHENTICATED),
        (402, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (403, grpc.StatusCode.PERMISSION_DENIED),
        (404, grpc.StatusCode.NOT_FOUND),
        (408, grpc.StatusCode.DEADLINE_EXCEEDED),
        (413, grpc.StatusCode.INVALID_ARGUMENT),
        (422, grpc.StatusCode.INVALID_ARGUMENT),
        (429, grpc.StatusCode.RESOURCE_EXHAUSTED),
        (499, grpc.StatusCode.CANCELLED),
        (500, grpc.StatusCode.INTERNAL),
        (503, grpc.StatusCode.UNAVAILABLE),
        (504, grpc.StatusCode.DEADLINE_EXCEEDED),
    ],
)
async def test_each_status_of_the_http_api_has_its_code(served: Served, status: int, code: grpc.StatusCode) -> None:
    served.errors = [ApiError(status, "It is so.")]
    error = await failure(served.stub.GenerateOnce(once(GENERATE)))
    assert (error.code(), error.details()) == (code, "It is so.")


async def test_an_error_tells_its_reason_its_field_and_when_to_try_again(served: Served) -> None:
    served.errors = [ApiError(429, "Slower.", type="rate_limit_error", code="tokens", param="n", retry_after=6.2)]
    error = await failure(served.stub.Generate(GENERATE))
    metadata = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(metadata["grpc-status-details-bin"])
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(info)
    assert status.details[1].Unpack(retry)
    assert (status.code, status.message) == (grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], "Slower.")
    assert (info.reason, info.metadata["param"], info.metadata["type"]) == ("TOKENS", "n", "rate_limit_error")
    assert (metadata["retry-after"], retry.retry_delay.ToMilliseconds()) == ("7", 6200)
    assert "grpc-retry-pushback-ms" not in metadata, "a limit is not for gRPC's own retries"


@pytest.mark.parametrize("letter", ["x", "é", "界", "\U0001f600"])
async def test_a_long_message_is_cut_and_still_arrives(served: Served, letter: str) -> None:
    served.errors = [ApiError(400, letter * 100_000, param=letter * 1000)]
    error = await failure(served.stub.Generate(GENERATE))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert 100 < len(error.details() or "") <= 1502
    assert (error.details() or "").endswith(" …")


async def test_an_error_in_mid_stream_comes_after_the_good_tokens(served: Served) -> None:
    error = ApiError(503, "The engine died.", code="engine_failure", retry_after=1.0)
    served.say = lambda: SaidReply(steps("a", "b")[:2], error)
    told: list[pb.GenerateResponse] = []
    found = await failure(served.stub.Generate(GENERATE), told)
    assert [delta.text for message in told for delta in message.deltas] == ["a", "b"]
    assert found.code() is grpc.StatusCode.UNAVAILABLE
    assert served.replies[0].closed == [error]


async def test_a_reply_that_nobody_waits_for_is_cancelled(served: Served) -> None:
    served.say = lambda: SaidReply([], ClientLeft())
    error = await failure(served.stub.Generate(GENERATE))
    assert error.code() is grpc.StatusCode.CANCELLED


async def test_a_bug_is_told_without_its_inside(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.errors = [KeyError("a secret")]
    error = await failure(served.stub.GenerateOnce(once(GENERATE)))
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in (error.details() or "")
    assert "KeyError" in caplog.text


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff", b"\x0a\xff", b"\x0a\x02\xff\xfe", bytes(range(256))])
@pytest.mark.parametrize("method", ["Generate", "GenerateOnce", "Chat", "ChatOnce"])
async def test_garbage_is_the_callers_fault(
    served: Served, method: str, garbage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = f"/tandem.v1.Inference/{method}"
    make = served.channel.unary_unary if method.endswith("Once") else served.channel.unary_stream
    error = await failure(make(path)(garbage))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert served.asked == []
    assert [record for record in caplog.records if record.name.startswith(("grpc", "tandem"))] == []


async def test_an_unknown_method_is_unimplemented(served: Served) -> None:
    error = await failure(served.channel.unary_unary("/tandem.v1.Inference/Sing")(b""))
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_request_over_the_limit_is_refused_unread() -> None:
    async with serving(max_request_bytes=2000) as served:
        large = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="x" * 3000))
        error = await failure(served.stub.Generate(large))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert served.asked == []
        assert (await served.stub.GenerateOnce(once(GENERATE))).choices[0].text == "Hello"


# Many at once


async def test_a_thousand_streams_at_once_each_get_their_own_answer() -> None:
    gate = asyncio.Event()
    waiting = 0

    class Numbered(SaidReply):
        async def next(self) -> object:
            nonlocal waiting
            if self.asked == 1:
                # All of them are open before any goes on.
                waiting += 1
                if waiting == 1000:
                    gate.set()
                await gate.wait()
            return await super().next()

    async with serving() as served:
        served.say = lambda: Numbered(steps(*served.body["prompt"].split()))

        async def ask(number: int) -> str:
            request = pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text=f"stream {number} says so"))
            parts = [delta.text async for message in served.stub.Generate(request) for delta in message.deltas]
            return " ".join(parts).strip()

        async with asyncio.timeout(50):
            found = await asyncio.gather(*(ask(number) for number in range(1000)))
    assert found == [f"stream {number} says so" for number in range(1000)]
    assert all(reply.closed == [None] for reply in served.replies)
