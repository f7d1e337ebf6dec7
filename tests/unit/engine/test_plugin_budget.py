"""Where a budget of tokens makes a grammar need its mask while it reads, with small objects in SGLang's place. With
XGrammar: tests/engine/test_budget.py."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from tandem.engine.plugin import budget, grammars
from tandem.gateway.api.grammar import structural_tag
from tandem.gateway.pairing.engine_body import RESUMED

CONTENT = {"type": "regex", "pattern": "[a-z]*"}
WORDS = dict(enumerate(["a", "b", "<", "/", "th", "ink", ">", "</think>", "think>"]))
A, B, LESS, SLASH, TH, INK, GREATER, END, REST = WORDS


class Grammar:
    """Accepts anything up to its end, but for tokens that it was asked to refuse behind a mask, and notes before which
    tokens it was asked for its mask."""

    vocab_size = len(WORDS)
    matcher = None

    def __init__(self, *, length: int = 99, refuses: int | None = None) -> None:
        self.current_token: int | None = None
        self.read, self.filled = 0, list[int]()
        self.length, self.refuses = length, refuses

    def copy(self) -> Grammar:
        return Grammar(length=self.length, refuses=self.refuses)

    def is_terminated(self) -> bool:
        return self.read >= self.length

    def accept_token(self, token: int) -> None:
        if token == self.refuses and self.read in self.filled:
            raise ValueError(token)
        self.current_token, self.read = token, self.read + 1

    def allocate_vocab_mask(self, vocab_size: int, batch_size: int, device: str) -> tuple[int, int, str]:
        return vocab_size, batch_size, device

    def fill_vocab_mask(self, mask: tuple[int, int, str], index: int) -> None:
        if self.is_terminated():
            raise RuntimeError("it has terminated")
        assert (mask, index) == ((len(WORDS), 1, "cpu"), 0)
        self.filled.append(self.read)


class Tokenizer:
    def decode(self, ids: list[int]) -> str:
        return "".join(WORDS[one] for one in ids)


class Request:
    """One that brings along what was `said`."""

    def __init__(self, said: list[int], tag: str | None, grammar: Any = None) -> None:
        self.sampling_params = SimpleNamespace(structural_tag=tag, custom_params={RESUMED: len(said)})
        self.origin_input_ids = [A, *said]
        self.tokenizer = Tokenizer()
        self.grammar = grammar or Grammar()
        self.to_finish: str | None = None

    def set_finish_with_abort(self, message: str) -> None:
        self.to_finish = message


def limited(tokens: int | None) -> str | None:
    return structural_tag(CONTENT, thinking=True, budget=tokens)


SPELLED = [A, B, LESS, SLASH, TH, INK, GREATER]


@pytest.mark.parametrize(
    ("tokens", "said", "places"),
    [
        pytest.param(2, [A], [], id="before it is spent"),
        pytest.param(2, [A, B], [2], id="as it is spent"),
        pytest.param(2, SPELLED[:5], [2, 3, 4, 5], id="while the marker is spelled"),
        pytest.param(2, SPELLED, [2, 3, 4, 5, 6], id="up to the marker's end"),
        pytest.param(2, [*SPELLED, *[A] * 40], [2, 3, 4, 5, 6], id="nowhere behind it"),
        pytest.param(2, [A, B, END, A], [2], id="the marker is one token"),
        pytest.param(20, [*SPELLED, *[A] * 40], [], id="the reasoning ended by itself"),
        pytest.param(7, [*SPELLED, A], [], id="with the last token that it may have"),
        pytest.param(4, [A, LESS, SLASH, A, B, LESS, SLASH, REST, A], [4, 5, 6, 7], id="half a marker before"),
        pytest.param(0, [], [0], id="no reasoning at all"),
        pytest.param(None, [A, B, END, A], [], id="no budget"),
    ],
)
def test_the_mask_is_filled_from_the_budgets_end_to_that_of_the_marker(
    tokens: int | None, said: list[int], places: list[int]
) -> None:
    assert list(budget.places(Request(said, limited(tokens)), said)) == places


def test_a_request_without_a_structural_tag_needs_none() -> None:
    assert list(budget.places(Request([A, B], None), [A, B])) == []


def test_a_tag_of_sglangs_older_kind_has_no_budget() -> None:
    tag = json.dumps({"type": "structural_tag", "structures": [{"schema": {"max_tokens": 2}}], "triggers": []})
    assert list(budget.places(Request([A, B], tag), [A, B])) == []


@pytest.mark.parametrize(("tokens", "places"), [(None, []), (2, [2])])
def test_a_field_of_a_schema_that_is_called_so_is_no_budget(tokens: int | None, places: list[int]) -> None:
    schema = {"type": "object", "properties": {"max_tokens": {"type": "integer"}, "content": {"type": "string"}}}
    content = {"type": "json_schema", "json_schema": schema}
    asked = Request([A, B], structural_tag(content, thinking=True, budget=tokens))
    assert list(budget.places(asked, [A, B])) == places


@pytest.mark.parametrize(
    "form",
    [
        {"type": "sequence", "elements": [CONTENT, {"type": "any_text", "max_tokens": 3}]},
        {"type": "any_text", "max_tokens": 3},
        {"type": "dispatch", "rules": [["a", {"type": "any_text", "max_tokens": 3}]]},
        {
            "type": "sequence",
            "elements": [
                {"type": "tag", "begin": "", "content": {"type": "any_text", "max_tokens": 9}, "end": "</think>"},
                {"type": "any_text", "max_tokens": 3},
            ],
        },
    ],
)
def test_for_a_budget_of_another_shape_it_is_filled_everywhere(form: dict[str, Any]) -> None:
    tag = json.dumps({"type": "structural_tag", "format": form})
    assert list(budget.places(Request([A, B], tag), [A, B])) == [0, 1, 2]


def test_a_grammar_that_reads_what_was_said_fills_it_there() -> None:
    asked = Request(SPELLED, limited(2))
    grammars.read(asked, SPELLED)
    assert asked.grammar.filled == [2, 3, 4, 5, 6]
    assert asked.grammar.read == len(SPELLED)


def test_where_it_has_ended_already_nothing_is_filled() -> None:
    tag = json.dumps({"type": "structural_tag", "format": {"type": "any_text", "max_tokens": 3}})
    asked = Request([A, B, A], tag, Grammar(length=2))
    grammars.read(asked, [A, B, A])
    assert asked.to_finish == "the output to resume goes on behind the end of its grammar, from token 2 of 3"


def test_what_an_engine_said_beyond_its_budget_is_read_all_the_same() -> None:
    asked = Request(SPELLED, limited(2), Grammar(refuses=TH))
    grammars.read(asked, SPELLED)
    assert asked.to_finish is None
    assert (asked.grammar.read, asked.grammar.filled) == (len(SPELLED), [])


@pytest.mark.parametrize("said", [[], SPELLED])
def test_a_grammar_that_is_not_xgrammars_is_not_asked(said: list[int]) -> None:
    class Other:
        current_token = None
        read = 0

        def is_terminated(self) -> bool:
            return False

        def accept_token(self, token: int) -> None:
            self.read += 1

    asked = Request(said, limited(0), Other())
    grammars.read(asked, said)
    grammars.before_prefills_token(SimpleNamespace(reqs=[asked]))
    assert (asked.to_finish, asked.grammar.read) == (None, len(said))


@pytest.mark.parametrize(("said", "filled"), [([], []), ([A], []), (SPELLED[:3], [3]), (SPELLED, [])])
def test_and_again_before_it_reads_prefills_token(said: list[int], filled: list[int]) -> None:
    asked = Request(said, limited(2))
    asked.grammar.read = len(said)
    grammars.before_prefills_token(SimpleNamespace(reqs=[asked]))
    assert asked.grammar.filled == filled


def test_a_grammar_that_has_read_prefills_token_is_left_alone() -> None:
    asked = Request(SPELLED[:3], limited(2))
    asked.grammar.current_token = LESS
    grammars.before_prefills_token(SimpleNamespace(reqs=[asked, SimpleNamespace(grammar=None)]))
    assert asked.grammar.filled == []
