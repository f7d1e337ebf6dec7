"""Fast encoding: the same ids as `tokenizers`, whatever the text."""

from __future__ import annotations

import json
import threading
from functools import cache
from typing import Any

import fastokens
import pytest
import tokenizers
from gateway_model import inner
from hypothesis import example, given
from hypothesis import strategies as st

from tandem.gateway.text.fast_encode import FastEncoder
from tandem.models.tokenizer import tokenizer_json

R1_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n"
    r"\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+["
    "\r\n"
    r"]*|\s*["
    "\r\n"
    r"]+|\s+(?!\S)|\s+",
)
"""R1's pre-tokenizer as its file has it, line ends and all: fastokens knows it by its text and has code for it."""

words = st.text(st.sampled_from("abcXYZ089 \n\r\t.,!=_'\"{}\\。，漢字仮é\u0301😀\u200d\x00\u3000"), max_size=60)
special = st.sampled_from(["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<｜User", "｜>", "<"])
blanks = st.builds(lambda blank, count: blank * count, st.sampled_from([" ", "\n", "\r\n", "\t"]), st.integers(1, 40))
texts = st.lists(st.one_of(words, words, special, blanks, st.text(max_size=20)), max_size=12).map("".join)


@cache
def r1_like() -> tokenizers.Tokenizer:
    """The tiny vocabulary behind R1's pre-tokenizer."""
    made: dict[str, Any] = json.loads(json.dumps(tokenizer_json()))
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in R1_SPLITS
    ]
    made["pre_tokenizer"]["pretokenizers"] = [*splits, made["pre_tokenizer"]["pretokenizers"][-1]]
    return tokenizers.Tokenizer.from_str(json.dumps(made))


@cache
def encoders() -> list[tuple[tokenizers.Tokenizer, FastEncoder]]:
    """Used from example to example: what they keep of earlier texts must not show."""
    return [(one, FastEncoder(one)) for one in (inner(), r1_like())]


def exact(one: tokenizers.Tokenizer, text: str, *, special: bool = False) -> list[int]:
    return list(one.encode_batch_fast([text], add_special_tokens=special)[0].ids)


@given(texts)
@example("one two 10 apples\n\nThree\r\n四。五 six\n7 \n x")
def test_the_ids_are_those_of_tokenizers(text: str) -> None:
    for one, encoder in encoders():
        assert encoder.encode(text) == exact(one, text)
        assert encoder.encode(text, special=True) == exact(one, text, special=True)


def test_characters_of_all_kinds_are_classed_alike() -> None:
    # Both libraries have tables of Unicode's classes of their own.
    some = [chr(code) for code in range(0x20, 0x20000, 7) if not 0xD800 <= code < 0xE000]
    for one, encoder in encoders():
        for at in range(0, len(some), 64):
            text = "".join(f"a{character} !{character}x " for character in some[at : at + 64])
            assert encoder.encode(text) == exact(one, text)


def test_texts_that_defeat_naive_encoders_are_encoded_in_time() -> None:
    for text in ("a" * 20_000, "ab" * 10_000, " " * 20_000, "\n" * 20_000, "7" * 20_000, "!?" * 10_000, "<｜" * 10_000):
        for one, encoder in encoders():
            assert encoder.encode(text) == exact(one, text)


def test_threads_share_one_encoder() -> None:
    encoder = FastEncoder(inner())
    prompts = [f"{n} says hello to the world and all " * 20 for n in range(20)]
    wanted = {text: exact(inner(), text) for text in prompts}
    wrong: list[str] = []

    def work() -> None:
        wrong.extend(text for text in prompts * 5 if encoder.encode(text) != wanted[text])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


real = fastokens.Tokenizer


class Another:
    """A fastokens that takes every tokenizer for another, with fewer merges."""

    @staticmethod
    def from_json_str(text: str) -> fastokens.Tokenizer:
        made = json.loads(text)
        made["model"]["merges"] = made["model"]["merges"][:300]
        return real.from_json_str(json.dumps(made))


class Refusing:
    """A fastokens that knows no tokenizer."""

    @staticmethod
    def from_json_str(_: str) -> fastokens.Tokenizer:
        raise ValueError("unknown field")


@pytest.mark.parametrize(("kind", "says"), [(Another, "differently"), (Refusing, "unknown field")])
def test_tokenizers_encodes_where_fastokens_cannot_be_trusted(
    kind: type, says: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fastokens, "Tokenizer", kind)
    encoder = FastEncoder(inner())
    assert says in caplog.text
    text = "漢字 don't, 2024\n" * 200
    assert encoder.encode(text) == exact(inner(), text)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        FastEncoder(inner()).encode("a \ud800 b")
