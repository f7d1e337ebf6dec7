"""The tiny model's tokenizer and conversation format, with the `tokenizers` library and plain Jinja."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from tandem.models.bpe import learn_merges
from tandem.models.tokenizer import BOS, FIRST, LAST, SPECIAL_IDS, VOCAB_SIZE, chat_template, tokenizer_json


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(json.dumps(tokenizer_json()))


def ids(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False).ids)


def conversation(*messages: Mapping[str, object], prompt: bool = True, **values: object) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(chat_template())
    return template.render(messages=messages, bos_token=BOS, add_generation_prompt=prompt, **values)


def user(content: str) -> dict[str, object]:
    return {"role": "user", "content": content}


def call(name: str, arguments: object) -> dict[str, object]:
    return {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}


def test_the_tokenizer_is_the_same_everywhere() -> None:
    digest = hashlib.sha256(json.dumps(tokenizer_json(), sort_keys=True).encode()).hexdigest()
    assert digest == "f43d6388f4d5c0f711d67e2d79adda96327560f9bd859913ad72c9b7437bd422"


def test_every_id_of_the_vocabulary_is_used_once() -> None:
    assert tokenizer().get_vocab_size() == VOCAB_SIZE
    assert sorted(tokenizer().get_vocab().values()) == list(range(VOCAB_SIZE))


@pytest.mark.parametrize("token", [token.text for token in (*FIRST, *LAST)])
def test_a_special_token_is_one_id_anywhere_in_the_text(token: str) -> None:
    assert tokenizer().token_to_id(token) == SPECIAL_IDS[token]
    assert ids(f"a{token}b").count(SPECIAL_IDS[token]) == 1


@given(st.text())
def test_any_text_comes_back_as_it_was(text: str) -> None:
    assert tokenizer().decode(ids(text), skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["🚲👩‍👩‍👧", "你好,世界", "e\u0301", "مرحبا", "\r\n\t \x00", "  two  blanks ", "١٢٣٤"])
def test_other_scripts_and_signs_come_back_as_they_were(text: str) -> None:
    assert tokenizer().decode(ids(text)) == text


def test_a_text_begins_with_the_begin_token_unless_asked_not_to() -> None:
    assert tokenizer().encode("hi").ids == [SPECIAL_IDS[BOS], *ids("hi")]


def test_reasoning_marks_are_text_and_sentence_marks_are_not() -> None:
    assert tokenizer().decode(ids(f"{BOS}<think>so</think>")) == "<think>so</think>"


def test_common_words_are_one_token() -> None:
    assert len(ids(" the")) == len(ids(" and")) == 1


def test_numbers_are_cut_after_three_digits() -> None:
    pieces = tokenizer().encode("1000000", add_special_tokens=False).offsets
    assert not any(start < cut < end for start, end in pieces for cut in (3, 6))


def test_merges_are_learned_by_frequency_then_alphabet() -> None:
    assert learn_merges("xb xb xb cd cd", 3) == [("x", "b"), ("c", "d"), ("Ġ", "cd")]


def test_too_short_a_text_cannot_teach_many_tokens() -> None:
    with pytest.raises(ValueError, match="give a longer one"):
        learn_merges("abab", 5)


def test_a_question_opens_the_answers_reasoning() -> None:
    assert conversation(user("Hi")) == f"{BOS}<｜User｜>Hi<｜Assistant｜><think>\n"


def test_system_messages_come_first_wherever_they_stand() -> None:
    text = conversation(
        {"role": "system", "content": "A"}, user("Hi"), {"role": "system", "content": "B"}, prompt=False
    )
    assert text == f"{BOS}A\n\nB<｜User｜>Hi"


def test_the_reasoning_of_earlier_answers_is_left_out() -> None:
    answer = {"role": "assistant", "content": "<think>\n1+1\n</think>\n\nTwo."}
    assert conversation(user("1+1?"), answer, user("Sure?")) == (
        f"{BOS}<｜User｜>1+1?<｜Assistant｜>\n\nTwo.<｜end▁of▁sentence｜><｜User｜>Sure?<｜Assistant｜><think>\n"
    )


def test_tool_calls_and_outputs_are_one_turn() -> None:
    asked = {"role": "assistant", "content": None, "tool_calls": [call("f", '{"a": 1}'), call("g", {"b": 2})]}
    outputs = ({"role": "tool", "content": "one"}, {"role": "tool", "content": "two"})
    assert conversation(user("Do"), asked, *outputs) == (
        f"{BOS}<｜User｜>Do<｜Assistant｜><｜tool▁calls▁begin｜>"
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": 1}\n```<｜tool▁call▁end｜>\n'
        '<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{"b": 2}\n```<｜tool▁call▁end｜>'
        "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>one<｜tool▁output▁end｜>"
        "<｜tool▁output▁begin｜>two<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )


def test_the_answer_to_tool_outputs_goes_on_in_the_same_turn() -> None:
    asked = {"role": "assistant", "content": None, "tool_calls": [call("f", "{}")]}
    rounds: list[Mapping[str, object]] = [
        asked,
        {"role": "tool", "content": "x"},
        {"role": "assistant", "content": "Done."},
    ]
    text = conversation(user("Do"), *rounds, user("Again"), *rounds, prompt=False)
    one = text.split("<｜User｜>Again")[1]
    assert text.count(one) == 2
    assert one.endswith("<｜tool▁outputs▁end｜>Done.<｜end▁of▁sentence｜>")


def test_tools_are_listed_in_the_system_prompt() -> None:
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    text = conversation({"role": "system", "content": "A"}, user("Hi"), tools=tools)
    assert text.startswith(f'{BOS}A\n\n## Tools\nThese functions can be called:\n{{"name": "get_weather"}}\n')
    assert text.endswith("<｜User｜>Hi<｜Assistant｜><think>\n")
