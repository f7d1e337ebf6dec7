"""`litellm`, which many applications call providers through: as an OpenAI and as an Anthropic server."""

from __future__ import annotations

import json
from typing import Any

import litellm
import pytest

HELLO: list[Any] = [{"role": "user", "content": "What is one and one?"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "choose", "description": "Chooses.", "parameters": SCHEMA, "strict": True},
}


@pytest.fixture(params=["openai", "anthropic"])
def asked(request: pytest.FixtureRequest, url: str, key: str, model: str) -> dict[str, Any]:
    """What every call has."""
    base = f"{url}/v1" if request.param == "openai" else url
    return {"model": f"{request.param}/{model}", "api_base": base, "api_key": key, "timeout": 60, "num_retries": 0}


def test_a_chat_is_answered(asked: dict[str, Any]) -> None:
    found = litellm.completion(messages=HELLO, max_tokens=16, temperature=0, **asked)
    assert found.choices[0].finish_reason in ("stop", "length")
    assert 0 < found.usage.completion_tokens <= 16


def test_a_stream_says_what_the_whole_answer_says(asked: dict[str, Any]) -> None:
    whole = litellm.completion(messages=HELLO, max_tokens=24, temperature=0, **asked)
    chunks = list(litellm.completion(messages=HELLO, max_tokens=24, temperature=0, stream=True, **asked))
    built = litellm.stream_chunk_builder(chunks, messages=HELLO)
    for field in ("content", "reasoning_content"):
        said = [getattr(one.choices[0].message, field, None) or "" for one in (built, whole)]
        assert said[0] == said[1], field


def test_a_function_is_called(asked: dict[str, Any]) -> None:
    # litellm passes `thinking` on to models that it knows to think, or where it is told to.
    off: dict[str, Any] = {"thinking": {"type": "disabled"}, "allowed_openai_params": ["thinking"]}
    found = litellm.completion(messages=HELLO, max_tokens=512, tools=[TOOL], tool_choice="required", **off, **asked)
    call = found.choices[0].message.tool_calls[0]
    assert (call.function.name, set(json.loads(call.function.arguments))) == ("choose", {"a"})


def test_errors_are_litellms_own(asked: dict[str, Any]) -> None:
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=HELLO, max_tokens=4, temperature=9, **asked)
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(messages=HELLO, max_tokens=4, **{**asked, "model": asked["model"] + "-x"})


def test_a_response_is_made(url: str, key: str, model: str) -> None:
    found = litellm.responses(
        model=f"openai/{model}", input="Hello", max_output_tokens=8, api_base=f"{url}/v1", api_key=key
    )
    assert found.status in ("completed", "incomplete")
