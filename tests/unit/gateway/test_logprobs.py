"""Logprobs beside the text: one for each token of it, wherever the chunks end."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from gateway_model import ids_of, vocabulary
from hypothesis import given
from hypothesis import strategies as st

from tandem.engine.client import Ended, Logprob
from tandem.gateway.api.tools import CALLS_BEGIN, CALLS_END, ToolFormat, closing, opening
from tandem.gateway.text.answer import Answer, Piece, TokenLogprob
from tandem.models.tokenizer import EOS_ID

CALL = CALLS_BEGIN + opening("f", ToolFormat.R1) + "{}" + closing(ToolFormat.R1) + CALLS_END


def scores(ids: list[int]) -> list[Logprob]:
    return [Logprob(-0.5 - place, token, [(-0.25, 300), (float("-inf"), token)]) for place, token in enumerate(ids)]


def read(ids: list[int], borders: list[int], ended: Ended | None = None, **kinds: Any) -> Piece:
    made = Answer(vocabulary(), **{"stops": (), "chat": True, "thinking": True, **kinds})
    places, whole, found = [0, *sorted(min(place, len(ids)) for place in borders), len(ids)], Piece(), scores(ids)
    for a, b in pairwise(places):
        whole = whole + made.feed(ids[a:b], ended if b == len(ids) else None, found[a:b])
    return whole + made.end()


def text(entries: list[TokenLogprob], *, reasoning: bool = False) -> str:
    return b"".join(one.bytes for one in entries if one.reasoning is reasoning).decode()


def test_each_token_of_the_content_has_its_own() -> None:
    ids = ids_of("It is 😀")
    piece = read(ids, [], chat=False, thinking=False)
    assert [one.token for one in piece.logprobs] == ids
    assert [one.logprob for one in piece.logprobs] == [-0.5 - place for place in range(len(ids))]
    assert text(piece.logprobs) == piece.content == "It is 😀"


def test_alternatives_have_their_text_and_no_infinity() -> None:
    [one] = read(ids_of("I"), [], chat=False, thinking=False).logprobs
    assert [other.logprob for other in one.top] == [-0.25, -9999.0]
    assert one.top[1].text == "I"


def test_reasoning_is_told_apart_and_markers_are_neither() -> None:
    piece = read(ids_of("I think\n</think>\n\nSo."), [])
    assert text(piece.logprobs, reasoning=True) == piece.reasoning == "I think"
    assert text(piece.logprobs) == piece.content == "So."


def test_calls_are_no_content() -> None:
    piece = read(ids_of("Hm</think>I look. " + CALL), [], tools=ToolFormat.R1)
    assert text(piece.logprobs) == piece.content == "I look."


def test_text_right_after_a_call_has_only_its_own() -> None:
    piece = read(ids_of("</think>" + CALL.removesuffix(CALLS_END) + "Hm."), [], tools=ToolFormat.R1)
    assert text(piece.logprobs) == piece.content == "Hm."


def test_the_token_that_ends_the_answer_has_none() -> None:
    ids = [*ids_of("So"), EOS_ID]
    piece = read(ids, [], Ended(reason="stop", matched=EOS_ID), chat=False, thinking=False)
    assert [one.token for one in piece.logprobs] == ids[:-1]


def test_what_a_stop_string_takes_away_has_none() -> None:
    piece = read(ids_of("one two three four"), [], stops=(" three",), chat=False, thinking=False)
    assert text(piece.logprobs) == piece.content == "one two"


def test_a_token_of_which_a_part_is_shown_has_one() -> None:
    ids = ids_of("one") + ids_of("\n\n")
    piece = read(ids, [], stops=("e\n",), chat=False, thinking=False)
    assert piece.content == "on"
    assert text(piece.logprobs) == "one"


def test_they_come_with_the_text_and_not_before() -> None:
    made = Answer(vocabulary(), stops=("END",), chat=False, thinking=False)
    ids = [ids_of(letter)[0] for letter in "xEN!"]
    found = scores(ids)
    pieces = [made.feed([token], None, [score]) for token, score in zip(ids, found, strict=True)]
    assert [(piece.content, len(piece.logprobs)) for piece in pieces] == [("x", 1), ("", 0), ("", 0), ("EN!", 3)]


@given(
    st.sampled_from(
        ["I think 日本\n</think>\n\nIt is 😀 so.\nEND of it", "a</think>b " + CALL + " END", "e\u0301END😀"]
    ),
    st.lists(st.integers(0, 60)),
    st.sampled_from([(), ("END",), ("so.\nE", "😀")]),
    st.booleans(),
)
def test_chunks_make_no_difference(whole: str, borders: list[int], stops: tuple[str, ...], chat: bool) -> None:
    kinds: dict[str, Any] = {"stops": stops, "chat": chat, "thinking": chat, "tools": ToolFormat.R1 if chat else None}
    once, many = read(ids_of(whole), [], **kinds), read(ids_of(whole), borders, **kinds)
    assert [(one.token, one.reasoning) for one in many.logprobs] == [
        (one.token, one.reasoning) for one in once.logprobs
    ]
    assert (many.content, many.reasoning) == (once.content, once.reasoning)
    if not stops:
        # Of a token like " END" the blank may belong to a call before it.
        assert text(once.logprobs).replace(" ", "") == once.content.replace(" ", "")


@given(st.lists(st.integers(0, 1023), max_size=40))
def test_any_tokens_of_a_completion_have_one_each(ids: list[int]) -> None:
    assert [one.token for one in read(ids, list(range(40)), chat=False, thinking=False).logprobs] == ids
