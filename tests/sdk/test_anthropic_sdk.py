"""The official `anthropic` package."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

HELLO: list[Any] = [{"role": "user", "content": "What is one and one?"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
TOOL: Any = {"name": "choose", "description": "Chooses.", "input_schema": SCHEMA, "strict": True}
OFF: Any = {"type": "disabled"}
GREEDY = {"temperature": 0}
"""The SDK does not name it any more, but passes it on."""


@pytest.fixture(scope="module")
def client(url: str, key: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=60) as made:
        yield made


def test_a_message_is_answered(client: anthropic.Anthropic, model: str) -> None:
    found = client.messages.create(model=model, max_tokens=16, messages=HELLO, system="Be brief.", extra_body=GREEDY)
    assert found.stop_reason in ("end_turn", "max_tokens")
    assert {block.type for block in found.content} <= {"thinking", "text"}
    assert found.usage.output_tokens <= 16
    type(found).model_validate(found.model_dump())


def test_a_stream_says_what_the_whole_message_says(client: anthropic.Anthropic, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "max_tokens": 24, "messages": HELLO, "extra_body": GREEDY}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert [_seen(block) for block in streamed.content] == [_seen(block) for block in whole.content]
    assert (streamed.stop_reason, streamed.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def _seen(block: Any) -> dict[str, Any]:
    """A block without what differs from answer to answer."""
    return {name: value for name, value in block.to_dict().items() if name not in ("signature", "parsed_output", "id")}


def test_thinking_goes_back_into_the_conversation(client: anthropic.Anthropic, model: str) -> None:
    first = client.messages.create(model=model, max_tokens=24, messages=HELLO)
    turns = [*HELLO, first.to_param(), {"role": "user", "content": "Sure?"}]
    assert client.messages.create(model=model, max_tokens=4, messages=turns).role == "assistant"


def test_thinking_is_switched_off_or_bounded(client: anthropic.Anthropic, model: str) -> None:
    off = client.messages.create(model=model, max_tokens=16, messages=HELLO, thinking=OFF)
    assert "thinking" not in {block.type for block in off.content}
    budget: Any = {"type": "enabled", "budget_tokens": 4}
    bounded = client.messages.create(model=model, max_tokens=32, messages=HELLO, thinking=budget)
    details = bounded.usage.output_tokens_details
    assert details is not None
    assert details.thinking_tokens < 32


def test_a_tool_is_used_and_its_result_read(client: anthropic.Anthropic, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "max_tokens": 256, "tools": [TOOL], "thinking": OFF}
    found = client.messages.create(**asked, messages=HELLO, tool_choice={"type": "any"})
    assert found.stop_reason == "tool_use"
    use = next(block for block in found.content if block.type == "tool_use")
    assert (use.name, set(use.input)) == ("choose", {"a"})
    result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": "done"}
    turns = [*HELLO, found.to_param(), {"role": "user", "content": [result]}]
    assert client.messages.create(**{**asked, "max_tokens": 4}, messages=turns).role == "assistant"


def test_a_tools_input_streams(client: anthropic.Anthropic, model: str) -> None:
    with client.messages.stream(
        model=model, max_tokens=256, messages=HELLO, tools=[TOOL], tool_choice={"type": "tool", "name": "choose"},
        thinking=OFF,
    ) as stream:  # fmt: skip
        use = next(block for block in stream.get_final_message().content if block.type == "tool_use")
    assert set(use.input) == {"a"}


def test_a_stop_sequence_ends_the_answer_and_is_named(client: anthropic.Anthropic, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "max_tokens": 24, "messages": HELLO, "thinking": OFF, "extra_body": GREEDY}
    block = client.messages.create(**asked).content[0]
    assert block.type == "text"
    stop = block.text[len(block.text) // 2 :][:3]
    if not stop.strip():
        pytest.skip("the model wrote only blanks there")
    found = client.messages.create(**asked, stop_sequences=[stop])
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", stop)


def test_tokens_are_counted(client: anthropic.Anthropic, model: str) -> None:
    counted = client.messages.count_tokens(model=model, messages=HELLO).input_tokens
    usage = client.messages.create(model=model, max_tokens=1, messages=HELLO).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_errors_are_the_sdks_own(client: anthropic.Anthropic, model: str) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="no-such-model", max_tokens=4, messages=HELLO)
    assert missing.value.type == "not_found_error"
    with pytest.raises(anthropic.BadRequestError, match="foo: Extra inputs are not permitted"):
        client.messages.create(model=model, max_tokens=4, messages=HELLO, extra_body={"foo": 1})
    image: Any = {"type": "image", "source": {"type": "url", "url": "https://example.com/a.png"}}
    with pytest.raises(anthropic.BadRequestError, match="reads text only"):
        client.messages.create(model=model, max_tokens=4, messages=[{"role": "user", "content": [image]}])


async def _text(url: str, key: str, model: str) -> str:
    async with (
        anthropic.AsyncAnthropic(base_url=url, api_key=key, max_retries=0, timeout=60) as client,
        client.messages.stream(model=model, max_tokens=8, messages=HELLO, thinking=OFF) as stream,
    ):
        return "".join([text async for text in stream.text_stream])


def test_the_async_client_streams_text(url: str, key: str, model: str) -> None:
    assert isinstance(asyncio.run(_text(url, key, model)), str)
