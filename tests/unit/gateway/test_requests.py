"""Request bodies: what is understood, and how what is not is answered."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import pytest
from gateway_model import CARD, CONTEXT
from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.errors import ApiError
from tandem.gateway.requests import Wanted, chat_request, check_length, completion_request, parse_json

HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Wanted:
    return chat_request({"model": "tiny", "messages": HELLO, **fields}, CARD)


def completion(**fields: Any) -> Wanted:
    return completion_request({"model": "tiny", "prompt": "hello", **fields}, CARD)


def refused(**fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    return caught.value


def test_sampling_fields_reach_the_engine_under_its_names() -> None:
    wanted = chat(temperature=0, top_p=0.5, top_k=3, min_p=0.1, seed=7, frequency_penalty=-1, ignore_eos=True)
    assert wanted.sampling == {
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "sampling_seed": 7,
        "frequency_penalty": -1,
        "ignore_eos": True,
    }


def test_null_means_not_given() -> None:
    wanted = chat(temperature=None, stop=None, n=None, tools=None, stream=None, user=None, max_tokens=None)
    assert (wanted.sampling, wanted.stream, wanted.stops, wanted.max_tokens) == ({}, False, (), None)


def test_the_models_own_defaults_hold_unless_the_request_says_otherwise() -> None:
    card = msgspec.structs.replace(CARD, sampling={"temperature": 0.6, "top_p": 0.95})
    body = {"model": "tiny", "messages": HELLO, "top_p": 1}
    assert chat_request(body, card).sampling == {"temperature": 0.6, "top_p": 1}


def test_top_p_zero_means_the_likeliest_token() -> None:
    assert chat(top_p=0).sampling == {"top_p": 1, "top_k": 1}


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
        ({"temperature": 10**500}, "temperature", "decimal_above_max_value"),
        ({"temperature": -(10**500)}, "temperature", "decimal_below_min_value"),
        ({"temperature": float("nan")}, "temperature", "decimal_above_max_value"),
        ({"messages": [{"role": {"a": 1}, "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"top_p": -0.1}, "top_p", "decimal_below_min_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "decimal_below_min_value"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_type"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "integer_below_min_value"),
        ({"seed": 2**63}, "seed", "integer_above_max_value"),
        ({"stop": ["a", 1]}, "stop", "invalid_type"),
        ({"stop": ""}, "stop", "empty_string"),
        ({"stop": [str(n) for n in range(17)]}, "stop", "array_above_max_length"),
        ({"stream": "yes"}, "stream", "invalid_type"),
        ({"stream_options": {}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unsupported_parameter"),
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"n": True}, "n", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"reasoning_effort": "low"}, "reasoning_effort", "unsupported_parameter"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"user": 5}, "user", "invalid_type"),
        ({"model": None}, "model", "missing_required_parameter"),
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": "hello"}, "messages", "invalid_type"),
        ({"messages": ["hello"]}, "messages[0]", "invalid_type"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_required_parameter"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "unsupported_parameter",
        ),
    ],
)
def test_what_is_wrong_is_answered_with_the_field_that_is(fields: dict[str, Any], param: str, code: str) -> None:
    error = refused(**fields)
    assert (error.status, error.type, error.param, error.code) == (400, "invalid_request_error", param, code)


def test_an_unknown_model_is_not_found() -> None:
    error = refused(model="gpt-5")
    assert (error.status, error.code) == (404, "model_not_found")


def test_fields_that_ask_for_nothing_are_accepted() -> None:
    chat(
        n=1, logprobs=False, top_logprobs=0, tools=[], tool_choice="none", response_format={"type": "text"},
        user="u", metadata={"a": "b"}, store=False, service_tier="auto", parallel_tool_calls=True, logit_bias={},
    )  # fmt: skip


def test_messages_of_every_role_are_understood() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "old"},
        {"role": "tool", "content": "42", "tool_call_id": "c"},
    ]
    assert chat(messages=messages).messages == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "c"},
    ]


@pytest.mark.parametrize("prompt", ["hi", ["hi"]])
def test_a_prompt_may_be_text(prompt: Any) -> None:
    assert completion(prompt=prompt).text == "hi"


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]]])
def test_a_prompt_may_be_token_ids(prompt: Any) -> None:
    assert completion(prompt=prompt).ids == [1, 2]


@pytest.mark.parametrize("prompt", [None, 5, ["a", "b"], [[1], [2]], [1, "a"], [1, True], [-1], [1024], {"a": 1}])
def test_any_other_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        completion(prompt=prompt)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


def test_prompt_and_answer_must_fit_the_context() -> None:
    assert check_length(completion(max_tokens=6), CONTEXT - 6, CARD) == 6
    for wanted, prompt in ((completion(max_tokens=7), CONTEXT - 6), (completion(), CONTEXT)):
        with pytest.raises(ApiError) as caught:
            check_length(wanted, prompt, CARD)
        assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")


def test_without_a_limit_an_answer_ends_where_the_context_does() -> None:
    assert check_length(chat(), 100, CARD) == CONTEXT - 100
    assert check_length(completion(), 100, CARD) == 16


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"a":"\\ud800"}', b"[" * 100_000, b"null"])
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        parse_json(body)
    assert caught.value.status == 400


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from(
    ["messages", "prompt", "stop", "stream", "stream_options", "max_tokens", "temperature", "top_k", "seed", "n", "x"]
)


@given(fields=st.dictionaries(FIELDS, JSON, max_size=4))
def test_no_body_makes_it_stumble(fields: dict[str, Any]) -> None:
    for parse in (chat_request, completion_request):
        body = parse_json(json.dumps({"model": "tiny", "messages": HELLO, "prompt": "p", **fields}).encode())
        # Anything but an ApiError fails the test.
        with contextlib.suppress(ApiError):
            assert parse(body, CARD).model == "tiny"
