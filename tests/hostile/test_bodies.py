"""Valid bodies, mutated: whatever comes is answered in time with a 200 or a 4xx that says what is wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hostile_stage import MODEL, Stage, examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

WITHIN_S = 10.0
USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SAMPLING = {
    "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "stop": ["x", "yz"], "max_tokens": 4,
    "frequency_penalty": 0.1, "presence_penalty": 0.1, "repetition_penalty": 1.1, "logit_bias": {"5": 1.5},
    "user": "u", "metadata": {"a": "b"}, "priority": 1, "service_tier": "auto", "n": 2, "return_token_ids": True,
}  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "array", "items": {"enum": [1, 2]}}}}
CHAT = {
    "model": MODEL,
    "messages": [
        {"role": "system", "content": "s"},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "r"},
        {"role": "tool", "tool_call_id": "c1", "content": "out"},
        {"role": "user", "content": [{"type": "text", "text": "part"}]},
    ],
    "tools": [TOOL],
    "tool_choice": "auto",
    "logprobs": True,
    "top_logprobs": 2,
    "thinking": {"type": "enabled", "budget_tokens": 10},
    **SAMPLING,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
BLOCKS = [
    {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "out"}]},
]
MESSAGES = {
    "model": MODEL,
    "max_tokens": 2000,
    "messages": BLOCKS,
    "system": [{"type": "text", "text": "s"}],
    "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA}],
    "tool_choice": {"type": "auto"},
    "stop_sequences": ["x"],
    "thinking": {"type": "enabled", "budget_tokens": 1024},
    "metadata": {"user_id": "u"},
}
RESPONSES = {
    "model": MODEL,
    "input": [
        {"role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "out"},
    ],
    "instructions": "be",
    "max_output_tokens": 16,
    "tools": [{"type": "function", "name": "f", "parameters": SCHEMA}],
    "reasoning": {"effort": "low"},
    "text": {"format": {"type": "text"}},
    "metadata": {"a": "b"},
}
VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", {"model": MODEL, "messages": [USER], "response_format": FORMAT, "stream": True}),
    ("/v1/completions", {"model": MODEL, "prompt": ["a", "b"], "logprobs": 1, **SAMPLING}),
    ("/v1/completions", {"model": MODEL, "prompt": [[5, 6], [7]], "stream": True, "echo": True}),
    ("/v1/messages", MESSAGES),
    ("/v1/messages", {"model": MODEL, "max_tokens": 4, "messages": [USER], "stream": True}),
    ("/v1/messages/count_tokens", {"model": MODEL, "messages": BLOCKS}),
    ("/v1/responses", RESPONSES),
    ("/v1/responses", {"model": MODEL, "input": "hi", "max_output_tokens": 16, "stream": True}),
    ("/tokenize", {"model": MODEL, "prompt": "hi", "add_special_tokens": True, "return_token_strs": True}),
    ("/tokenize", {"model": MODEL, "messages": [USER], "tools": [TOOL]}),
    ("/detokenize", {"model": MODEL, "tokens": [5, 6, 7]}),
]
KEYS = sorted({"", "type", "role", "\u0000", "😀", "a" * 500, "ﬁeld", "model ", "__class__", "prompt", "messages"})


def nested(opening: str, closing: str, depth: int) -> str:
    return opening * depth + closing * depth


# Pieces of JSON text, so that they may be what no JSON library would write.
SCALARS = st.one_of(
    st.sampled_from(
        ["null", "true", "false", "0", "-1", "1e400", "-1e400", "NaN", "-Infinity", "1e-400", "0.5", "-0.0", "[]", "{}"]
    ),
    st.sampled_from(
        ["9" * 5000, "-" + "9" * 400, str(2**31), str(2**63), str(2**64), str(-(2**63) - 1), "1" + "0" * 308]
    ),
    st.sampled_from(
        ['"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"\ufeff"', '"<think>"', '"<｜User｜>"', '"\u202e"']
    ),
    st.sampled_from(['"{"', '"{{ 7 * 7 }}"', '"(a+)+$"', '"["', '"' + "a" * 5000 + '"', '"' + "é😀" * 50_000 + '"']),
    st.builds(nested, st.just("["), st.just("]"), st.sampled_from([3, 50, 300, 900, 1100, 5000, 200_000])),
    st.builds(
        lambda depth: '{"type":"object","properties":{"a":' * depth + "{}" + "}}" * depth,
        st.sampled_from([3, 30, 100, 240, 300, 400, 480, 600, 5000]),
    ),
    st.builds(
        lambda depth: '{"type":"array","items":' * depth + "{}" + "}" * depth,
        st.sampled_from([3, 100, 240, 480, 900, 990, 5000]),
    ),
    st.sampled_from(['["a",1]', '{"a":1,"a":2}', "[[[1]]]", '[{"type":"text","text":"t"}]', '{"type":"object"}']),
    st.text(max_size=20).map(json.dumps),
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=8,
    ).map(json.dumps),
)


def places(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """Every place in a body."""
    yield at
    pairs: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        yield from places(inner, (*at, key))


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """(path, body): a valid one with a few mutations, most of which leave it JSON."""
    path, body = draw(st.sampled_from(VALID))
    body = copy.deepcopy(body)
    marks: dict[str, str] = {}
    for number in range(draw(st.integers(1, 3))):
        at = draw(st.sampled_from(list(places(body))[1:]))
        holder: Any = body
        for key in at[:-1]:
            holder = holder[key]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "drop", "rename", "add", "repeat"]))
        mark = f"@{number}@"
        marks[f'"{mark}"'] = draw(SCALARS)
        if kind == "replace":
            holder[at[-1]] = mark
        elif kind == "drop":
            del holder[at[-1]]
        elif kind == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(KEYS) | st.text(max_size=10))] = mark
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(KEYS) | st.text(max_size=10))] = holder.pop(at[-1])
        elif isinstance(holder, list):
            holder.extend([holder[at[-1]]] * draw(st.sampled_from([1, 200, 3000])))
        if not list(places(body))[1:]:
            break
    text = json.dumps(body, ensure_ascii=draw(st.booleans()))
    for mark, instead in marks.items():
        text = text.replace(mark, instead)
    if draw(st.integers(0, 9)) == 0:
        # A field twice.
        text = '{"model":' + draw(SCALARS) + "," + text[1:]
    data = text.encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.integers(0, len(data)))
        data = data[:place] + draw(st.binary(max_size=5)) + data[place + draw(st.integers(0, 3)) :]
    return path, data


def check_answer(path: str, status: int, answer: bytes) -> None:
    """A whole answer, or an error as this path tells them."""
    assert status == 200 or 400 <= status < 500, (status, answer[:500])
    assert status != 408, "the body was sent at once"
    if status == 200:
        # An error within a stream that has begun would be one of ours: the workers fail nothing.
        assert b'"error":{' not in answer, answer[-500:]
        return
    error = json.loads(answer)["error"]
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    assert len(answer) < 4096, "an error does not send back what it is about"
    if path.startswith("/v1/messages"):
        assert json.loads(answer)["type"] == "error"
    else:
        assert set(error) >= {"message", "type", "param", "code"}


@given(mutated=bodies())
@settings(max_examples=examples(200), suppress_health_check=list(HealthCheck), database=None)
def test_a_mutated_body_is_answered_with_200_or_a_4xx_that_says_why(gateway: Stage, mutated: tuple[str, bytes]) -> None:
    path, body = mutated
    status, answer = gateway.ask("POST", path, body, WITHIN_S)
    check_answer(path, status, answer)


@given(path=st.sampled_from(sorted({path for path, _ in VALID})), body=st.binary(max_size=300))
@settings(max_examples=examples(150), suppress_health_check=list(HealthCheck), database=None)
def test_a_body_of_random_bytes_is_a_400(gateway: Stage, path: str, body: bytes) -> None:
    status, answer = gateway.ask("POST", path, body, WITHIN_S)
    assert status == 400
    check_answer(path, status, answer)


@pytest.mark.parametrize(("path", "body"), VALID, ids=lambda value: value if isinstance(value, str) else "")
def test_the_bodies_that_are_mutated_are_valid(gateway: Stage, path: str, body: dict[str, Any]) -> None:
    status, answer = gateway.ask("POST", path, json.dumps(body).encode())
    assert status == 200, answer
    check_answer(path, status, answer)
