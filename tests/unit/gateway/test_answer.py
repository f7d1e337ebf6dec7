"""One answer from its tokens: text, reasoning, stop strings and counts, whatever the chunks."""

from __future__ import annotations

from itertools import pairwise

from gateway_model import ids_of, vocabulary
from hypothesis import given
from hypothesis import strategies as st

from tandem.engine.client import Ended
from tandem.gateway.api.tools import CALL_BEGIN, CALLS_BEGIN, CALLS_END, ToolFormat, closing, opening
from tandem.gateway.api.wire import joined_calls
from tandem.gateway.text.answer import Answer, Piece
from tandem.models.tokenizer import EOS, EOS_ID

THOUGHT = "I think 日本\n</think>\n\nIt is 😀 so.\nEND of it"


def answer(*stops: str, chat: bool = True) -> Answer:
    return Answer(vocabulary(), stops=stops, chat=chat, thinking=chat)


def run(made: Answer, chunks: list[list[int]], ended: Ended | None = None) -> tuple[str, str, list[int]]:
    pieces: list[Piece] = [
        made.feed(chunk, ended if place == len(chunks) - 1 else None) for place, chunk in enumerate(chunks)
    ]
    pieces.append(made.end())
    return (
        "".join(piece.reasoning for piece in pieces),
        "".join(piece.content for piece in pieces),
        [token for piece in pieces for token in piece.ids],
    )


def test_reasoning_and_content_come_apart() -> None:
    assert run(answer(), [ids_of(THOUGHT)])[:2] == ("I think 日本", "It is 😀 so.\nEND of it")


def test_a_stop_string_ends_the_content_and_nothing_after_it_is_read() -> None:
    made, ids = answer("END"), ids_of(THOUGHT)
    reasoning, content, read = run(made, [ids])
    assert (reasoning, content) == ("I think 日本", "It is 😀 so.\n")
    assert made.stopped
    assert read == ids[: len(read)]
    assert len(read) < len(ids)


def test_stop_strings_do_not_cut_the_reasoning_short() -> None:
    assert run(answer("think"), [ids_of(THOUGHT)])[0] == "I think 日本"


def test_a_completion_is_text_as_it_is() -> None:
    assert run(answer(chat=False), [ids_of(THOUGHT)])[:2] == ("", THOUGHT)


def test_the_token_that_ended_it_is_counted_but_not_shown() -> None:
    made, last = answer(chat=False), ids_of("!")[0]
    ended = Ended(reason="stop", matched=last)
    assert run(made, [ids_of("hi!")], ended)[1] == "hi"
    assert made.usage(5, 0).completion == len(ids_of("hi!"))


def test_usage_counts_every_token_once() -> None:
    made, ids = answer(), [*ids_of(THOUGHT), EOS_ID]
    run(made, [ids], Ended(reason="stop", matched=EOS_ID))
    usage = made.usage(prompt=7, cached=99)
    assert (usage.prompt, usage.completion, usage.cached) == (7, len(ids), 7)
    assert usage.reasoning == len(ids_of("I think 日本\n</think>"))


@given(cuts=st.lists(st.integers(0, 60)), stop=st.sampled_from(["END", "so.\nE", "😀", "\n", "nowhere"]))
def test_chunks_make_no_difference(cuts: list[int], stop: str) -> None:
    ids = ids_of(THOUGHT)
    borders = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    chunks = [ids[a:b] for a, b in pairwise(borders)]
    assert run(answer(stop), chunks) == run(answer(stop), [ids])


CALLED = (
    "Let me see.</think>\n\nI look.\n"
    + CALLS_BEGIN
    + opening("f", ToolFormat.R1)
    + '{"END": 1}'
    + closing(ToolFormat.R1)
)


def tools(*stops: str, parallel: bool = True) -> Answer:
    return Answer(vocabulary(), stops=stops, chat=True, thinking=True, tools=ToolFormat.R1, parallel=parallel)


def joined(pieces: list[Piece]) -> Piece:
    whole = Piece()
    for piece in pieces:
        whole = whole + piece
    return whole


def test_reasoning_content_and_calls_come_apart() -> None:
    made = tools()
    piece = made.feed(ids_of(CALLED + CALLS_END)) + made.end()
    assert (piece.reasoning, piece.content) == ("Let me see.", "I look.")
    assert joined_calls(piece.tools)[0]["function"] == {"name": "f", "arguments": '{"END": 1}'}
    assert made.reason("stop") == "tool_calls"
    assert made.reason("length") == "length"


def test_stop_strings_do_not_end_the_arguments_of_a_call() -> None:
    made = tools("END")
    piece = made.feed(ids_of(CALLED + CALLS_END + "\nEND")) + made.end()
    assert joined_calls(piece.tools)[0]["function"]["arguments"] == '{"END": 1}'
    assert made.stopped


def test_a_stop_string_before_a_call_ends_the_answer() -> None:
    made = tools("look")
    piece = made.feed(ids_of(CALLED)) + made.end()
    assert (piece.content, piece.tools, made.reason("stop")) == ("I ", [], "stop")


def test_one_call_is_enough_where_no_more_is_wanted() -> None:
    made, ids = tools(parallel=False), ids_of(CALLED + "\n" + CALLED)
    piece = made.feed(ids)
    assert made.stopped
    assert len(piece.ids) < len(ids)
    assert made.reason("length") == "tool_calls"
    assert len(joined_calls(piece.tools)) == 1


def test_the_stop_string_itself_is_shown_when_asked_for() -> None:
    made = Answer(vocabulary(), stops=("END",), chat=False, thinking=False, include_stop=True)
    assert run(made, [[token] for token in ids_of("the END of")])[1] == "the END"


def test_special_tokens_are_shown_when_asked_for() -> None:
    made = Answer(vocabulary(), stops=(), chat=False, thinking=False, special_tokens=True)
    assert run(made, [[*ids_of("a"), EOS_ID, *ids_of("b")]])[1] == f"a{EOS}b"


@given(
    cuts=st.lists(st.integers(0, 80)),
    stop=st.sampled_from(["look", "END", "\n", "see", "nowhere"]),
    parallel=st.booleans(),
)
def test_chunks_make_no_difference_to_calls(cuts: list[int], stop: str, parallel: bool) -> None:
    ids = ids_of(CALLED + "\n" + CALLED[CALLED.index(CALL_BEGIN) :] + CALLS_END + "\nEND of it")
    borders = [0, *sorted(min(place, len(ids)) for place in cuts), len(ids)]
    one, other = tools(stop, parallel=parallel), tools(stop, parallel=parallel)
    many = joined([one.feed(ids[a:b]) for a, b in pairwise(borders)] + [one.end()])
    once = other.feed(ids) + other.end()
    assert (many.reasoning, many.content, many.ids) == (once.reasoning, once.content, once.ids)
    assert [call["function"] for call in joined_calls(many.tools)] == [
        call["function"] for call in joined_calls(once.tools)
    ]
