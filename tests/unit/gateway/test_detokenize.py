"""Token ids to text: never half a character, and in the end exactly what the tokenizer itself says."""

from __future__ import annotations

import pytest
import tokenizers
from gateway_model import ids_of, inner, vocabulary
from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.api.tools import SEP
from tandem.gateway.text.detokenize import Detokenizer, Vocabulary
from tandem.gateway.text.model_card import ModelError
from tandem.models.tokenizer import EOS_ID, VOCAB_SIZE


def pieces(ids: list[int]) -> list[str]:
    stream = Detokenizer(vocabulary())
    return [*map(stream.feed, ids), stream.end()]


TEXTS = [
    "plain",
    "naïve café",
    "日本語と中文",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308",
    "e\u0301 n\u0303 क्षि",
    "😀😀😀",
]


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_ever_holds_half_a_character(text: str) -> None:
    found = pieces(ids_of(text))
    assert "".join(found) == text
    assert not any("\ufffd" in piece for piece in found)


def test_a_character_comes_out_with_its_last_byte() -> None:
    stream = Detokenizer(vocabulary())
    ids = ids_of("😀")
    assert [stream.feed(token) for token in ids] == [""] * (len(ids) - 1) + ["😀"]


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=60))
def test_any_tokens_read_as_the_tokenizer_itself_reads_them(ids: list[int]) -> None:
    assert "".join(pieces(ids)) == inner().decode(ids, skip_special_tokens=True)


def test_a_stream_that_breaks_off_inside_a_character_says_so() -> None:
    assert "".join(pieces(ids_of("a😀")[:-1])) == "a\ufffd"


def test_special_tokens_and_unknown_ids_have_no_text() -> None:
    assert pieces([EOS_ID, VOCAB_SIZE + 5]) == ["", "", ""]


def test_think_markers_stay_even_if_the_tokenizer_hides_them() -> None:
    hidden = tokenizers.Tokenizer.from_str(inner().to_str())
    hidden.add_special_tokens(["<think>", "<hidden>"])
    known = Vocabulary(hidden)
    think, other = hidden.token_to_id("<think>"), hidden.token_to_id("<hidden>")
    assert (known.of(think), known.of(other)) == (b"<think>", b"")


def test_a_tokenizer_of_another_kind_is_refused() -> None:
    other = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ModelError, match="only ByteLevel"):
        Vocabulary(other)


@given(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=60))
def test_shown_special_tokens_read_as_the_tokenizer_reads_them(ids: list[int]) -> None:
    stream = Detokenizer(vocabulary(), special_tokens=True)
    assert "".join([*map(stream.feed, ids), stream.end()]) == inner().decode(ids, skip_special_tokens=False)


def test_a_character_that_is_not_complete_is_known() -> None:
    stream, known = Detokenizer(vocabulary()), []
    for token in ids_of("a😀"):
        stream.feed(token)
        known.append(stream.partial)
    assert known == [False, *[True] * (len(known) - 2), False]


def test_tool_markers_stay_even_if_the_tokenizer_hides_them() -> None:
    hidden = tokenizers.Tokenizer.from_str(inner().to_str())
    hidden.add_special_tokens([SEP])
    assert Vocabulary(hidden).of(hidden.token_to_id(SEP)) == SEP.encode()
