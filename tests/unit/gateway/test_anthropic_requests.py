"""Bodies of `/v1/messages`: the chat request that they are, and errors in Anthropic's words."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from gateway_model import CARD, tokenizer
from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.api.anthropic_api import MessagesWanted, count_tokens, messages_request
from tandem.gateway.api.choices import prompts_of
from tandem.gateway.api.requests import parse_json
from tandem.gateway.errors import ApiError

HELLO = [{"role": "user", "content": "hello"}]
USE = {"type": "tool_use", "id": "toolu_1", "name": "add", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "2"}
TOOL = {"name": "add", "description": "adds", "input_schema": {"type": "object", "properties": {}}}
IMAGE = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}


def wanted(**fields: Any) -> MessagesWanted:
    return messages_request({"model": "tiny", "max_tokens": 100, "messages": HELLO, **fields}, CARD)


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        wanted(**fields)
    return caught.value


def test_what_steers_sampling_is_the_chat_endpoints() -> None:
    found = wanted(temperature=0.5, top_p=0.9, top_k=5, stop_sequences=["END"], stream=True)
    assert found.sampling == {"temperature": 0.5, "top_p": 0.9, "top_k": 5}
    assert (found.max_tokens, found.stops, found.stream) == (100, ("END",), True)


def test_system_text_and_blocks_become_the_first_message() -> None:
    assert wanted(system="Be brief.").messages[0] == {"role": "system", "content": "Be brief."}
    blocks = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    assert wanted(system=blocks).messages[0] == {"role": "system", "content": "a\n\nb"}


def test_calls_and_results_of_tools_become_chat_messages() -> None:
    messages = [
        *HELLO,
        {"role": "assistant", "content": [{"type": "text", "text": "I add."}, USE]},
        {"role": "user", "content": [RESULT, {"type": "text", "text": "And now?"}]},
    ]
    call = {"id": "toolu_1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    assert wanted(messages=messages).messages == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "I add.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "toolu_1", "content": "2"},
        {"role": "user", "content": "And now?"},
    ]


def test_results_stand_before_the_text_of_their_turn_and_say_that_a_tool_failed() -> None:
    failed = {**RESULT, "content": [{"type": "text", "text": "no such file"}], "is_error": True}
    messages = [
        *HELLO,
        {"role": "assistant", "content": [USE]},
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, failed]},
    ]
    assert [message["content"] for message in wanted(messages=messages).messages[2:]] == [
        "The tool failed: no such file",
        "Look:",
    ]


def test_earlier_thinking_is_left_out() -> None:
    thinking = {"type": "thinking", "thinking": "hm", "signature": "s"}
    redacted = {"type": "redacted_thinking", "data": "x"}
    answer = {"role": "assistant", "content": [thinking, redacted, {"type": "text", "text": "Yes."}]}
    assert wanted(messages=[*HELLO, answer, *HELLO]).messages[1] == {"role": "assistant", "content": "Yes."}


def test_tools_become_functions() -> None:
    assert wanted(tools=[{**TOOL, "type": "custom"}]).tools == [
        {
            "type": "function",
            "function": {"name": "add", "description": "adds", "parameters": TOOL["input_schema"]},
        }
    ]


@pytest.mark.parametrize(
    ("choice", "mode", "name"),
    [
        ({"type": "auto"}, "auto", ""),
        ({"type": "any"}, "required", ""),
        ({"type": "none"}, "none", ""),
        ({"type": "tool", "name": "add"}, "function", "add"),
    ],
)
def test_the_choice_of_a_tool_is_translated(choice: dict[str, Any], mode: str, name: str) -> None:
    found = wanted(tools=[TOOL], tool_choice=choice)
    assert (found.tool_choice.mode, found.tool_choice.name, found.parallel_tool_calls) == (mode, name, True)


def test_parallel_calls_can_be_switched_off() -> None:
    choice = {"type": "auto", "disable_parallel_tool_use": True}
    assert not wanted(tools=[TOOL], tool_choice=choice).parallel_tool_calls


def test_thinking_has_a_budget_or_is_switched_off() -> None:
    assert wanted(thinking={"type": "enabled", "budget_tokens": 50}).thinking == (True, 50)
    assert wanted(thinking={"type": "disabled"}).thinking == (False, None)
    assert wanted(thinking={"type": "adaptive"}).thinking == wanted().thinking == (None, None)


def test_thinking_can_be_hidden() -> None:
    assert wanted(thinking={"type": "adaptive"}).thinking_shown
    assert not wanted(thinking={"type": "adaptive", "display": "omitted"}).thinking_shown


def test_a_schema_for_the_answer_is_held() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    found = wanted(output_config={"format": {"type": "json_schema", "schema": schema}})
    assert found.grammar == {"type": "json_schema", "json_schema": schema}


def test_who_asks_is_known_by_the_metadata() -> None:
    assert wanted(metadata={"user_id": "u1"}).user == "u1"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"max_tokens": None}, "max_tokens", "Field required"),
        ({"messages": None}, "messages", "Field required"),
        ({"foo": 1}, "foo", "Extra inputs are not permitted"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0.name", "Extra inputs"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'user', 'assistant' or 'system'"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type", "reads text only"),
        ({"messages": [{"role": "user", "content": [USE]}]}, "messages.0.content.0.type", "expected one of"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "I"}]}, "messages", "prefill"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, "messages.0.role", "'messages.0' has no call before"),
        ({"max_tokens": 0}, "max_tokens", ">= 1"),
        ({"temperature": 3}, "temperature", "<= 2"),
        ({"stop_sequences": [""]}, "stop_sequences", "'stop_sequences' must not hold an empty string"),
        ({"stop_sequences": "x"}, "stop_sequences", "valid list"),
        ({"top_k": -1}, "top_k", "greater than or equal to 0"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type", "only your own"),
        ({"tools": [{"name": "a b", "input_schema": {}}]}, "tools.0.name", "'tools.0.name'"),
        ({"tools": [{**TOOL, "input_schema": {"type": "strin"}}]}, "tools.0.input_schema", "'tools.0.input_schema'"),
        ({"tools": [{"name": "a"}]}, "tools.0.input_schema", "Field required"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "sub"}}, "tool_choice.name", "sub"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type", "'auto', 'any', 'tool' or 'none'"),
        ({"thinking": {"type": "enabled"}}, "thinking.enabled.budget_tokens", "Field required"),
        ({"thinking": {"type": "enabled", "budget_tokens": 100}}, "max_tokens", "must be greater than"),
        ({"thinking": {"type": "enabled", "budget_tokens": 0}}, "thinking.enabled.budget_tokens", ">= 1"),
        ({"thinking": {"type": "disabled", "budget_tokens": 5}}, "thinking.disabled.budget_tokens", "Extra inputs"),
        ({"output_config": {"effort": "huge"}}, "output_config.effort", "'output_config.effort'"),
        ({"service_tier": "gold"}, "service_tier", "'auto' or 'standard_only'"),
        ({"metadata": {"user_id": 5}}, "metadata.user_id", "'metadata.user_id'"),
        ({"container": "c"}, "container", "does not support it"),
        ({"speed": "fast"}, "speed", "does not support it"),
    ],
)
def test_what_is_wrong_is_answered_with_anthropics_name_of_it(fields: dict[str, Any], param: str, words: str) -> None:
    error = refused(**fields)
    assert (error.status, error.param) == (400, param)
    assert words in error.message


def test_another_model_is_not_found() -> None:
    assert (refused(model="claude").status, refused(model="claude").param) == (404, "model")


def test_counted_tokens_are_those_that_the_request_would_have() -> None:
    body = {"model": "tiny", "messages": HELLO, "system": "Be brief.", "tools": [TOOL]}
    counted = json.loads(count_tokens(body, CARD, tokenizer()))
    asked = prompts_of(messages_request({**body, "max_tokens": 1}, CARD), tokenizer())[0]
    assert counted == {"input_tokens": len(asked.ids)}
    with pytest.raises(ApiError):
        count_tokens({**body, "temperature": 1}, CARD, tokenizer())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["text", "tool_use", "user", "enabled", "auto", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "name", "input", "input_schema", "tool_use_id"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["messages", "system", "tools", "tool_choice", "thinking", "output_config", "metadata", "stop_sequences",
     "service_tier", "top_k", "max_tokens", "speed", "x"]
)  # fmt: skip


@given(fields=st.dictionaries(FIELDS, JSON, max_size=4))
def test_no_body_makes_it_stumble(fields: dict[str, Any]) -> None:
    body = parse_json(msgspec.json.encode({"model": "tiny", "max_tokens": 9, "messages": HELLO, **fields}))
    # Anything but an ApiError fails the test.
    with contextlib.suppress(ApiError):
        assert messages_request(body, CARD).model == "tiny"
