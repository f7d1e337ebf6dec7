"""XGrammar, the engine's grammar backend, understands what the gateway sends it, and holds it token by token."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import xgrammar
from transformers import AutoTokenizer

from tandem.gateway.api.grammar import structural_tag
from tandem.gateway.api.tools import Choice, ToolFormat, calls_grammar
from tandem.gateway.api.wire import joined_calls
from tandem.gateway.text.tool_parser import ToolParser
from tandem.models.tokenizer import EOS_ID, VOCAB_SIZE

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Köln"]}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "now"}},
]


class Grammars:
    """A compiler as SGLang has one: a single one for all requests, with its cache."""

    def __init__(self, model: Path) -> None:
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        info = xgrammar.TokenizerInfo.from_huggingface(self.tokenizer, vocab_size=VOCAB_SIZE, stop_token_ids=[EOS_ID])
        self._compiler = xgrammar.GrammarCompiler(info)

    def matcher(self, content: Any, *, thinking: bool = True, budget: int | None = None) -> Any:
        tag = structural_tag(content, thinking=thinking, budget=budget)
        assert tag is not None
        return xgrammar.GrammarMatcher(self._compiler.compile_structural_tag(tag))

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def walk(self, matcher: Any, ids: Sequence[int]) -> int:
        """How many of the tokens are allowed, one after the other."""
        for place, token in enumerate(ids):
            if token not in allowed(matcher):
                return place
            assert matcher.accept_token(token)
        return len(ids)

    def drawn(self, matcher: Any, seed: int, most: int = 400) -> str | None:
        """A text of tokens drawn from those allowed; None if it has no end by then."""
        rng, ids = random.Random(seed), []
        for _ in range(most):
            choices = allowed(matcher)
            # What ends it goes first, or a text of random letters would hardly come to its end.
            token = next((one for one in choices if one in self.ends), None)
            if token is None or rng.random() < 0.5:
                token = rng.choice(choices)
            assert matcher.accept_token(token)
            if token == EOS_ID:
                return str(self.tokenizer.decode(ids, skip_special_tokens=False))
            ids.append(token)
        return None

    @property
    def ends(self) -> set[int]:
        return {EOS_ID, *self.ids('"'), *self.ids("}"), *self.ids("]"), *self.ids("</think>"), *self.ids("e")}


def allowed(matcher: Any) -> list[int]:
    mask = xgrammar.allocate_token_bitmask(1, VOCAB_SIZE)
    matcher.fill_next_token_bitmask(mask)
    words = mask[0].tolist()
    return [token for token in range(VOCAB_SIZE) if words[token // 32] >> (token % 32) & 1]


@pytest.fixture(scope="module")
def grammars(tiny: Path) -> Grammars:
    return Grammars(tiny)


@pytest.mark.parametrize("content", [None, {"type": "json_schema", "json_schema": SCHEMA}])
@pytest.mark.parametrize("budget", [0, 1, 7, 100])
def test_the_reasoning_has_its_budget_and_no_token_more(grammars: Grammars, content: Any, budget: int) -> None:
    matcher = grammars.matcher(content, budget=budget)
    assert grammars.walk(matcher, grammars.ids("a") * 120) == budget
    text = '</think>\n\n{"city": "Rome"}'
    assert grammars.walk(matcher, [*grammars.ids(text), EOS_ID]) == len(grammars.ids(text)) + 1


def test_reasoning_may_be_shorter_than_its_budget(grammars: Grammars) -> None:
    ids = [*grammars.ids("I see.\n</think>\n\nHello"), EOS_ID]
    assert grammars.walk(grammars.matcher(None, budget=1000), ids) == len(ids)


def test_budgets_do_not_get_mixed_up_by_the_compilers_cache(grammars: Grammars) -> None:
    forms: list[Any] = [None, {"type": "json_schema", "json_schema": SCHEMA}, {"type": "regex", "pattern": "a+"}]
    for _ in range(2):
        for content in forms:
            for budget in (3, 5, 4, None):
                matcher = grammars.matcher(content or {"type": "any_text"}, budget=budget)
                assert grammars.walk(matcher, grammars.ids("a") * 9) == (9 if budget is None else budget)


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_an_answer_of_a_schema_is_json_of_it(grammars: Grammars, seed: int, thinking: bool) -> None:
    form = {"type": "json_schema", "json_schema": SCHEMA}
    text = grammars.drawn(grammars.matcher(form, thinking=thinking, budget=5), seed)
    if text is not None:
        found = json.loads(text.split("</think>")[-1])
        assert found["city"] in ("Rome", "Köln")


@pytest.mark.parametrize("form", list(ToolFormat))
@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_required_call_is_one_that_the_parser_reads(
    grammars: Grammars, form: ToolFormat, parallel: bool, seed: int
) -> None:
    content = calls_grammar(TOOLS[:1], Choice("required"), form, parallel=parallel)
    text = grammars.drawn(grammars.matcher(content, budget=4), seed)
    if text is None:
        return
    parser = ToolParser(form)
    parsed = parser.feed(text.split("</think>")[-1])
    rest = parser.end()
    calls = joined_calls(parsed.tools + rest.tools)
    assert (parsed.content + rest.content).strip() == ""
    assert len(calls) == 1 or (parallel and calls)
    assert all(json.loads(call["function"]["arguments"])["city"] in ("Rome", "Köln") for call in calls)


@pytest.mark.parametrize("form", list(ToolFormat))
def test_a_named_function_is_the_only_one(grammars: Grammars, form: ToolFormat) -> None:
    content = calls_grammar(TOOLS, Choice("function", "now"), form, parallel=True)
    text = grammars.drawn(grammars.matcher(content, budget=0), 1)
    assert text is None or "weather" not in text
    other = calls_grammar(TOOLS, Choice("function", "weather"), form, parallel=True)
    assert other is not None
    wrong = grammars.ids("</think>" + content["begin"] + content["content"]["tags"][0]["begin"]) if content else []
    assert grammars.walk(grammars.matcher(other, budget=0), wrong) < len(wrong)


@pytest.mark.parametrize("form", list(ToolFormat))
def test_with_auto_text_is_free_and_a_strict_call_is_held(grammars: Grammars, form: ToolFormat) -> None:
    content = calls_grammar(TOOLS, Choice("auto"), form, parallel=True)
    free = [*grammars.ids("Hm.</think>\n\nNo call is needed."), EOS_ID]
    assert grammars.walk(grammars.matcher(content), free) == len(free)
    assert content is not None
    tag = content["tags"][0]["content"]["tags"][0]
    begun = grammars.ids("Hm.</think>\n\nI look. " + content["tags"][0]["begin"] + tag["begin"])
    matcher = grammars.matcher(content)
    assert grammars.walk(matcher, begun) == len(begun)
    assert grammars.walk(matcher, grammars.ids("no json")) == 0
    assert grammars.walk(matcher, grammars.ids('{"town"')) < len(grammars.ids('{"town"'))


def test_with_a_form_and_tools_the_answer_is_either(grammars: Grammars) -> None:
    form = {"type": "json_schema", "json_schema": SCHEMA}
    calls = calls_grammar(TOOLS, Choice("required"), ToolFormat.R1, parallel=True)
    both = {"type": "or", "elements": [form, calls]}
    assert calls is not None
    for text in ('{"city": "Rome"}', calls["begin"] + calls["content"]["tags"][1]["begin"] + "{}"):
        ids = grammars.ids("</think>\n\n" + text)
        assert grammars.walk(grammars.matcher(both), ids) == len(ids)


@pytest.mark.parametrize(
    ("content", "text"),
    [({"type": "regex", "pattern": "[0-9]+"}, "123"), ({"type": "grammar", "grammar": 'root ::= "a" | "b"'}, "b")],
)
def test_other_grammars_are_understood(grammars: Grammars, content: Any, text: str) -> None:
    matcher = grammars.matcher(content, thinking=False)
    assert grammars.walk(matcher, [*grammars.ids(text), EOS_ID]) == len(grammars.ids(text)) + 1
