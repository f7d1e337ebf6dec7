"""Each choice of a reply: its prompt, its engine request, its reader."""

from __future__ import annotations

import json
from typing import Any

import pytest
from gateway_model import CARD, ids_of, tokenizer, vocabulary

from tandem.gateway.api.choices import answer_for, prompts_of, sampling_for
from tandem.gateway.api.requests import Wanted, chat_request, completion_request
from tandem.gateway.api.tools import CALLS_BEGIN, CALLS_END, ToolFormat, closing, opening
from tandem.gateway.errors import ApiError
from tandem.gateway.text.tokenize import Tokenizer
from tandem.models.tokenizer import BOS_ID

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> Wanted:
    return chat_request({"model": "tiny", "messages": HELLO, **fields}, CARD)


def sampling(wanted: Wanted, index: int = 0, *, thinking: bool = False) -> dict[str, Any]:
    return sampling_for(wanted, index, thinking=thinking, limit=9, form=ToolFormat.R1)


def grammar(wanted: Wanted, *, thinking: bool = False) -> Any:
    tag = sampling(wanted, thinking=thinking).get("structural_tag")
    return None if tag is None else json.loads(tag)["format"]


def test_every_prompt_of_a_completion_becomes_ids() -> None:
    wanted = completion_request({"model": "tiny", "prompt": [[5, 6], [7]]}, CARD)
    assert [prompt.ids for prompt in prompts_of(wanted, tokenizer())] == [[5, 6], [7]]
    wanted = completion_request({"model": "tiny", "prompt": ["hi", "ho"]}, CARD)
    assert [prompt.ids for prompt in prompts_of(wanted, tokenizer())] == [
        [BOS_ID, *ids_of(one)] for one in ("hi", "ho")
    ]


def test_tools_that_must_not_be_called_are_not_shown() -> None:
    shown, hidden = (prompts_of(chat(tools=[TOOL], tool_choice=one), tokenizer())[0] for one in ("auto", "none"))
    assert len(shown.ids) > len(hidden.ids)
    assert hidden == prompts_of(chat(), tokenizer())[0]


def test_a_model_without_a_template_cannot_chat() -> None:
    with pytest.raises(ApiError) as caught:
        prompts_of(chat(), Tokenizer(tokenizer().inner, None))
    assert (caught.value.status, caught.value.code) == (400, "model_not_chat")


def test_choices_of_one_seed_differ_and_come_again() -> None:
    wanted = chat(seed=7, n=3)
    seeds = [sampling(wanted, index)["sampling_seed"] for index in range(3)]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert all(-(2**63) <= seed < 2**63 for seed in seeds)
    assert seeds == [sampling(wanted, index)["sampling_seed"] for index in range(3)]


def test_a_prompt_among_others_is_answered_as_if_it_came_alone() -> None:
    wanted = completion_request({"model": "tiny", "prompt": ["a", "b"], "seed": 7, "n": 2}, CARD)
    seeds = [sampling(wanted, index)["sampling_seed"] for index in range(4)]
    assert seeds[:2] == seeds[2:]


def test_without_a_seed_only_several_choices_need_one() -> None:
    assert sampling(chat()) == {"max_new_tokens": 9}
    wanted = chat(n=2)
    assert sampling(wanted, 0)["sampling_seed"] != sampling(wanted, 1)["sampling_seed"]


def test_without_a_form_to_hold_there_is_no_grammar() -> None:
    assert grammar(chat(), thinking=True) is None
    assert grammar(chat(thinking_budget=5)) is None
    assert grammar(chat(tools=[TOOL])) is None


OBJECT = {"type": "json_schema", "json_schema": {"type": "object"}}


def test_a_form_holds_for_what_follows_the_reasoning() -> None:
    wanted = chat(response_format={"type": "json_object"})
    assert grammar(wanted) == OBJECT
    reasoning, _, content = grammar(wanted, thinking=True)["elements"]
    assert (reasoning["content"], reasoning["end"]) == ({"type": "any_text"}, "</think>")
    assert content == OBJECT


def test_a_budget_bounds_the_reasoning_alone() -> None:
    reasoning, content = grammar(chat(thinking_budget=5), thinking=True)["elements"]
    assert reasoning["content"] == {"type": "any_text", "max_tokens": 5}
    assert content == {"type": "any_text"}


def test_with_a_form_and_tools_the_answer_is_either() -> None:
    form = grammar(chat(response_format={"type": "json_object"}, tools=[TOOL]))
    assert form["type"] == "or"
    assert form["elements"][0] == OBJECT
    assert form["elements"][1]["begin"] == CALLS_BEGIN


def test_a_schema_reaches_the_engine_as_it_was() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
    wanted = chat(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})
    assert json.dumps(grammar(wanted)["json_schema"]) == json.dumps(schema)


@pytest.mark.parametrize(
    ("field", "value", "form"),
    [
        ("regex", "a+", {"type": "regex", "pattern": "a+"}),
        ("ebnf", "root ::= x", {"type": "grammar", "grammar": "root ::= x"}),
    ],
)
def test_other_grammars_are_taken_too(field: str, value: str, form: Any) -> None:
    assert grammar(completion(**{field: value})) == form


def completion(**fields: Any) -> Wanted:
    return completion_request({"model": "tiny", "prompt": "p", **fields}, CARD)


CALL = CALLS_BEGIN + opening("f", ToolFormat.R1) + "{}" + closing(ToolFormat.R1) + CALLS_END


@pytest.mark.parametrize(
    ("fields", "calls"),
    [
        ({}, 0),
        ({"tools": [TOOL]}, 2),
        ({"tools": [TOOL], "tool_choice": "none"}, 0),
        ({"tools": [TOOL], "parallel_tool_calls": False}, 1),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, 1),
    ],
)
def test_calls_are_read_as_the_request_wants_them(fields: dict[str, Any], calls: int) -> None:
    answer = answer_for(chat(**fields), vocabulary(), thinking=False, form=ToolFormat.R1)
    answer.feed(ids_of(CALL + CALL))
    answer.end()
    assert answer.calls == calls


def test_a_completion_is_text_as_it_is() -> None:
    piece = answer_for(completion(), vocabulary(), thinking=False, form=ToolFormat.R1).feed(ids_of("a</think>b"))
    assert (piece.reasoning, piece.content) == ("", "a</think>b")
