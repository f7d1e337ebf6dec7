"""What the log of a kept answer says, read in few and given out in small entries."""

from __future__ import annotations

import msgspec
import pytest

from tandem.core.pair_events import FailureKind
from tandem.gateway.answers.entries import Complete, Entry, Failed, Left, Tokens, Told, decode, encode, pieces, versions


def t(choice: int, *ids: int, version: str = "") -> Tokens:
    return Tokens(choice=choice, ids=list(ids), version=version)


def test_tokens_of_a_choice_are_one_entry_also_between_those_of_others() -> None:
    found = decode(
        [encode([t(0, 1), t(1, 7)]), encode([t(0, 2)]), encode([t(1, 8), Complete(choice=1, reason="stop")])]
    )
    assert found == [t(0, 1, 2), t(1, 7, 8), Complete(choice=1, reason="stop")]


def test_tokens_of_other_weights_and_those_behind_a_former_owner_are_entries_of_their_own() -> None:
    failed = Failed(kind=FailureKind.STALLED, message="m")
    log: list[Entry] = [t(0, 1), t(0, 2, version="v"), Left(completion=2), failed, t(0, 3, version="v")]
    assert decode([encode([entry]) for entry in log]) == log


def test_logprobs_stay_with_their_tokens() -> None:
    scored: list[tuple[float, int, list[tuple[float, int]]]] = [(-float(token), token, []) for token in range(5)]
    log = [Tokens(choice=0, ids=[at], logprobs=[scored[at]]) for at in range(5)]
    [whole] = decode([encode([entry]) for entry in log])
    assert whole == Tokens(choice=0, ids=list(range(5)), logprobs=scored)
    parts = list(pieces(whole, 2))
    assert [(part.ids, part.logprobs) for part in parts if isinstance(part, Tokens)] == [
        ([0, 1], scored[:2]),
        ([2, 3], scored[2:4]),
        ([4], scored[4:]),
    ]


def test_a_long_log_is_read_into_one_entry() -> None:
    log = [encode([t(0, at, at + 1)]) for at in range(0, 32768, 2)]
    assert decode(log) == [t(0, *range(32768))]


def test_only_choices_that_have_begun_and_are_not_complete_need_weights() -> None:
    log: list[Entry] = [t(0, 1, version="v1"), t(1, 2, version="v2"), t(1, 3), Complete(choice=0, reason="stop")]
    assert versions(log) == {"v2"}


def test_what_was_counted_is_summed_up() -> None:
    told = Told()
    told.count([Left(prompt=True, completion=3), t(0, 1), Left(completion=2, reasoning=1)])
    assert (told.records, told.prompt, told.completion, told.reasoning) == (2, True, 5, 1)


@pytest.mark.parametrize("batch", [b"", b"\xc1", encode([1]), encode([{"type": "t", "choice": 0}])])
def test_what_another_version_has_written_is_told_from_it(batch: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        decode([batch])
