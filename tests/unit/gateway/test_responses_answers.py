"""Answers of `/v1/responses`: a response whole, the same response as events, and errors."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_model import CARD
from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.api.responses_api import responses_request
from tandem.gateway.api.responses_writer import ResponsesWriter, encode_error, error_event
from tandem.gateway.errors import ApiError
from tandem.gateway.text.answer import Piece, TokenLogprob, ToolDelta, Usage

USAGE = Usage(prompt=10, completion=6, reasoning=2, cached=4)
PIECES = [
    Piece(reasoning="Let me "),
    Piece(reasoning="think", content="Hel"),
    Piece(content="lo é中"),
    Piece(tools=[ToolDelta(index=0, id="call_1", name="add", arguments='{"a"')]),
    Piece(tools=[ToolDelta(index=0, arguments=":1}"), ToolDelta(index=1, id="call_2", name="sub")]),
]
# When it was made is the only thing that two answers to the same request differ in.
CLOCK = ("created_at", "completed_at")


def writer(**fields: Any) -> ResponsesWriter:
    return ResponsesWriter(responses_request({"model": "tiny", "input": "x", **fields}, CARD), "n1", [list(range(10))])


def whole(pieces: list[Piece], reason: str = "stop", **fields: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(writer(**fields).whole([(sum(pieces, Piece()), reason)], USAGE))
    return timeless(found)


def events(pieces: list[Piece], reason: str = "stop", **fields: Any) -> list[dict[str, Any]]:
    made = writer(stream=True, **fields)
    data = made.first() + b"".join(made.piece(0, piece) for piece in pieces)
    return parsed(data + made.last(0, reason) + made.closing(USAGE))


def timeless(response: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in response.items() if field not in CLOCK}


def parsed(data: bytes) -> list[dict[str, Any]]:
    """Server-sent events whose names and types agree and whose numbers follow each other."""
    found = []
    for event in data.decode().removesuffix("\n\n").split("\n\n"):
        name, line = event.split("\n")
        found.append(json.loads(line.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def read(stream: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The output items that a client makes of the events; fails where they do not fit each other."""
    assert [event["type"] for event in stream[:2]] == ["response.created", "response.in_progress"]
    output: list[dict[str, Any]] = []
    text = ""
    for event in stream[2:-1]:
        assert event["output_index"] == len(output) - (event["type"] != "response.output_item.added")
        match event["type"].removeprefix("response."):
            case "output_item.added":
                output.append(event["item"])
                text = ""
            case "content_part.added":
                assert event["item_id"] == output[-1]["id"]
                output[-1]["content"].append(event["part"])
            case "reasoning_text.delta" | "output_text.delta" | "function_call_arguments.delta":
                assert event["item_id"] == output[-1]["id"]
                text += event["delta"]
            case "reasoning_text.done" | "output_text.done":
                assert event["text"] == text
            case "function_call_arguments.done":
                assert event["arguments"] == text
            case "content_part.done":
                assert event["part"]["text"] == text
            case "output_item.done":
                assert (event["item"]["id"], event["item"]["type"]) == (output[-1]["id"], output[-1]["type"])
                output[-1] = event["item"]
            case kind:
                pytest.fail(f"an event of type {kind}")
    return output


def test_a_response_has_its_items_in_order() -> None:
    output = whole(PIECES, "tool_calls")["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call", "function_call"]
    assert output[0]["content"] == [{"type": "reasoning_text", "text": "Let me think"}]
    assert output[1]["content"] == [{"type": "output_text", "text": "Hello é中", "annotations": [], "logprobs": []}]
    assert [(call["call_id"], call["name"], call["arguments"]) for call in output[2:]] == [
        ("call_1", "add", '{"a":1}'),
        ("call_2", "sub", ""),
    ]
    assert {item["status"] for item in output} == {"completed"}


def test_a_stream_says_what_the_whole_response_says() -> None:
    stream = events(PIECES, "tool_calls")
    assert stream[-1]["type"] == "response.completed"
    assert timeless(stream[-1]["response"]) == whole(PIECES, "tool_calls")
    assert read(stream) == stream[-1]["response"]["output"]


_TEXT = st.text(max_size=4)
_PIECES = st.lists(st.builds(Piece, reasoning=_TEXT), max_size=3).flatmap(
    lambda first: st.lists(st.builds(Piece, content=_TEXT), max_size=3).map(lambda rest: first + rest)
)


@given(pieces=_PIECES)
def test_it_does_so_however_the_text_is_cut(pieces: list[Piece]) -> None:
    stream = events(pieces)
    assert read(stream) == stream[-1]["response"]["output"] == whole(pieces)["output"]


def test_an_answer_that_was_cut_short_is_incomplete() -> None:
    response = whole(PIECES[:3], "length")
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [item["status"] for item in response["output"]] == ["completed", "incomplete"]
    assert events(PIECES[:3], "length")[-1]["type"] == "response.incomplete"


def test_usage_has_its_details() -> None:
    assert whole(PIECES)["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 16,
    }


def test_the_response_repeats_what_was_asked_for() -> None:
    response = whole([], instructions="Be brief.", temperature=0.5, metadata={"a": "b"}, max_output_tokens=7)
    asked = {"instructions": "Be brief.", "temperature": 0.5, "metadata": {"a": "b"}, "max_output_tokens": 7}
    assert asked.items() <= response.items()
    assert (response["store"], response["previous_response_id"], response["tools"]) == (False, None, [])


def test_logprobs_stand_beside_the_text_that_they_are_of() -> None:
    pieces = [
        Piece(reasoning="r", logprobs=[TokenLogprob(1, "r", b"r", -1.0, reasoning=True)]),
        Piece(logprobs=[TokenLogprob(2, "\ufffd", b"\xc3", -0.5)]),
        Piece(content="é", logprobs=[TokenLogprob(3, "\ufffd", b"\xa9", -0.25, [TokenLogprob(4, "x", b"x", -2.0)])]),
    ]
    asked = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    found = whole(pieces, **asked)["output"][1]["content"][0]["logprobs"]
    assert [one["bytes"] for one in found] == [[0xC3], [0xA9]]
    assert found[1]["top_logprobs"] == [{"token": "x", "bytes": [120], "logprob": -2.0}]
    deltas = [event for event in events(pieces, **asked) if event["type"] == "response.output_text.delta"]
    assert [event["logprobs"] for event in deltas] == [found]


def test_without_being_asked_for_no_logprobs_are_told() -> None:
    piece = Piece(content="a", logprobs=[TokenLogprob(1, "a", b"a", -1.0)])
    assert whole([piece])["output"][0]["content"][0]["logprobs"] == []


def test_a_failure_in_mid_stream_is_an_error_and_a_failed_response() -> None:
    made = writer(stream=True)
    data = made.first() + made.piece(0, Piece(content="Hel"))
    stream = parsed(data + made.failed(ApiError(503, "broken", type="server_error", code="engine_failure"), "r1"))
    assert [event["type"] for event in stream[-2:]] == ["error", "response.failed"]
    assert (stream[-2]["message"], stream[-2]["error"]["message"]) == ("broken", "broken")
    failed = stream[-1]["response"]
    assert (failed["status"], failed["error"]) == ("failed", {"code": "server_error", "message": "broken"})
    assert failed["output"][0]["content"][0]["text"] == "Hel"


def test_errors_are_openais() -> None:
    error = ApiError(400, "m", param="input", code="c")
    assert json.loads(encode_error(error, "r1")) == {
        "error": {"message": "m", "type": "invalid_request_error", "param": "input", "code": "c"}
    }
    assert error_event(error, "r1").startswith(b'event: error\ndata: {"type":"error","sequence_number":')
