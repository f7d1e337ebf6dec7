"""Which ranks hold which prefixes: exactly as engines say, approximately as prompts were sent, within its bytes."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence

import pytest

from tandem.core.block_hash import block_keys, pack
from tandem.core.prefix_index import PrefixIndex, Worker

A, B = Worker("prefill-0", 1, 0), Worker("prefill-0", 1, 1)
BLOCK = 4
PROMPT = list(range(100, 112))
"""Three blocks."""


def names(tokens: Sequence[int], page: int) -> list[int]:
    """What an engine calls the pages of a prefix."""
    return [hash(tuple(tokens[: end + page])) for end in range(0, len(tokens) - page + 1, page)]


def index(*workers: Worker, **options: int) -> PrefixIndex:
    made = PrefixIndex(block_tokens=BLOCK, **options)
    for worker in workers:
        made.join(worker)
    return made


def store(made: PrefixIndex, worker: Worker, tokens: Sequence[int], page: int = BLOCK, after: int = 0) -> bool:
    """An engine says that it holds `tokens`, of which it has told the first `after` before."""
    pages = names(tokens, page)
    parent = pages[after // page - 1] if after else None
    return made.stored(worker, pages[after // page :], parent, tokens[after:], page)


def held(made: PrefixIndex, worker: Worker, tokens: Sequence[int] = PROMPT, now: float = 0.0) -> int:
    return made.match(made.keys(tokens), now)[made.join(worker)]


def test_keys_name_whole_blocks_and_all_that_is_before_them() -> None:
    keys = block_keys([*PROMPT, 1, 2, 3], BLOCK)
    assert len(keys) == 3
    assert block_keys(PROMPT[:8], BLOCK) == keys[:2]
    assert not set(block_keys([99, *PROMPT[1:]], BLOCK)) & set(keys)


def test_keys_are_the_same_in_every_process() -> None:
    assert block_keys([1, 2, 3, 4], 4)[0].hex() == "a29be3e304282209"


@pytest.mark.parametrize(("ids", "error"), [([-1], OverflowError), ([2**32], OverflowError), (["a"], TypeError)])
def test_what_is_no_token_id_has_no_key(ids: list[int], error: type[Exception]) -> None:
    with pytest.raises(error):
        pack(ids)


def test_the_longest_prefix_is_found_for_every_rank_at_once() -> None:
    made = index(A, B)
    store(made, A, PROMPT)
    store(made, B, PROMPT[:8])
    other = [*PROMPT[:4], 7, 7, 7, 7]
    assert made.match(made.keys(PROMPT), 0) == [3, 2]
    assert made.match(made.keys(other), 0) == [1, 1]
    assert made.match(made.keys([7, *PROMPT]), 0) == [0, 0]


@pytest.mark.parametrize("page", [1, 2, 4])
def test_an_engine_may_add_to_a_prefix_page_by_page_and_branch_off_at_any(page: int) -> None:
    made = index(A)
    store(made, A, PROMPT[:6], page if page < 4 else 2)
    assert held(made, A) == 1
    assert store(made, A, PROMPT, page if page < 4 else 2, after=6)
    assert held(made, A) == 3
    branch = [*PROMPT[:6], 7, 7, 8, 8, 8, 8]
    assert store(made, A, branch, page if page < 4 else 2, after=6)
    assert held(made, A, branch) == 3


def test_a_removed_block_is_held_no_more_by_that_rank_alone() -> None:
    made = index(A, B)
    for worker in (A, B):
        store(made, worker, PROMPT)
    made.removed(A, names(PROMPT, BLOCK)[1:])
    assert (held(made, A), held(made, B)) == (1, 3)


def test_a_cleared_rank_holds_nothing_and_can_be_filled_anew() -> None:
    made = index(A, B)
    for worker in (A, B):
        store(made, worker, PROMPT)
    made.cleared(A)
    assert (held(made, A), held(made, B)) == (0, 3)
    store(made, A, PROMPT[:4])
    assert held(made, A) == 1


def test_a_rank_that_takes_the_place_of_one_that_left_does_not_inherit() -> None:
    made = index(A, B)
    store(made, A, PROMPT)
    slot = made.join(A)
    made.leave(A)
    new = Worker("prefill-0", 2, 0)
    assert made.join(new) == slot
    assert (held(made, new), made.workers) == (0, [B, new])


def test_what_a_rank_of_an_old_epoch_says_is_ignored() -> None:
    made = index(A)
    made.leave(A)
    assert not store(made, A, PROMPT)
    assert len(made) == 0


def test_pages_after_one_that_is_not_known_are_counted_and_left_out() -> None:
    made = index(A)
    assert not store(made, A, PROMPT, after=4)
    assert (made.orphans, held(made, A)) == (2, 0)


def test_pages_that_do_not_make_a_block_are_refused() -> None:
    made = index(A)
    assert not store(made, A, PROMPT, page=3)
    assert not made.stored(A, [1], None, [1, 2, 3], 4)
    assert (made.fits(2), made.fits(3), made.fits(8), made.fits(0)) == (True, False, False, False)


def test_a_prompt_that_was_sent_is_expected_there_for_a_while() -> None:
    made = index(A, B)
    made.note(A, made.keys(PROMPT), now=100)
    assert (held(made, A, now=101), held(made, B, now=101)) == (3, 0)
    assert held(made, A, now=129) == 3
    assert held(made, A, now=161) == 0


def test_a_prompt_that_is_sent_again_is_expected_for_longer() -> None:
    made = index(A)
    for now in (100, 120, 140):
        made.note(A, made.keys(PROMPT), now)
    assert held(made, A, now=165) == 3


def test_the_engines_word_outlasts_the_expectation_and_ends_it() -> None:
    made = index(A)
    keys = made.keys(PROMPT)
    made.note(A, keys, now=0)
    assert not made.confirmed(A, keys[2])
    store(made, A, PROMPT)
    assert made.confirmed(A, keys[2])
    assert held(made, A, now=1e6) == 3
    made.removed(A, names(PROMPT, BLOCK))
    assert held(made, A, now=0) == 0


def test_a_removal_ends_an_expectation_that_is_younger_than_what_was_forgotten() -> None:
    made = index(A, B)
    for worker in (A, B):
        store(made, worker, PROMPT)
    made.cleared(A)  # as after a loss of events
    made.note(A, made.keys(PROMPT), now=0)
    made.removed(A, names(PROMPT, BLOCK))
    assert (held(made, A), held(made, B)) == (0, 3)


def fill(made: PrefixIndex, prompts: int, *workers: Worker, blocks: int = 2) -> None:
    rng = random.Random(1)
    for number in range(prompts):
        tokens = [number >> 16, number & 0xFFFF, *([7] * (BLOCK * blocks - 2))]
        called = [rng.getrandbits(62) for _ in range(blocks)]
        for worker in workers:
            made.stored(worker, called, None, tokens, BLOCK)


def test_what_was_used_longest_ago_makes_room_and_the_end_of_a_prompt_before_its_beginning() -> None:
    made = index(A, max_bytes=8 * 1024)
    store(made, A, PROMPT)
    prompts = 0
    while made.evicted == 0:
        prompts += 1
        fill(made, prompts, A, blocks=1)
    assert (held(made, A), held(made, A, PROMPT[:8])) == (2, 2)


def test_what_is_routed_again_stays() -> None:
    made = index(A, max_bytes=8 * 1024)
    store(made, A, PROMPT)
    for number in range(200):
        made.note(A, made.keys(PROMPT), 0.0)
        store(made, A, [number] * 8)
    assert held(made, A) == 3
    fill(made, 100, A)
    assert held(made, A) == 0


def test_one_too_small_to_hold_anything_is_refused() -> None:
    with pytest.raises(ValueError, match="give it 6144 at least"):
        index(max_bytes=100)


@pytest.mark.parametrize("ranks", [1, 40])
def test_its_size_is_what_it_says_and_never_more_than_it_may_be(ranks: int) -> None:
    workers = [Worker("prefill-0", 1, rank) for rank in range(ranks)]
    most = 2**18
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        made = index(*workers, max_bytes=most)
        for prompts in (100, 300, 1500):
            fill(made, prompts, *workers[:1], *workers[-2:])
            taken = tracemalloc.get_traced_memory()[0] - before
            assert made.size == pytest.approx(taken, rel=0.2)
            assert max(made.size, taken) <= most
    finally:
        tracemalloc.stop()
    assert made.evicted > 0


def test_pages_inside_blocks_are_bounded_too() -> None:
    most = 2**18
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        made = index(A, max_bytes=most)
        for number in range(4000):
            made.stored(A, [number], None, [number], 1)
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert made.size == pytest.approx(taken, rel=0.2)
    assert taken <= most // 8 + 1024


def test_evicting_forgets_the_engines_names_as_well() -> None:
    made = index(A, max_bytes=8 * 1024)
    fill(made, 500, A)
    assert len(made._names) == len(made)
