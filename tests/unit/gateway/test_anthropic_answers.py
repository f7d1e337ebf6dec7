"""Answers of `/v1/messages`: a message whole, the same message as events, and errors."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from gateway_model import CARD
from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.api.anthropic_api import messages_request
from tandem.gateway.api.anthropic_writer import KEEP_ALIVE, MessagesWriter, encode_error, error_event
from tandem.gateway.errors import ApiError
from tandem.gateway.text.answer import Piece, ToolDelta, Usage
from tandem.gateway.text.stops import StopMatcher

USAGE = Usage(prompt=10, completion=6, reasoning=2, cached=4)
PIECES = [
    Piece(reasoning="Let me "),
    Piece(reasoning="think", content="Hel"),
    Piece(ids=[7]),
    Piece(content="lo é中"),
    Piece(tools=[ToolDelta(index=0, id="call_1", name="add", arguments='{"a"')]),
    Piece(tools=[ToolDelta(index=0, arguments=":1}"), ToolDelta(index=1, id="call_2", name="sub")]),
]
CONTENT = [
    {"type": "thinking", "thinking": "Let me think", "signature": "tandem-n1"},
    {"type": "text", "text": "Hello é中"},
    {"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 1}},
    {"type": "tool_use", "id": "call_2", "name": "sub", "input": {}},
]


def writer(**fields: Any) -> MessagesWriter:
    body = {"model": "tiny", "max_tokens": 9, "messages": [{"role": "user", "content": "x"}], **fields}
    return MessagesWriter(messages_request(body, CARD), "n1", [list(range(10))])


def whole(pieces: list[Piece], reason: str = "stop", **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(writer(**fields).whole([(sum(pieces, Piece()), reason)], USAGE))
    return found


def events(pieces: list[Piece], reason: str = "stop", **fields: Any) -> list[dict[str, Any]]:
    made = writer(**fields)
    data = made.first() + b"".join(made.piece(0, piece) for piece in pieces)
    return parsed(data + made.last(0, reason) + made.closing(USAGE))


def parsed(data: bytes) -> list[dict[str, Any]]:
    """Server-sent events whose names and types agree."""
    found = []
    for event in data.decode().removesuffix("\n\n").split("\n\n"):
        name, line = event.split("\n")
        found.append(json.loads(line.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def read(stream: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of the events; fails where their order is not as the API has it."""
    assert stream[0]["type"] == "message_start"
    message: dict[str, Any] = stream[0]["message"]
    opened: int | None = None
    arguments = ""
    for event in stream[1:]:
        match event["type"]:
            case "content_block_start":
                assert opened is None
                assert event["index"] == len(message["content"])
                opened, arguments = event["index"], ""
                message["content"].append(event["content_block"])
            case "content_block_delta":
                assert event["index"] == opened
                kind, value = event["delta"].pop("type"), next(iter(event["delta"].values()))
                block = message["content"][-1]
                if kind == "input_json_delta":
                    arguments += value
                    continue
                field = {"thinking_delta": "thinking", "text_delta": "text", "signature_delta": "signature"}[kind]
                block[field] += value
            case "content_block_stop":
                assert event["index"] == opened
                opened = None
                if arguments:
                    message["content"][-1]["input"] = json.loads(arguments)
            case "message_delta":
                assert opened is None
                message |= event["delta"] | {"usage": message["usage"] | event["usage"]}
    assert stream[-1] == {"type": "message_stop"}
    return message


def test_a_message_has_its_blocks_in_order() -> None:
    message = whole(PIECES, "tool_calls")
    assert message["content"] == CONTENT
    assert (message["id"], message["type"], message["role"]) == ("msg_n1", "message", "assistant")
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)


def test_a_stream_says_what_the_whole_message_says() -> None:
    assert read(events(PIECES, "tool_calls", stream=True)) == whole(PIECES, "tool_calls")


_TEXT = st.text(max_size=4)
_PIECES = st.lists(st.builds(Piece, reasoning=_TEXT), max_size=3).flatmap(
    lambda first: st.lists(st.builds(Piece, content=_TEXT), max_size=3).map(lambda rest: first + rest)
)


@given(pieces=_PIECES)
def test_it_does_so_however_the_text_is_cut(pieces: list[Piece]) -> None:
    assert read(events(pieces, stream=True)) == whole(pieces)


def test_tokens_from_the_cache_are_told_apart() -> None:
    assert whole(PIECES)["usage"] == {
        "input_tokens": 6,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": 6,
        "output_tokens_details": {"thinking_tokens": 2},
    }


def test_a_stream_begins_with_the_size_of_the_prompt() -> None:
    usage = parsed(writer(stream=True).first())[0]["message"]["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (10, 0)


@pytest.mark.parametrize(
    ("reason", "told"), [("stop", "end_turn"), ("length", "max_tokens"), ("tool_calls", "tool_use")]
)
def test_why_it_ended_is_told_in_anthropics_words(reason: str, told: str) -> None:
    assert whole(PIECES, reason)["stop_reason"] == told


@given(text=st.text("abx", max_size=12), cuts=st.lists(st.integers(0, 12), max_size=4))
def test_the_stop_sequence_that_ended_the_text_is_named_and_not_part_of_it(text: str, cuts: list[int]) -> None:
    stops = ["ab", "b", "xx"]
    matcher = StopMatcher(stops, include=True)
    borders = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [Piece(content=matcher.feed(text[at:to])) for at, to in pairwise(borders)]
    pieces.append(Piece(content=matcher.end()))
    plain = StopMatcher(stops)
    expected = plain.feed(text) + plain.end()
    for message in (whole(pieces, stop_sequences=stops), read(events(pieces, stop_sequences=stops, stream=True))):
        assert "".join(block["text"] for block in message["content"]) == expected
        assert (message["stop_reason"] == "stop_sequence") == plain.stopped
        found = message["stop_sequence"]
        assert not plain.stopped or text.startswith(expected + found)


def test_an_answer_that_reached_its_limit_names_no_stop_sequence() -> None:
    assert whole([Piece(content="aEND")], "length", stop_sequences=["END"])["stop_reason"] == "max_tokens"


def test_hidden_thinking_leaves_an_empty_block() -> None:
    hidden = {"thinking": {"type": "adaptive", "display": "omitted"}}
    message = whole(PIECES, **hidden)
    assert message["content"][0] == {"type": "thinking", "thinking": "", "signature": "tandem-n1"}
    assert read(events(PIECES, stream=True, **hidden)) == message


def test_arguments_that_are_no_object_are_shown_as_they_are() -> None:
    piece = Piece(tools=[ToolDelta(index=0, id="c", name="f", arguments='{"a":')])
    assert whole([piece])["content"][0]["input"] == {"raw_arguments": '{"a":'}


def test_an_empty_answer_is_a_message_without_blocks() -> None:
    assert whole([])["content"] == []
    assert read(events([], stream=True))["content"] == []


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (408, "timeout_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "api_error"),
        (504, "timeout_error"),
        (529, "overloaded_error"),
    ],
)
def test_errors_have_anthropics_types(status: int, kind: str) -> None:
    assert json.loads(encode_error(ApiError(status, "m"), "r1")) == {
        "type": "error",
        "error": {"type": kind, "message": "m"},
        "request_id": "r1",
    }


def test_no_room_is_an_overload() -> None:
    found = json.loads(encode_error(ApiError(503, "m", code="no_capacity"), "r1"))
    assert found["error"]["type"] == "overloaded_error"


def test_an_error_names_its_field_first() -> None:
    found = json.loads(encode_error(ApiError(400, "Field required", param="max_tokens"), "r1"))
    assert found["error"]["message"] == "max_tokens: Field required"


def test_errors_and_pings_are_named_events() -> None:
    assert parsed(error_event(ApiError(500, "m"), "r1"))[0]["error"] == {"type": "api_error", "message": "m"}
    assert parsed(KEEP_ALIVE) == [{"type": "ping"}]
