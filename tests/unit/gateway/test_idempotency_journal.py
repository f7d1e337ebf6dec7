"""The journal of answers within one gateway."""

from __future__ import annotations

import pytest
from journal_contract import JournalContract, Opener

from tandem.core.answers import Limits, answer_name, fingerprint, is_key
from tandem.gateway.answers.journal import Journal, LocalJournal


class TestLocalJournal(JournalContract):
    @pytest.fixture
    async def open_journal(self) -> Opener:
        def make(incarnation: str, limits: Limits) -> Journal:
            return LocalJournal(limits)

        return make


def test_a_fingerprint_tells_requests_apart_and_not_their_spelling() -> None:
    one = fingerprint("chat", {"a": 1, "b": [1, {"c": 2, "d": 3}]})
    assert one == fingerprint("chat", {"b": [1, {"d": 3, "c": 2}], "a": 1})
    others = [fingerprint("chat", {"a": 1, "b": []}), fingerprint("completions", {"a": 1, "b": [1, {"c": 2, "d": 3}]})]
    assert one not in others


def test_the_same_key_of_two_tenants_names_two_answers() -> None:
    assert len({answer_name("a", b"k"), answer_name("b", b"k"), answer_name("a", b"l")}) == 3


@pytest.mark.parametrize("key", [b"k", b'"8e03978e-40d5-43dd-bc93-6894a57f9324"', b"x" * 255])
def test_a_key_is_short_and_printable(key: bytes) -> None:
    assert is_key(key)
    assert not is_key(key + b"\n")
