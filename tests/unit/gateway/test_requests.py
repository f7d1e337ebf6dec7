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

from tandem.core.tenants import Priority
from tandem.gateway.api.params import HARMLESS, SAMPLING
from tandem.gateway.api.requests import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    Wanted,
    chat_request,
    check_length,
    completion_request,
    parse_json,
)
from tandem.gateway.errors import ApiError

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
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"n": 129}, "n", "integer_above_max_value"),
        ({"n": True}, "n", "invalid_type"),
        ({"logprobs": 1}, "logprobs", "invalid_type"),
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "decimal_above_max_value"),
        ({"logit_bias": {"1024": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"²": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": [1]}, "logit_bias", "invalid_type"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "invalid_type"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "unsupported_parameter"),
        ({"response_format": {}}, "response_format.type", "invalid_type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "invalid_type"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "description": []}}},
            "response_format.json_schema.description",
            "invalid_type",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
            "response_format.json_schema.name",
            "invalid_value",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "thing"}}}},
            "response_format.json_schema.schema",
            "invalid_json_schema",
        ),
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "regex", "invalid_value"),
        ({"regex": ""}, "regex", "invalid_value"),
        ({"reasoning_effort": "utmost"}, "reasoning_effort", "invalid_value"),
        ({"reasoning_effort": "none", "enable_thinking": True}, "enable_thinking", "invalid_value"),
        ({"thinking": {"type": "maybe"}}, "thinking.type", "invalid_value"),
        ({"thinking": {"type": "enabled", "depth": 1}}, "thinking.depth", "unsupported_parameter"),
        ({"thinking_budget": -1}, "thinking_budget", "integer_below_min_value"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools", "unsupported_parameter"),
        ({"metadata": {"a": 1}}, "metadata.a", "invalid_type"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "object_above_max_properties"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a", "string_above_max_length"),
        ({"service_tier": "gold"}, "service_tier", "invalid_value"),
        ({"priority": "first"}, "priority", "invalid_value"),
        ({"priority": 1.5}, "priority", "invalid_type"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"min_tokens": 3}, "min_tokens", "unsupported_parameter"),
        ({"suffix": "x"}, "suffix", "unsupported_parameter"),
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
    nothing = {
        "n": 1, "logprobs": False, "top_logprobs": 0, "tools": [], "tool_choice": "none", "user": "u", "logit_bias": {},
        "response_format": {"type": "text"}, "metadata": {"a": "b"}, "store": False, "service_tier": "auto",
        "parallel_tool_calls": True, "min_tokens": 0, "verbosity": "medium", "chat_template_kwargs": {},
    }  # fmt: skip
    without = {"service_tier": None, "user": "", "metadata": {}}
    assert msgspec.structs.replace(chat(**nothing), **without) == chat()


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


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("hi", ("hi",)),
        (["hi"], ("hi",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ([1, 2],)),
        ([[1, 2]], ([1, 2],)),
        ([[1], [2, 3]], ([1], [2, 3])),
    ],
)
def test_a_prompt_may_be_text_or_token_ids_or_several_of_them(prompt: Any, prompts: Any) -> None:
    assert completion(prompt=prompt).prompts == prompts


@pytest.mark.parametrize("prompt", [None, 5, [], [1, "a"], ["a", 1], ["a", [1]], [1, True], [-1], [1024], {"a": 1}])
def test_any_other_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(ApiError) as caught:
        completion(prompt=prompt)
    assert (caught.value.status, caught.value.param) == (400, "prompt")


def test_each_prompt_is_answered_n_times() -> None:
    assert completion(prompt=["a", "b"], n=3).choices == 6
    assert chat(n=3).choices == 3
    with pytest.raises(ApiError) as caught:
        completion(prompt=["a", "b"], n=65)
    assert (caught.value.param, caught.value.code) == ("n", "array_above_max_length")


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"best_of": 2}, "best_of"), ({"echo": True, "logprobs": 0}, "echo"), ({"logprobs": 21}, "logprobs")],
)
def test_what_a_completion_cannot_have_is_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        completion(**fields)
    assert (caught.value.status, caught.value.param) == (400, param)


def test_a_completions_logprobs_are_a_number() -> None:
    assert [completion(logprobs=value).logprobs for value in (None, False, 0, 5)] == [None, None, 0, 5]
    assert completion(best_of=2, n=2).n == 2


def test_logprobs_are_asked_of_the_engine_only_when_wanted() -> None:
    assert chat().engine == {}
    assert chat(logprobs=True).engine == {"return_logprob": True, "top_logprobs_num": 0}
    assert chat(logprobs=True, top_logprobs=4).engine == {"return_logprob": True, "top_logprobs_num": 4}


def test_biases_and_stop_tokens_reach_the_engine() -> None:
    wanted = chat(logit_bias={"5": -100, "007": 1}, stop_token_ids=[3])
    assert wanted.sampling == {"logit_bias": {"5": -100, "7": 1}, "stop_token_ids": [3]}


@pytest.mark.parametrize(
    ("fields", "priority"),
    [
        ({}, None),
        ({"service_tier": "auto"}, None),
        ({"service_tier": "priority"}, Priority.HIGH),
        ({"service_tier": "flex"}, Priority.LOW),
        ({"priority": -1}, Priority.HIGH),
        ({"priority": 0}, Priority.NORMAL),
        ({"priority": 7}, Priority.LOW),
        ({"priority": "low", "service_tier": "priority"}, Priority.LOW),
    ],
)
def test_a_request_may_name_its_class(fields: dict[str, Any], priority: Priority | None) -> None:
    assert chat(**fields).priority == priority


@pytest.mark.parametrize(
    ("fields", "thinking"),
    [
        ({}, (None, None)),
        ({"thinking": {"type": "disabled"}}, (False, None)),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, (True, 5)),
        ({"thinking_budget": 0}, (None, 0)),
        ({"reasoning_effort": "none"}, (False, None)),
        ({"reasoning_effort": "low"}, (None, 2048)),
        ({"reasoning_effort": "high"}, (None, None)),
        ({"reasoning_effort": "low", "thinking_budget": 9}, (None, 9)),
        ({"chat_template_kwargs": {"thinking": True}}, (True, None)),
    ],
)
def test_thinking_is_understood_in_every_apis_words(fields: dict[str, Any], thinking: tuple[Any, Any]) -> None:
    assert tuple(chat(**fields).thinking) == thinking


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL]}]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([*HELLO, {"role": "tool", "content": "1", "tool_call_id": "c"}], "messages[1].role"),
        ([*CALLED, {"role": "tool", "content": "1"}], "messages[2].tool_call_id"),
        ([*CALLED, {"role": "tool", "content": "1", "tool_call_id": "d"}], "messages[2].tool_call_id"),
        ([{"role": "user", "content": "x", "tool_calls": [CALL]}], "messages[0].tool_calls"),
        ([{"role": "user", "content": "x", "colour": "red"}], "messages[0].colour"),
        ([{"role": "assistant", "content": "x", "prefix": True}, *HELLO], "messages[0].prefix"),
        ([{"role": "assistant", "content": "x", "prefix": 1}], "messages[0].prefix"),
    ],
)
def test_messages_that_make_no_sense_are_refused(messages: Any, param: str) -> None:
    error = refused(messages=messages)
    assert (error.status, error.param) == (400, param)


def test_old_reasoning_is_left_out_but_that_of_a_begun_answer_stays() -> None:
    old = {"role": "assistant", "content": "x", "reasoning_content": "old"}
    assert chat(messages=[*HELLO, old]).messages == [*HELLO, {"role": "assistant", "content": "x"}]
    wanted = chat(messages=[*HELLO, {**old, "prefix": True}])
    assert wanted.prefix
    assert wanted.messages == [*HELLO, {"role": "assistant", "content": "x", "reasoning_content": "old"}]


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
FIELDS = st.sampled_from(sorted(CHAT_FIELDS | COMPLETION_FIELDS | set(SAMPLING) | set(HARMLESS) | {"x"}))


@given(fields=st.dictionaries(FIELDS, JSON, max_size=4))
def test_no_body_makes_it_stumble(fields: dict[str, Any]) -> None:
    for parse in (chat_request, completion_request):
        body = parse_json(json.dumps({"model": "tiny", "messages": HELLO, "prompt": "p", **fields}).encode())
        # Anything but an ApiError fails the test.
        with contextlib.suppress(ApiError):
            assert parse(body, CARD).model == "tiny"
