"""Batches of KV events: each once, in order, and what is lost is noticed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tandem.gateway.pairing.kv_sequence import FORGET, BatchSequence


def batch(number: int) -> bytes:
    return b"%d" % number


def test_batches_in_order_are_applied_at_once() -> None:
    made = BatchSequence()
    assert [made.live(n, batch(n)) for n in range(3)] == [[b"0"], [b"1"], [b"2"]]
    assert (made.expected, made.gap) == (3, False)


def test_one_that_comes_twice_is_applied_once() -> None:
    made = BatchSequence()
    made.live(0, b"0")
    assert (made.live(0, b"0"), made.replayed(0, b"0")) == ([], [])


def test_what_comes_after_a_missing_one_waits_until_it_is_sent_again() -> None:
    made = BatchSequence()
    assert (made.live(1, b"1"), made.live(2, b"2"), made.gap) == ([], [], True)
    assert made.replayed(0, b"0") == [b"0", b"1", b"2"]
    assert (made.replayed(1, b"1"), made.gap) == ([], False)


def test_what_cannot_be_had_any_more_makes_it_forget() -> None:
    made = BatchSequence()
    made.live(0, b"0")
    made.live(9, b"9")
    assert made.replayed(5, b"5") == [FORGET, b"5"]
    assert [made.replayed(n, batch(n)) for n in (6, 7, 8)] == [[b"6"], [b"7"], [b"8", b"9"]]


def test_what_does_not_come_is_given_up() -> None:
    made = BatchSequence()
    made.live(3, b"3")
    assert (made.give_up(), made.expected) == ([FORGET, b"3"], 4)
    assert made.give_up() == []


def test_what_waits_is_bounded() -> None:
    made = BatchSequence(most_bytes=100)
    assert made.live(2, bytes(60)) == []
    assert made.live(3, bytes(60)) == [FORGET, bytes(60), bytes(60)]


@given(st.data())
def test_whatever_is_lost_or_late_each_is_applied_once_in_order_and_no_loss_is_unseen(data: st.DataObject) -> None:
    made = BatchSequence(most_bytes=data.draw(st.integers(1, 20)))
    published, applied = 0, []
    for step in data.draw(st.lists(st.sampled_from(["publish", "lose", "late", "replay", "give up"]), max_size=40)):
        if step in ("publish", "lose"):
            if step == "publish":
                applied += made.live(published, batch(published))
            published += 1
        elif step == "late" and published:
            number = data.draw(st.integers(0, published - 1))
            applied += made.live(number, batch(number))
        elif step == "replay":
            oldest = data.draw(st.integers(0, published))
            for number in range(max(oldest, made.expected), published):
                applied += made.replayed(number, batch(number))
        elif step == "give up":
            applied += made.give_up()
    seen = -1
    for entry in applied:
        if entry is FORGET:
            seen = -2  # any may follow, but none that was applied before
        else:
            assert seen == -2 or int(entry) == seen + 1
            seen = int(entry)
    numbers = [int(entry) for entry in applied if entry is not FORGET]
    assert numbers == sorted(set(numbers))
    assert made._held_bytes == sum(map(len, made._held.values()))
