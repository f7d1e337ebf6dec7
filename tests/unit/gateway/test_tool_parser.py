"""Tool calls in a stream: found across any chunk borders, equal to a reading of the whole text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import count, pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tandem.gateway.api.tools import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEP, ToolFormat, closing, opening
from tandem.gateway.api.wire import joined_calls
from tandem.gateway.text.tool_parser import ToolParser

Calls = list[tuple[str, str]]


def read(form: ToolFormat, chunks: Iterable[str], *, parallel: bool = True) -> tuple[str, Calls, ToolParser]:
    numbers = count()
    parser = ToolParser(form, parallel=parallel, new_id=lambda: f"call_{next(numbers)}")
    parts = [parser.feed(chunk) for chunk in chunks]
    parts.append(parser.end())
    calls = joined_calls([delta for part in parts for delta in part.tools])
    assert [call["id"] for call in calls] == [f"call_{n}" for n in range(len(calls))]
    found = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    return "".join(part.content for part in parts), found, parser


def call(name: str, arguments: str, form: ToolFormat = ToolFormat.R1) -> str:
    return opening(name, form) + arguments + closing(form)


def calls(*each: tuple[str, str], form: ToolFormat = ToolFormat.R1) -> str:
    between = "\n" if form is ToolFormat.R1 else ""
    return CALLS_BEGIN + between.join(call(name, arguments, form) for name, arguments in each) + CALLS_END


BOTH = pytest.mark.parametrize("form", list(ToolFormat))


@BOTH
def test_calls_come_apart_from_the_text_before_them(form: ToolFormat) -> None:
    text = "Let me see.\n\n" + calls(("weather", '{"city": "Köln"}'), ("time", "{}"), form=form)
    assert read(form, [text])[:2] == ("Let me see.", [("weather", '{"city": "Köln"}'), ("time", "{}")])


@BOTH
def test_arguments_go_out_as_they_come(form: ToolFormat) -> None:
    parser = ToolParser(form)
    parser.feed(CALLS_BEGIN + opening("f", form))
    assert [parser.feed(part).tools[0].arguments for part in ('{"a', '": 1', "2}")] == ['{"a', '": 1', "2}"]


@BOTH
def test_text_without_calls_is_text(form: ToolFormat) -> None:
    assert read(form, ["a < b <｜User｜> ```json {} ``` \n"])[:2] == ("a < b <｜User｜> ```json {} ``` \n", [])


@BOTH
def test_a_call_without_arguments_has_the_empty_object(form: ToolFormat) -> None:
    assert read(form, [calls(("now", ""), form=form)])[1] == [("now", "{}")]


@BOTH
def test_a_call_that_the_answers_end_cuts_off_keeps_what_it_has(form: ToolFormat) -> None:
    assert read(form, [CALLS_BEGIN + opening("f", form) + '{"a": '])[1] == [("f", '{"a":')]


@BOTH
def test_the_list_need_not_be_opened_or_closed(form: ToolFormat) -> None:
    assert read(form, ["x " + call("f", '{"a":1}', form)])[:2] == ("x", [("f", '{"a":1}')])


@BOTH
def test_text_after_calls_is_text(form: ToolFormat) -> None:
    assert read(form, [calls(("f", "{}"), form=form) + "\n and more "])[:2] == ("and more ", [("f", "{}")])


@BOTH
def test_without_parallel_calls_the_first_completes_it(form: ToolFormat) -> None:
    text, found, parser = read(form, [calls(("f", "{}"), ("g", "{}"), form=form)], parallel=False)
    assert (text, found, parser.complete) == ("", [("f", "{}")], True)


@BOTH
@pytest.mark.parametrize(
    "text",
    [
        f"{CALLS_BEGIN}nothing of the kind",
        f"{CALLS_BEGIN}{CALLS_END}",
        f"a {CALL_BEGIN}no name{CALL_END} b",
        f"{CALL_BEGIN}two words{SEP}{{}}{CALL_END}",
        f"{CALL_BEGIN}{SEP}{{}}{CALL_END}",
        f"{CALLS_BEGIN}{CALL_BEGIN}func",
        f"{CALL_BEGIN}{CALL_BEGIN}",
    ],
)
def test_what_is_no_call_is_text_as_it_stands(form: ToolFormat, text: str) -> None:
    assert read(form, [text])[:2] == (text, [])


@pytest.mark.parametrize(
    "text",
    [
        opening("f", ToolFormat.V31) + '{"a":1}' + CALL_END,
        f'{CALL_BEGIN}function{SEP}f\n{{"a":1}}{CALL_END}',
        f'{CALL_BEGIN}function{SEP}f```json{{"a":1}}```{CALL_END}',
        f'{CALL_BEGIN} function {SEP} f \n\n```json\n{{"a":1}}\n\n```\n{CALL_END}',
        f'{CALL_BEGIN}function{SEP}f\n```\n{{"a":1}}\n```{CALL_END}',
        f'{CALLS_BEGIN}{CALL_BEGIN}function{SEP}f\n```json\n{{"a":1}}\n```{CALLS_END}',
    ],
)
def test_small_slips_of_r1_are_mended(text: str) -> None:
    assert read(ToolFormat.R1, [text])[:2] == ("", [("f", '{"a":1}')])


def test_fences_within_arguments_stay() -> None:
    arguments = '{"code": "```json\\n{}\\n```"}'
    assert read(ToolFormat.R1, list(calls(("f", arguments))))[1] == [("f", arguments)]


def reference(form: ToolFormat, text: str) -> tuple[str, Calls]:
    """The same for well-formed text, read at once."""
    found: Calls = []
    if form is ToolFormat.R1:
        one = re.compile(f"{CALL_BEGIN}function{SEP}(.*?)\n```json\n(.*?)\n```{CALL_END}", re.DOTALL)
    else:
        one = re.compile(f"{CALL_BEGIN}(.*?){SEP}(.*?){CALL_END}", re.DOTALL)
    for name, arguments in one.findall(text):
        found.append((name, arguments.strip() or "{}"))
    outside = re.split(f"\\s*{CALLS_BEGIN}.*?{CALLS_END}\\s*", text, flags=re.DOTALL)
    return "".join(outside), found


def cut(text: str, borders: list[int]) -> list[str]:
    places = [0, *sorted(min(border, len(text)) for border in borders), len(text)]
    return [text[a:b] for a, b in pairwise(places)]


TEXT = st.text(alphabet="ab<｜`\n {}é😀", max_size=12)
ARGUMENTS = st.sampled_from(['{"a": "b"}', "{}", "", '{"c": "<｜tool▁"}', '{"d": "```"}', '{"e": "\\n"}', "[1,\n 2]"])
NAMES = st.sampled_from(["f", "get_weather", "a-b"])
LISTS = st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3)
BORDERS = st.lists(st.integers(0, 300), max_size=30)


@given(st.sampled_from(ToolFormat), TEXT, LISTS, TEXT, BORDERS)
def test_chunks_make_no_difference_and_the_whole_is_read_right(
    form: ToolFormat, before: str, each: list[tuple[str, str]], after: str, borders: list[int]
) -> None:
    text = before + calls(*each, form=form) + after
    assert read(form, cut(text, borders))[:2] == reference(form, text)


PARTS = st.sampled_from(
    [CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEP, "function", "f", "\n", "```", "json", "{", "}", " ", "<", "x y"]
)


@given(st.sampled_from(ToolFormat), st.lists(PARTS, max_size=14).map("".join), BORDERS)
@example(ToolFormat.R1, f"{CALL_BEGIN}function{SEP}f\n```json\n{{}}``` ```{CALL_END}", list(range(60)))
def test_chunks_make_no_difference_to_any_nonsense(form: ToolFormat, text: str, borders: list[int]) -> None:
    assert read(form, cut(text, borders))[:2] == read(form, [text])[:2]


@given(st.sampled_from(ToolFormat), st.lists(PARTS, max_size=14).map("".join))
def test_nothing_is_lost_where_there_is_no_call(form: ToolFormat, text: str) -> None:
    content, found, _ = read(form, list(text))
    if not found:
        assert content == text
