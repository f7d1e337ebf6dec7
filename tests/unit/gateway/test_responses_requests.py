"""Bodies of `/v1/responses`: the chat request that they are, and what a server without memory refuses."""

from __future__ import annotations

import contextlib
from typing import Any

import msgspec
import pytest
from gateway_model import CARD
from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.api.requests import parse_json
from tandem.gateway.api.responses_api import ResponsesWanted, responses_request
from tandem.gateway.errors import ApiError

TOOL = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": True}
CALL = {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a":1}'}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "2"}


def wanted(**fields: Any) -> ResponsesWanted:
    return responses_request({"model": "tiny", "input": "hello", **fields}, CARD)


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        wanted(**fields)
    return caught.value


def test_a_text_is_a_message_of_the_user() -> None:
    assert wanted().messages == [{"role": "user", "content": "hello"}]


def test_instructions_come_first() -> None:
    assert wanted(instructions="Be brief.").messages[0] == {"role": "system", "content": "Be brief."}


def test_items_become_chat_messages() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "1+1?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I add."}]},
        CALL,
        {**CALL, "call_id": "c2"},
        OUTPUT,
        {**OUTPUT, "call_id": "c2", "output": [{"type": "input_text", "text": "3"}]},
    ]
    function = {"name": "add", "arguments": '{"a":1}'}
    calls = [{"id": number, "type": "function", "function": function} for number in ("c1", "c2")]
    assert wanted(input=items).messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "I add.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "tool", "tool_call_id": "c2", "content": "3"},
    ]


def test_a_call_without_a_text_before_it_has_a_message_of_its_own() -> None:
    found = wanted(input=[{"role": "user", "content": "x"}, CALL, OUTPUT]).messages
    assert [message["role"] for message in found] == ["user", "assistant", "tool"]


def test_limits_and_sampling_are_the_chat_endpoints() -> None:
    found = wanted(max_output_tokens=7, temperature=0.5, top_p=0.9, top_k=3, stream=True)
    assert (found.max_tokens, found.stream) == (7, True)
    assert found.sampling == {"temperature": 0.5, "top_p": 0.9, "top_k": 3}


def test_functions_and_the_choice_of_one_are_translated() -> None:
    found = wanted(tools=[TOOL], tool_choice={"type": "function", "name": "add"}, parallel_tool_calls=False)
    assert found.tools[0]["function"] == {"name": "add", "parameters": {"type": "object"}, "strict": True}
    assert found.tool_choice == ("function", "add")
    assert not found.parallel_tool_calls


def test_the_format_of_the_text_is_held() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "sum", "schema": schema, "strict": True}
    assert wanted(text={"format": form}).grammar == {"type": "json_schema", "json_schema": schema}
    assert wanted(text={"format": {"type": "text"}, "verbosity": "medium"}).grammar is None


def test_effort_limits_the_reasoning() -> None:
    assert wanted(reasoning={"effort": "none", "summary": "auto"}).thinking.enabled is False
    assert wanted(reasoning={"effort": "low"}).thinking.budget is not None


def test_logprobs_are_asked_for_by_what_to_include() -> None:
    assert wanted(include=["message.output_text.logprobs"], top_logprobs=2).logprobs == 2
    assert wanted(include=["reasoning.encrypted_content"], top_logprobs=0).logprobs is None


def test_what_changes_nothing_is_accepted() -> None:
    wanted(
        store=False, background=False, truncation="disabled", previous_response_id=None, conversation=None,
        metadata={"a": "b"}, user="u", safety_identifier="s", prompt_cache_key="k", service_tier="auto",
        max_tool_calls=3, stream=True, stream_options={"include_obfuscation": False},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": None}, "input", "Missing required parameter"),
        ({"input": []}, "input", "at least one item"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input", "nothing to answer"),
        ({"input": 5}, "input", "expected a string or an array of items"),
        ({"input": [{"type": False, "role": "user", "content": ""}]}, "input[0].type", "items of type False"),
        ({"input": [{"id": "msg_1"}]}, "input[0].type", "keeps no responses"),
        ({"input": [{"type": "computer_call"}]}, "input[0].type", "not known"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "must be one of"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0].type",
            "reads text only",
        ),
        ({"input": [OUTPUT], "instructions": "x"}, "input[0].role", "'input[0]' has no call before it"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].arguments", "Missing required parameter"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "keeps no responses"),
        ({"conversation": "conv_1"}, "conversation", "keeps no responses"),
        ({"background": True}, "background", "keeps no responses"),
        ({"store": True}, "store", "leave 'store' out or set it to false"),
        ({"prompt": {"id": "p"}}, "prompt", "keeps no prompts"),
        ({"truncation": "auto"}, "truncation", "never drops"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "no tools run on this server"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name", "'tools[0].name'"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name", "x"),
        ({"tool_choice": {"type": "mcp"}}, "tool_choice.type", "can be chosen"),
        ({"max_output_tokens": 0}, "max_output_tokens", "'max_output_tokens'"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type", "'text.format.type'"),
        ({"text": {"verbosity": "low"}}, "text.verbosity", "no such setting"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "'reasoning.effort'"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary", "told in full"),
        ({"include": ["x"]}, "include[0]", "must be one of"),
        ({"top_logprobs": 3}, "top_logprobs", "needs"),
        ({"messages": []}, "messages", "Unknown parameter"),
        ({"n": 2}, "n", "Unknown parameter"),
    ],
)
def test_what_is_wrong_is_answered_with_the_clients_name_of_it(fields: dict[str, Any], param: str, words: str) -> None:
    error = refused(**fields)
    assert (error.status, error.param) == (400, param)
    assert words in error.message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["message", "function_call", "user", "function", ""]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "role", "content", "text", "name", "arguments", "call_id", "format", "effort"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    ["input", "instructions", "tools", "tool_choice", "text", "reasoning", "include", "metadata", "stream_options",
     "service_tier", "top_logprobs", "max_output_tokens", "store", "x"]
)  # fmt: skip


@given(fields=st.dictionaries(FIELDS, JSON, max_size=4))
def test_no_body_makes_it_stumble(fields: dict[str, Any]) -> None:
    body = parse_json(msgspec.json.encode({"model": "tiny", "input": "x", **fields}))
    # Anything but an ApiError fails the test.
    with contextlib.suppress(ApiError):
        assert responses_request(body, CARD).model == "tiny"
