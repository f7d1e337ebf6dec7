"""Server-sent events, however they are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.engine.sse import EventTooLong, SseParser

STREAM = (
    b'data: {"a":1}\n\n: still here\n\nevent: x\ndata:two\ndata: lines\r\n\r\ndata: cr\r\rid: 7\n\ndata: [DONE]\n\n'
)
EVENTS = [b'{"a":1}', b"two\nlines", b"cr", b"[DONE]"]


def test_a_whole_stream_at_once() -> None:
    assert SseParser().feed(STREAM) == EVENTS


def test_a_stream_byte_by_byte() -> None:
    parser = SseParser()
    assert [event for byte in STREAM for event in parser.feed(bytes([byte]))] == EVENTS


@given(cuts=st.lists(st.integers(0, len(STREAM))))
def test_a_stream_cut_anywhere(cuts: list[int]) -> None:
    parser, borders = SseParser(), [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in pairwise(borders)]
    assert [event for piece in pieces for event in parser.feed(piece)] == EVENTS


def test_an_event_without_end_is_refused() -> None:
    with pytest.raises(EventTooLong):
        SseParser(limit=10).feed(b"data: 12345678901")
