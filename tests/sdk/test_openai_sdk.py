"""The official `openai` package."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

HELLO: list[Any] = [{"role": "user", "content": "What is one and one?"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
FUNCTION: dict[str, Any] = {"name": "choose", "description": "Chooses.", "parameters": SCHEMA}
NO_THINKING: dict[str, Any] = {"thinking": {"type": "disabled"}}


@pytest.fixture(scope="module")
def client(url: str, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as made:
        yield made


def test_models_are_listed_and_found(client: openai.OpenAI, model: str) -> None:
    assert [one.id for one in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model


def test_a_chat_is_answered(client: openai.OpenAI, model: str) -> None:
    found = client.chat.completions.create(model=model, messages=HELLO, max_tokens=16, temperature=0)
    assert found.choices[0].finish_reason in ("stop", "length")
    assert found.choices[0].message.role == "assistant"
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens
    assert found.usage.completion_tokens <= 16


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 24, "temperature": 0}
    message = client.chat.completions.create(**asked).choices[0].message
    content, reasoning, usage = "", "", None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        usage = chunk.usage or usage
    assert (content, reasoning) == (message.content or "", getattr(message, "reasoning_content", None) or "")
    assert usage is not None


def test_the_sdks_own_accumulator_reads_a_stream(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(model=model, messages=HELLO, max_tokens=12, temperature=0) as stream:
        try:
            for _ in stream:
                pass
            found: Any = stream.get_final_completion()
        except openai.LengthFinishReasonError as cut:
            # How the SDK says that the limit was reached.
            found = cut.completion
    assert found.choices[0].finish_reason in ("stop", "length")


def test_several_answers_and_their_logprobs(client: openai.OpenAI, model: str) -> None:
    found = client.chat.completions.create(
        model=model, messages=HELLO, max_tokens=8, n=2, seed=1, logprobs=True, top_logprobs=2, extra_body=NO_THINKING
    )
    assert [choice.index for choice in found.choices] == [0, 1]
    logprobs = found.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in logprobs.content)


def test_a_stop_string_ends_the_answer(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": HELLO, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked, extra_body=NO_THINKING).choices[0].message.content or ""
    stop = whole[len(whole) // 2 :][:3]
    found = client.chat.completions.create(**asked, stop=[stop], extra_body=NO_THINKING).choices[0]
    assert found.finish_reason == "stop"
    assert found.message.content == whole[: whole.index(stop)]


def test_a_function_is_called(client: openai.OpenAI, model: str) -> None:
    found = client.chat.completions.create(
        model=model,
        messages=HELLO,
        max_tokens=256,
        tools=[{"type": "function", "function": {**FUNCTION, "strict": True}}],
        tool_choice="required",
        extra_body=NO_THINKING,
    ).choices[0]
    assert found.finish_reason == "tool_calls"
    assert found.message.tool_calls
    call = found.message.tool_calls[0]
    assert call.type == "function"
    assert call.function.name == "choose"
    assert set(json.loads(call.function.arguments)) == {"a"}


def test_an_answer_has_the_form_that_was_asked_for(client: openai.OpenAI, model: str) -> None:
    class Choice(pydantic.BaseModel):
        a: bool

    found = client.chat.completions.parse(
        model=model, messages=HELLO, max_tokens=256, response_format=Choice, extra_body=NO_THINKING
    )
    assert isinstance(found.choices[0].message.parsed, Choice)


def test_text_is_completed(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "max_tokens": 8, "temperature": 0}
    found = client.completions.create(prompt=["One", "Two"], n=2, **asked)
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    whole = client.completions.create(prompt="One", **asked).choices[0].text
    assert (
        "".join(chunk.choices[0].text for chunk in client.completions.create(prompt="One", stream=True, **asked))
        == whole
    )


def test_a_response_is_made(client: openai.OpenAI, model: str) -> None:
    found = client.responses.create(model=model, input="Hello", max_output_tokens=16, temperature=0)
    assert found.status in ("completed", "incomplete")
    assert {item.type for item in found.output} <= {"reasoning", "message"}
    assert found.usage is not None
    assert found.usage.output_tokens <= 16
    type(found).model_validate(found.model_dump(by_alias=True))


def test_a_response_streams_what_it_would_say_whole(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "input": "Hello", "max_output_tokens": 24, "temperature": 0}
    whole = client.responses.create(**asked, reasoning={"effort": "none"})
    text, kinds, numbers = "", [], []
    for event in client.responses.create(**asked, reasoning={"effort": "none"}, stream=True):
        kinds.append(event.type)
        numbers.append(event.sequence_number)
        if event.type == "response.output_text.delta":
            text += event.delta
    assert kinds[0] == "response.created"
    assert kinds[-1] == f"response.{whole.status}"
    assert numbers == list(range(len(numbers)))
    assert text == whole.output_text


def test_the_sdks_own_accumulator_reads_a_response(client: openai.OpenAI, model: str) -> None:
    tool: Any = {"type": "function", **FUNCTION, "strict": True}
    with client.responses.stream(
        model=model, input="Hello", tools=[tool], tool_choice="required", max_output_tokens=256,
        reasoning={"effort": "none"},
    ) as stream:  # fmt: skip
        for _ in stream:
            pass
        found = stream.get_final_response()
    calls = [item for item in found.output if item.type == "function_call"]
    assert set(json.loads(calls[0].arguments)) == {"a"}


def test_tools_outputs_go_back_into_a_response(client: openai.OpenAI, model: str) -> None:
    items: Any = [
        {"role": "user", "content": "Choose."},
        {"type": "function_call", "call_id": "c1", "name": "choose", "arguments": '{"a":true}'},
        {"type": "function_call_output", "call_id": "c1", "output": "done"},
    ]
    found = client.responses.create(model=model, input=items, max_output_tokens=4)
    assert found.id.startswith("resp_")


def test_errors_are_the_sdks_own(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="no-such-model", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=model, messages=HELLO, temperature=9)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as stateful:
        client.responses.create(model=model, input="x", previous_response_id="resp_1")
    assert stateful.value.param == "previous_response_id"


def test_tokens_of_a_text_and_back(client: openai.OpenAI, url: str) -> None:
    found = client.post(f"{url}/tokenize", body={"prompt": "one two", "add_special_tokens": False}, cast_to=object)
    assert isinstance(found, dict)
    back = client.post(f"{url}/detokenize", body={"tokens": found["tokens"]}, cast_to=object)
    assert back == {"prompt": "one two"}


async def _together(url: str, key: str, model: str) -> list[str | None]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=60) as client:
        left = await client.chat.completions.create(model=model, messages=HELLO, max_tokens=400, stream=True)
        async for _ in left:
            break
        await left.close()
        asked = (client.chat.completions.create(model=model, messages=HELLO, max_tokens=4) for _ in range(4))
        return [one.choices[0].finish_reason for one in await asyncio.gather(*asked)]


def test_the_async_client_leaves_a_stream_and_asks_several_things_at_once(url: str, key: str, model: str) -> None:
    assert set(asyncio.run(_together(url, key, model))) <= {"stop", "length"}
