"""Answers as bytes: OpenAI's objects, whole and as events."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_model import ids_of, vocabulary

from tandem.gateway.api.requests import Wanted
from tandem.gateway.api.wire import ChatWriter, CompletionWriter
from tandem.gateway.text.pieces import Piece, TokenLogprob, ToolDelta, Usage

USAGE = Usage(prompt=7, completion=5, reasoning=2, cached=3)
COUNTS = {
    "prompt_tokens": 7,
    "completion_tokens": 5,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 3},
    "prompt_cache_hit_tokens": 3,
    "prompt_cache_miss_tokens": 4,
}
CALL = ToolDelta(index=0, id="call_1", name="f", arguments="")
LOGPROB = TokenLogprob(5, "hi", b"hi", -0.5, [TokenLogprob(6, "ho", b"ho", -0.25)])
SCORED = {
    "token": "hi",
    "logprob": -0.5,
    "bytes": [104, 105],
    "top_logprobs": [{"token": "ho", "logprob": -0.25, "bytes": [104, 111]}],
}


def chat(**fields: Any) -> ChatWriter:
    return ChatWriter(Wanted(model="m", messages=[{}], **fields), "1", [[5, 6]])


def completion(**fields: Any) -> CompletionWriter:
    wanted = Wanted(model="m", **{"prompts": ("p",), **fields})
    return CompletionWriter(wanted, "1", [[5]] * len(wanted.prompts), vocabulary())


def events(data: bytes) -> list[Any]:
    texts = [text.removeprefix("data: ") for text in data.decode().split("\n\n") if text]
    return [text if text == "[DONE]" else json.loads(text) for text in texts]


def choices(data: bytes) -> list[Any]:
    return [choice for event in events(data) for choice in event["choices"]]


def test_a_chats_chunks_are_openais() -> None:
    [event] = events(chat(stream=True).piece(0, Piece(content="hi")))
    assert {**event, "created": 0} == {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": "hi"}, "logprobs": None, "finish_reason": None}],
    }


def test_every_choice_opens_with_its_role() -> None:
    opened = choices(chat(stream=True, n=3).first())
    assert [(one["index"], one["delta"]) for one in opened] == [
        (index, {"role": "assistant", "content": ""}) for index in range(3)
    ]


def test_each_kind_of_news_has_an_event_of_its_own() -> None:
    piece = Piece("why", "so", [1], [CALL, ToolDelta(index=0, arguments="{}")])
    function = {"name": "f", "arguments": ""}
    assert [one["delta"] for one in choices(chat(stream=True, n=2).piece(1, piece))] == [
        {"reasoning_content": "why"},
        {"content": "so"},
        {
            "tool_calls": [
                {"index": 0, "id": "call_1", "type": "function", "function": function},
                {"index": 0, "function": {"arguments": "{}"}},
            ]
        },
    ]


@pytest.mark.parametrize("writer", [chat(stream=True), completion(stream=True)])
def test_nothing_new_is_no_event(writer: ChatWriter | CompletionWriter) -> None:
    assert writer.piece(0, Piece(ids=[5])) == b""


def test_a_choice_ends_with_its_reason_and_the_stream_with_done() -> None:
    writer = chat(stream=True, n=2)
    [ended] = choices(writer.last(1, "tool_calls"))
    assert (ended["index"], ended["delta"], ended["finish_reason"]) == (1, {}, "tool_calls")
    assert writer.closing(USAGE) == b"data: [DONE]\n\n"


def test_usage_comes_in_a_chunk_of_its_own_and_is_null_before() -> None:
    writer = chat(stream=True, include_usage=True)
    assert events(writer.first())[0]["usage"] is None
    last, done = events(writer.closing(USAGE))
    assert (last["choices"], done) == ([], "[DONE]")
    assert last["usage"] == {**COUNTS, "completion_tokens_details": {"reasoning_tokens": 2}}


def test_a_whole_chat_is_openais() -> None:
    pieces = [(Piece("why", "so"), "stop"), (Piece(tools=[CALL, ToolDelta(index=0, arguments="{}")]), "tool_calls")]
    body = json.loads(chat(n=2).whole(pieces, USAGE))
    assert (body["object"], body["usage"]["total_tokens"]) == ("chat.completion", 12)
    first, second = body["choices"]
    assert first["message"] == {"role": "assistant", "content": "so", "reasoning_content": "why"}
    assert second["message"] == {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
    }
    assert [(one["index"], one["finish_reason"]) for one in body["choices"]] == [(0, "stop"), (1, "tool_calls")]


def test_a_chats_logprobs_stand_beside_their_text() -> None:
    piece = Piece("why", "hi", logprobs=[TokenLogprob(4, "why", b"why", -1.0, reasoning=True), LOGPROB])
    [event] = choices(chat(stream=True, logprobs=1).piece(0, piece))
    assert event["delta"] == {"reasoning_content": "why", "content": "hi"}
    assert event["logprobs"]["content"] == [SCORED]
    assert [one["token"] for one in event["logprobs"]["reasoning_content"]] == ["why"]
    whole = json.loads(chat(logprobs=1).whole([(piece, "stop")], USAGE))["choices"][0]
    assert whole["logprobs"] == event["logprobs"]


def test_a_completions_logprobs_are_lists_with_offsets() -> None:
    writer = completion(stream=True, logprobs=1)
    pieces = [Piece(content="hi", logprobs=[LOGPROB]), Piece(content="hihi", logprobs=[LOGPROB, LOGPROB])]
    found = [choices(writer.piece(0, piece))[0]["logprobs"] for piece in pieces]
    assert found[0] == {
        "tokens": ["hi"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{"ho": -0.25}],
        "text_offset": [0],
    }
    assert found[1]["text_offset"] == [2, 4]


def test_an_echo_begins_the_text_of_every_choice() -> None:
    ids = ids_of("for one")
    wanted = {"prompts": ("text", ids), "n": 2, "echo": True}
    echoed = choices(completion(stream=True, **wanted).first())
    assert [one["text"] for one in echoed] == ["text", "text", "for one", "for one"]
    body = json.loads(completion(**wanted).whole([(Piece(content="!"), "stop")] * 4, USAGE))
    assert [one["text"] for one in body["choices"]] == ["text!", "text!", "for one!", "for one!"]
    assert body["usage"] == COUNTS


def test_token_ids_stand_beside_the_text_when_asked_for() -> None:
    [event] = choices(chat(stream=True, return_token_ids=True).piece(0, Piece(ids=[1, 2])))
    assert (event["delta"], event["token_ids"]) == ({}, [1, 2])
    body = json.loads(chat(return_token_ids=True).whole([(Piece(content="a", ids=[1]), "stop")], USAGE))
    assert (body["choices"][0]["token_ids"], body["prompt_token_ids"]) == ([1], [5, 6])
    several = completion(return_token_ids=True, prompts=("a", "b"))
    body = json.loads(several.whole([(Piece(content="a", ids=[1]), "stop")] * 2, USAGE))
    assert [one["prompt_token_ids"] for one in body["choices"]] == [[5], [5]]


@pytest.mark.parametrize(("asked", "told"), [("auto", "default"), ("flex", "flex")])
def test_the_tier_of_service_is_told_when_asked_for(asked: str, told: str) -> None:
    assert events(chat(stream=True, service_tier=asked).first())[0]["service_tier"] == told
    assert "service_tier" not in events(chat(stream=True).first())[0]
