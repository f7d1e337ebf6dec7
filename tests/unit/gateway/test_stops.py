"""Stop strings: the same result however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.text.stops import StopMatcher


def run(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    matcher, out = StopMatcher(stops), ""
    for piece in pieces:
        out += matcher.feed(piece)
    return out + matcher.end(), matcher.stopped


@pytest.mark.parametrize(
    ("text", "stops", "kept", "stopped"),
    [
        ("hello world", ["wor"], "hello ", True),
        ("hello world", ["xyz"], "hello world", False),
        ("aab", ["ab"], "a", True),
        ("ab wor", ["world"], "ab wor", False),
        ("abc", ["abc", "b"], "a", True),
        ("xabc", ["bc", "abc"], "x", True),
        ("naïve 😀 stop", ["😀"], "naïve ", True),
    ],
)
def test_text_ends_before_the_stop_that_completes_first(text: str, stops: list[str], kept: str, stopped: bool) -> None:
    for cut in range(len(text) + 1):
        assert run([text[:cut], text[cut:]], stops) == (kept, stopped)


STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3)


@given(text=st.text("ab\n", max_size=30), stops=STOPS)
def test_the_cut_makes_no_difference(text: str, stops: list[str]) -> None:
    assert run(list(text), stops) == run([text], stops)


def test_text_that_cannot_become_a_stop_is_not_held_back() -> None:
    assert StopMatcher(["###"]).feed("hello") == "hello"
    assert StopMatcher(["###"]).feed("hello##") == "hello"


def test_the_stop_string_may_go_out_too() -> None:
    matcher = StopMatcher(["END"], include=True)
    assert [matcher.feed(piece) for piece in ("a E", "ND b", "c")] == ["a ", "END", ""]
    assert (matcher.stopped, matcher.cut) == (True, 2)


@given(text=st.text("ab\n", max_size=30), stops=STOPS)
def test_what_is_out_held_and_cut_is_all_there_was(text: str, stops: list[str]) -> None:
    matcher, out, fed = StopMatcher(stops), 0, 0
    for letter in text:
        if matcher.stopped:
            break
        out, fed = out + len(matcher.feed(letter)), fed + 1
        assert out + matcher.held + matcher.cut == fed
