"""The OpenAPI document: valid, complete, and true to what the gateway accepts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import jsonschema
import openapi_spec_validator
import pytest
from gateway_model import CARD, tokenizer
from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.api import openapi
from tandem.gateway.api.anthropic_api import count_tokens, messages_request
from tandem.gateway.api.anthropic_writer import MessagesWriter, encode_error
from tandem.gateway.api.params import HARMLESS, REFUSED, SAMPLING
from tandem.gateway.api.requests import CHAT_FIELDS, COMPLETION_FIELDS, chat_request, completion_request
from tandem.gateway.api.responses_api import responses_request
from tandem.gateway.api.responses_writer import ResponsesWriter
from tandem.gateway.api.token_api import detokenize, tokenize
from tandem.gateway.api.wire import ChatWriter, CompletionWriter
from tandem.gateway.errors import ApiError
from tandem.gateway.text.answer import Piece, ToolDelta, Usage

DOCUMENT: dict[str, Any] = json.loads(openapi.page(CARD, "1.2.3"))
SCHEMAS = DOCUMENT["components"]["schemas"]
HELLO = [{"role": "user", "content": "hello"}]

Parse = Callable[[Mapping[str, Any]], object]
BODIES: dict[str, tuple[Parse, dict[str, Any]]] = {
    "ChatRequest": (lambda body: chat_request(body, CARD), {"model": "tiny", "messages": HELLO}),
    "CompletionRequest": (lambda body: completion_request(body, CARD), {"model": "tiny", "prompt": "x"}),
    "ResponsesRequest": (lambda body: responses_request(body, CARD), {"model": "tiny", "input": "x"}),
    "MessagesRequest": (
        lambda body: messages_request(body, CARD),
        {"model": "tiny", "messages": HELLO, "max_tokens": 5},
    ),
    "CountTokensRequest": (lambda body: count_tokens(body, CARD, tokenizer()), {"model": "tiny", "messages": HELLO}),
    "TokenizeRequest": (lambda body: tokenize(body, CARD, tokenizer()), {"prompt": "x"}),
    "DetokenizeRequest": (lambda body: detokenize(body, CARD, tokenizer()), {"tokens": [1, 2]}),
}
"""The schema of a request → what checks one, and a small one."""


def schema(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}", "components": DOCUMENT["components"]}


@cache
def validator(name: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(schema(name))


def valid(name: str, value: object) -> bool:
    return bool(validator(name).is_valid(value))


def accepted(parse: Parse, body: Mapping[str, Any]) -> bool:
    try:
        parse(body)
    except ApiError:
        return False
    return True


def test_the_document_is_valid() -> None:
    openapi_spec_validator.validate(DOCUMENT)
    assert (DOCUMENT["openapi"], DOCUMENT["info"]["version"]) == ("3.1.0", "1.2.3")


def test_every_reference_leads_somewhere() -> None:
    named = set(re.findall(r"#/components/schemas/(\w+)", json.dumps(DOCUMENT)))
    assert named <= set(SCHEMAS)
    assert named == set(SCHEMAS), "a schema that nothing uses"


def test_every_operation_has_a_name_of_its_own() -> None:
    names = [operation["operationId"] for path in DOCUMENT["paths"].values() for operation in path.values()]
    assert len(names) == len(set(names)) == len(openapi.PATHS)


def test_paths_have_their_method() -> None:
    assert {path: next(iter(found)).upper() for path, found in DOCUMENT["paths"].items()} == openapi.PATHS


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("ChatRequest", CHAT_FIELDS | set(SAMPLING) | set(HARMLESS) | set(REFUSED)),
        ("CompletionRequest", COMPLETION_FIELDS | set(SAMPLING) | set(HARMLESS) | set(REFUSED)),
    ],
)
def test_the_document_has_the_fields_that_are_read_and_no_others(name: str, fields: set[str]) -> None:
    assert set(SCHEMAS[name]["properties"]) == fields


@pytest.mark.parametrize("name", [name for name in BODIES if name != "TokenizeRequest"])
def test_no_field_of_the_document_is_unknown(name: str) -> None:
    parse, body = BODIES[name]
    for field in SCHEMAS[name]["properties"]:
        asked = {field: None, **body}
        assert accepted(parse, asked), field


@pytest.mark.parametrize("name", BODIES)
def test_a_field_that_is_not_in_the_document_is_refused(name: str) -> None:
    parse, body = BODIES[name]
    assert valid(name, body)
    assert accepted(parse, body)
    assert not valid(name, {**body, "foo": 1})
    assert not accepted(parse, {**body, "foo": 1})


VALUES = [
    None, True, False, -(2**63) - 1, -(2**63), -3, -2, -1, 0, 1, 2, 3, 16, 20, 21, 128, 129, 2**31 - 1, 2**31, 2**63,
    -0.5, 0.5, 1.5, 2.5, "", "x", "auto", "none", "required", "low", "medium", "high", "default", "flex", "priority",
    "standard_only", "max", "disabled", [], ["x"], [""], [1], [-1], ["x"] * 17, {}, {"a": "b"}, {"a": 1}, {"5": 1},
    {"5": 101}, {"x": 1}, {"type": "text"}, {"type": "json_object"}, {"type": "xml"}, {"type": "enabled"},
    {"type": "disabled"}, {"type": "adaptive"}, {"type": "any"}, {"type": "none"}, {"effort": "low"}, {"effort": "x"},
    {"type": "enabled", "budget_tokens": 1}, {"type": "enabled", "budget_tokens": 0}, {"user_id": "u"}, {"user_id": 1},
    {"format": {"type": "text"}}, {"format": {"type": "x"}}, {"include_obfuscation": True}, {"thinking": True},
    [{"type": "function", "name": "f"}], [{"type": "function", "function": {"name": "f"}}], [{"type": "web_search"}],
    [{"name": "f", "input_schema": {}}], [{"type": "text", "text": "x"}], [{"type": "image"}],
    {"k" * 65: "v"}, {"k": "v" * 513},
]  # fmt: skip
"""Values on both sides of every border."""

TOGETHER = {
    # Fields that are only allowed together with others, whatever their schema says.
    "ChatRequest": {"stream_options", "top_logprobs", "tool_choice", "thinking_budget", "reasoning_effort"},
    "CompletionRequest": {"stream_options", "best_of", "echo", "logprobs", "n"},
    "ResponsesRequest": {"top_logprobs", "tool_choice", "stream_options"},
    "MessagesRequest": {"tool_choice", "thinking"},
    "CountTokensRequest": {"tool_choice"},
}


@pytest.mark.parametrize("name", [name for name in BODIES if name != "TokenizeRequest"])
def test_a_field_is_accepted_where_the_document_says_so(name: str) -> None:
    parse, body = BODIES[name]
    differ = []
    for field in SCHEMAS[name]["properties"]:
        for value in VALUES:
            asked = {**body, field: value}
            said, done = valid(name, asked), accepted(parse, asked)
            if said != done and not (said and field in TOGETHER.get(name, ())):
                differ.append((field, value, said))
    assert not differ


TURNS = st.recursive(
    st.none() | st.text(max_size=2) | st.sampled_from(["user", "assistant", "tool", "text", "function", "message"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "tool_calls", "tool_call_id", "id", "name", "input"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=6,
)


@pytest.mark.parametrize(
    ("name", "field"), [("ChatRequest", "messages"), ("MessagesRequest", "messages"), ("ResponsesRequest", "input")]
)
@given(turn=TURNS)
def test_messages_that_the_document_refuses_are_refused(name: str, field: str, turn: Any) -> None:
    parse, body = BODIES[name]
    asked = {**body, field: [turn, *body["messages"]] if field == "messages" else [turn, *HELLO]}
    if accepted(parse, asked):
        assert valid(name, asked)


def test_answers_are_as_the_document_says() -> None:
    call = ToolDelta(index=0, id="call_1", name="add", arguments="{}")
    choices = [(Piece("hm", "Hi", [1], [call]), "tool_calls")]
    usage = Usage(prompt=3, completion=2, reasoning=1, cached=1)
    for name, writer, request in (
        ("ChatCompletion", ChatWriter, "ChatRequest"),
        ("Completion", CompletionWriter, "CompletionRequest"),
        ("Response", ResponsesWriter, "ResponsesRequest"),
        ("Message", MessagesWriter, "MessagesRequest"),
    ):
        parse, body = BODIES[request]
        made: Any = writer
        answer = json.loads(made(parse(body), "n1", [[1, 2, 3]], None).whole(choices, usage))
        validator(name).validate(answer)
    for name, request in (
        ("TokenCount", "CountTokensRequest"),
        ("Tokens", "TokenizeRequest"),
        ("Text", "DetokenizeRequest"),
    ):
        parse, body = BODIES[request]
        found: Any = parse(body)
        validator(name).validate(json.loads(found))


def test_errors_are_as_the_document_says() -> None:
    assert valid("Error", json.loads(ApiError(400, "m", param="p", code="c").body()))
    assert valid("AnthropicError", json.loads(encode_error(ApiError(400, "m"), "r1")))
