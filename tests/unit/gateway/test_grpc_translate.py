"""Requests of `tandem.v1.Inference` as the HTTP API's bodies."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import pytest
from gateway_model import CARD
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.api.params import SAMPLING
from tandem.gateway.api.requests import CHAT_FIELDS, COMPLETION_FIELDS, chat_request, completion_request
from tandem.gateway.errors import ApiError
from tandem.gateway.rpc.translate import chat_body, generate_body
from tandem.v1 import inference_pb2 as pb

SAID_OTHERWISE = {
    "stream_options": "the usage is always told",
    "max_completion_tokens": "max_tokens",
    "service_tier": "priority",
    "best_of": "n",
    "echo": "the client has its prompt",
    "spaces_between_special_tokens": "it has no effect",
    "enable_thinking": "thinking",
    "thinking_budget": "thinking",
    "reasoning_effort": "thinking",
    "chat_template_kwargs": "thinking",
}
"""Fields of the HTTP API without a namesake in gRPC, and what does their work there."""


def options(**fields: Any) -> pb.Options:
    """Every option set, to a value that is not its default."""
    sampling = pb.Sampling(
        temperature=0.5,
        top_p=0.25,
        top_k=7,
        min_p=0.125,
        frequency_penalty=-0.5,
        presence_penalty=0.5,
        repetition_penalty=1.5,
        seed=-3,
        logit_bias={4: -1.5},
    )
    return pb.Options(
        sampling=sampling,
        max_tokens=9,
        n=2,
        stop=["a"],
        logprobs=3,
        priority=pb.PRIORITY_LOW,
        user="u",
        metadata={"a": "b"},
        return_token_ids=True,
        ignore_eos=True,
        stop_token_ids=[5],
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        prompt_cache_key="k",
        **fields,
    )


def chat(**fields: Any) -> pb.ChatRequest:
    """A chat with everything set."""
    schema = pb.JsonSchema(name="s", schema='{"type": "object"}', description="d", strict=True)
    tool = pb.FunctionDefinition(name="sky", description="d", parameters='{"type": "object"}', strict=False)
    values: dict[str, Any] = {
        "model": "tiny",
        "messages": [pb.Message(role=pb.MESSAGE_ROLE_USER, content="hi")],
        "options": options(response_format=pb.ResponseFormat(json_schema=schema)),
        "tools": [pb.Tool(function=tool)],
        "tool_choice": pb.ToolChoice(mode=pb.TOOL_MODE_AUTO),
        "parallel_tool_calls": False,
        "thinking": pb.Thinking(enabled=True, budget_tokens=4),
    }
    return pb.ChatRequest(**{**values, **fields})


def said(request: pb.ChatRequest) -> dict[str, Any]:
    return {name: value for name, value in chat_body(request).items() if name not in ("model", "stream", "messages")}


def test_whatever_http_can_say_of_a_chat_grpc_can_say() -> None:
    forms = {"regex", "ebnf"}
    assert (
        CHAT_FIELDS | SAMPLING.keys() == chat_body(chat()).keys() | SAID_OTHERWISE.keys() - {"best_of", "echo"} | forms
    )


def test_whatever_http_can_say_of_a_completion_grpc_can_say() -> None:
    form = pb.ResponseFormat(json_object=pb.JsonObject())
    body = generate_body(
        pb.GenerateRequest(model="tiny", prompt=pb.Prompt(text="a"), options=options(response_format=form))
    )
    assert (COMPLETION_FIELDS | SAMPLING.keys()) - body.keys() - SAID_OTHERWISE.keys() == {"regex", "ebnf"}
    assert body.keys() <= COMPLETION_FIELDS | SAMPLING.keys()


def test_a_chat_with_everything_set_passes_the_checks_of_http() -> None:
    wanted = chat_request(chat_body(chat()), CARD)
    assert (wanted.n, wanted.max_tokens, wanted.logprobs, wanted.stops) == (2, 9, 3, ("a",))
    assert (wanted.thinking, wanted.parallel_tool_calls, wanted.return_token_ids) == ((True, 4), False, True)
    assert (wanted.user, wanted.metadata, wanted.session) == ("u", {"a": "b"}, "k")
    assert wanted.sampling["sampling_seed"] == -3


def test_a_completion_with_everything_set_passes_the_checks_of_http() -> None:
    form = pb.ResponseFormat(regex="a+")
    prompt = pb.Prompt(token_ids=pb.TokenIds(ids=[1, 2]))
    request = pb.GenerateOnceRequest(model="tiny", prompt=prompt, options=options(response_format=form))
    wanted = completion_request(generate_body(request), CARD)
    assert (wanted.prompts, wanted.n, wanted.logprobs, wanted.stream) == (([1, 2],), 2, 3, False)


def test_what_is_not_set_is_not_said() -> None:
    message = pb.Message(role=pb.MESSAGE_ROLE_USER, content="")
    empty = pb.ChatRequest(messages=[message], options=pb.Options(sampling=pb.Sampling()), tool_choice=pb.ToolChoice())
    assert chat_body(empty) == {"stream": True, "messages": [{"role": "user", "content": ""}]}
    assert generate_body(pb.GenerateOnceRequest()) == {"stream": False}


def test_what_is_set_to_nought_is_said() -> None:
    sampling = pb.Sampling(temperature=0.0, top_k=0, seed=0)
    limits = pb.Options(sampling=sampling, max_tokens=0, n=0, logprobs=0, ignore_eos=False)
    body = generate_body(pb.GenerateRequest(prompt=pb.Prompt(text=""), options=limits))
    assert body == {
        "stream": True,
        "prompt": "",
        "temperature": 0.0,
        "top_k": 0,
        "seed": 0,
        "max_tokens": 0,
        "n": 0,
        "logprobs": 0,
        "ignore_eos": False,
    }


@pytest.mark.parametrize(
    ("thinking", "body"),
    [
        (pb.Thinking(enabled=True), {"type": "enabled"}),
        (pb.Thinking(enabled=False), {"type": "disabled"}),
        (pb.Thinking(budget_tokens=5), {"type": "adaptive", "budget_tokens": 5}),
        (pb.Thinking(), {"type": "adaptive"}),
    ],
)
def test_thinking_is_said_as_far_as_it_is_set(thinking: pb.Thinking, body: dict[str, Any]) -> None:
    assert chat_body(chat(thinking=thinking))["thinking"] == body


def test_a_schema_keeps_the_order_of_its_keys_and_its_integers() -> None:
    text = '{"z": 1, "a": {"minimum": 3, "maximum": 9007199254740993}}'
    tool = pb.Tool(function=pb.FunctionDefinition(name="f", parameters=text))
    schema = said(chat(tools=[tool]))["tools"][0]["function"]["parameters"]
    assert (list(schema), schema["a"]["maximum"], type(schema["z"])) == (["z", "a"], 9007199254740993, int)


@pytest.mark.parametrize("field", ["temperature", "top_p", "repetition_penalty"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_cannot_say_is_refused(field: str, value: float) -> None:
    request = pb.GenerateRequest(options=pb.Options(sampling=pb.Sampling(**{field: value})))
    with pytest.raises(ApiError) as caught:
        generate_body(request)
    assert (caught.value.status, caught.value.param) == (400, field)


def test_a_bias_that_json_cannot_say_is_refused() -> None:
    request = pb.GenerateRequest(options=pb.Options(sampling=pb.Sampling(logit_bias={3: math.nan})))
    with pytest.raises(ApiError, match="logit_bias"):
        generate_body(request)


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (chat(messages=[pb.Message(content="hi")]), "messages[0].role"),
        (chat(messages=[pb.Message(role=77, content="hi")]), "messages[0].role"),
        (chat(options=pb.Options(priority=77)), "priority"),
        (chat(tool_choice=pb.ToolChoice(mode=77)), "tool_choice"),
        (chat(tools=[pb.Tool(function=pb.FunctionDefinition(parameters="{"))]), "tools[0].function.parameters"),
        (
            chat(tools=[pb.Tool(function=pb.FunctionDefinition(parameters="[" * 100_000))]),
            "tools[0].function.parameters",
        ),
        (
            chat(options=pb.Options(response_format=pb.ResponseFormat(json_schema=pb.JsonSchema(name="s")))),
            "response_format.json_schema.schema",
        ),
    ],
)
def test_what_json_could_not_say_is_refused_by_its_name(request_: pb.ChatRequest, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat_body(request_)
    assert (caught.value.status, caught.value.param) == (400, param)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=4), st.integers(0, 3))
def test_a_damaged_request_is_unreadable_or_a_body_or_an_api_error(damage: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(chat().SerializeToString())
    for place, value in damage:
        data[place % len(data)] = value
    with contextlib.suppress(DecodeError, ApiError):
        body = chat_body(pb.ChatRequest.FromString(bytes(data[: len(data) - cut])))
        json.dumps(body, allow_nan=False)
