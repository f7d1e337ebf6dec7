"""Reasoning and content, split the same way however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.text.reasoning import ReasoningParser


def run(pieces: list[str], thinking: bool) -> tuple[str, str]:
    parser, reasoning, content = ReasoningParser(thinking=thinking), "", ""
    for split in [*map(parser.feed, pieces), parser.end()]:
        reasoning += split.reasoning
        content += split.content
    return reasoning, content


CASES = [
    ("thought\n</think>\n\nanswer", True, "thought", "answer"),
    ("<think>\nthought\n</think>\n\nanswer", True, "thought", "answer"),
    ("<think>\nthought\n</think>\n\nanswer", False, "thought", "answer"),
    (" \n<think>thought</think>answer", False, "thought", "answer"),
    ("plain answer", False, "", "plain answer"),
    ("\nplain", False, "", "\nplain"),
    ("never ends\n\n", True, "never ends\n\n", ""),
    ("a < b </thin c</think>d </think> <think>e", True, "a < b </thin c", "d </think> <think>e"),
    ("a\n\nb\n</think>", True, "a\n\nb", ""),
    ("</think>only", True, "", "only"),
    ("<thi", False, "", "<thi"),
    ("x <think> y", False, "", "x <think> y"),
    ("", True, "", ""),
]


@pytest.mark.parametrize(("text", "thinking", "reasoning", "content"), CASES)
def test_it_splits_at_the_markers_whatever_the_cut(text: str, thinking: bool, reasoning: str, content: str) -> None:
    for cut in range(len(text) + 1):
        assert run([text[:cut], text[cut:]], thinking) == (reasoning, content)
    assert run(list(text), thinking) == (reasoning, content)


PARTS = st.lists(st.sampled_from(["<think>", "</think>", "<", "/think", "\n", "a", " "]), max_size=12)


@given(parts=PARTS, thinking=st.booleans())
def test_any_text_splits_the_same_way_piece_by_piece(parts: list[str], thinking: bool) -> None:
    whole = run(["".join(parts)], thinking)
    assert run(parts, thinking) == whole
    assert run(list("".join(parts)), thinking) == whole


def test_reasoning_is_told_as_soon_as_it_is_certain() -> None:
    parser = ReasoningParser(thinking=True)
    assert parser.feed("so far").reasoning == "so far"
    assert parser.reasoning
    parser.feed("</think>")
    assert not parser.reasoning
