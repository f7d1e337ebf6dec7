"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_model import CARD, CONTEXT, inner, tokenizer
from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.api.token_api import detokenize, tokenize
from tandem.gateway.errors import ApiError
from tandem.models.tokenizer import BOS

HELLO = [{"role": "user", "content": "hello"}]


def tokens(**body: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenize(body, CARD, tokenizer()))
    return found


def text(ids: list[int]) -> str:
    found: dict[str, str] = json.loads(detokenize({"model": "tiny", "tokens": ids}, CARD, tokenizer()))
    return found["prompt"]


def test_a_text_has_the_tokens_that_a_completion_gets() -> None:
    ids = tokenizer().encode("hello world")
    assert tokens(model="tiny", prompt="hello world") == {
        "count": len(ids),
        "max_model_len": CONTEXT,
        "tokens": ids,
        "token_strs": None,
    }


def test_the_special_tokens_around_it_can_be_left_out() -> None:
    with_them, without = tokens(prompt="hello"), tokens(prompt="hello", add_special_tokens=False)
    assert with_them["tokens"] == [inner().token_to_id(BOS), *without["tokens"]]


def test_a_conversation_has_the_tokens_that_the_chat_endpoint_sends() -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    found = tokens(messages=HELLO, tools=[tool], add_generation_prompt=True)
    assert found["tokens"] == tokenizer().chat(HELLO, [tool]).ids


def test_each_tokens_string_is_told_if_asked_for() -> None:
    found = tokens(prompt="hello é", return_token_strs=True)
    assert [inner().token_to_id(token) for token in found["token_strs"]] == found["tokens"]


@given(words=st.text(max_size=20))
def test_what_is_tokenized_can_be_detokenized(words: str) -> None:
    assert text(tokens(prompt=words, add_special_tokens=False)["tokens"]) == words


def test_special_tokens_are_part_of_the_text() -> None:
    assert text(tokens(prompt="hello")["tokens"]) == BOS + "hello"


@given(ids=st.lists(st.integers(0, CARD.vocab_size - 1), max_size=20))
def test_any_tokens_have_the_text_that_the_tokenizer_gives_them(ids: list[int]) -> None:
    assert text(ids) == inner().decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "x", "messages": HELLO}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": "x", "foo": 1}, "foo"),
        ({"prompt": "x", "add_special_tokens": 1}, "add_special_tokens"),
        ({"prompt": "x", "return_token_strs": "yes"}, "return_token_strs"),
        ({"prompt": "x", "model": 5}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": HELLO, "temperature": 1}, "temperature"),
        ({"messages": HELLO, "add_generation_prompt": False}, "add_generation_prompt"),
        ({"messages": HELLO, "tools": [{}]}, "tools[0].type"),
    ],
)
def test_what_cannot_be_tokenized_is_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        tokenize(body, CARD, tokenizer())
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("ids", [None, "x", [1.5], [True], [-1], [CARD.vocab_size], [10**30], [[1]]])
def test_what_is_no_token_is_refused(ids: Any) -> None:
    with pytest.raises(ApiError) as caught:
        detokenize({"tokens": ids}, CARD, tokenizer())
    assert (caught.value.status, caught.value.param) == (400, "tokens")


def test_another_model_is_not_found() -> None:
    with pytest.raises(ApiError) as caught:
        tokenize({"model": "gpt", "prompt": "x"}, CARD, tokenizer())
    assert caught.value.status == 404
