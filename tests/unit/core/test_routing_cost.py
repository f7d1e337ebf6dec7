"""Where a prompt goes: to what is cached, unless the queue there costs more; to a decode rank with room."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core.prefix_index import PrefixIndex, Worker
from tandem.core.route_cost import RouteSettings, Slo
from tandem.core.routing import NoCapacity, Pair, RouteAsk, Router
from tandem.core.types import DpLoad, Group, GroupState, Role

READY = GroupState.READY
PROMPT = list(range(6400))


def group(name: str, *, dp_size: int = 2, epoch: int = 1, state: GroupState = READY, weights: str = "1") -> Group:
    role = Role.PREFILL if name.startswith("p") else Role.DECODE
    return Group(
        group=name, role=role, epoch=epoch, state=state, url=f"http://{name}", dp_size=dp_size, weight_version=weights
    )


def router(*groups: Group, **settings: object) -> Router:
    made = Router(RouteSettings(**settings), PrefixIndex(max_bytes=2**20))  # type: ignore[arg-type]
    for one in groups or (group("p0"), group("d0")):
        made.put(one)
    return made


def chosen(made: Router, ask: RouteAsk | None = None, avoid: tuple[str, ...] = (), now: float = 0.0) -> Pair:
    pair = made.choose(ask, avoid=avoid, now=now)
    assert isinstance(pair, Pair)
    return pair


def cache(made: Router, rank: int, prompt: list[int], group: str = "p0") -> None:
    """The engine of a rank says that it holds the prompt."""
    pages = len(prompt) // 64
    made.index.stored(Worker(group, 1, rank), range(1, pages + 1), None, prompt[: pages * 64], 64)


def load(made: Router, group: str, rank: int, now: float = 0.0, **values: int) -> None:
    made.put_load(group, [DpLoad(dp_rank=rank, **values)], now)  # type: ignore[arg-type]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_prompt_goes_where_most_of_it_is_cached(rank: int) -> None:
    made = router()
    cache(made, rank, PROMPT)
    for _ in range(3):
        pair = chosen(made, RouteAsk(PROMPT))
        assert (pair.prefill.dp_rank, pair.choice.by) == (rank, "cost")


def test_the_choice_says_what_it_expects() -> None:
    made = router()
    cache(made, 1, PROMPT[:3200])
    choice = chosen(made, RouteAsk(PROMPT)).choice
    assert (choice.prompt_tokens, choice.cached_tokens, choice.uncached_tokens) == (6400, 3200, 3200)
    assert choice.confirmed
    assert choice.ttft_s == pytest.approx(3200 / 5000)
    assert choice.keeps_slo


def test_the_last_token_is_always_computed() -> None:
    made = router()
    cache(made, 0, PROMPT)
    assert chosen(made, RouteAsk(PROMPT)).choice.uncached_tokens == 1


def test_a_long_queue_outweighs_a_cached_prefix() -> None:
    made = router()
    cache(made, 0, PROMPT[:3200])
    load(made, "p0", 0, waiting_uncached_tokens=3100)
    assert chosen(made, RouteAsk(PROMPT)).prefill.dp_rank == 0
    load(made, "p0", 0, waiting_uncached_tokens=9000)
    assert chosen(made, RouteAsk(PROMPT)).prefill.dp_rank == 1


def test_a_prompt_that_was_routed_is_followed_by_its_like_before_any_event() -> None:
    made = router(group("p0", dp_size=8), group("d0"))
    first = chosen(made, RouteAsk(PROMPT))
    second = chosen(made, RouteAsk([*PROMPT, 1, 2, 3]))
    assert (first.choice.cached_tokens, second.choice.cached_tokens) == (0, 6400)
    assert second.prefill == first.prefill
    assert not second.choice.confirmed


def test_differences_below_what_an_estimate_can_tell_go_round_in_turn() -> None:
    made = router()
    load(made, "p0", 0, waiting_uncached_tokens=50)
    assert {chosen(made, RouteAsk(list(range(40)))).prefill.dp_rank for _ in range(4)} == {0, 1}


def test_a_slow_rank_gets_less() -> None:
    made = router()
    for _ in range(10):
        made.observed(Worker("p0", 1, 0), tokens=1000, seconds=1.0)
        made.observed(Worker("p0", 1, 1), tokens=8000, seconds=1.0)
    assert {chosen(made, RouteAsk([n] * 640)).prefill.dp_rank for n in range(4)} == {1}
    slow, fast = (view.tokens_per_second for view in made.ranks() if view.role is Role.PREFILL)
    assert (slow, fast) == (pytest.approx(1000, rel=0.15), pytest.approx(8000, rel=0.15))


def test_a_rank_learns_its_rate_from_what_waited_before_a_prompt_and_the_prompt_itself() -> None:
    made = router(group("p0", dp_size=1), group("d0"))
    target = chosen(made).prefill
    for room in range(60):
        made.open(2 * room, target, 2000, now=10.0 * room)
        made.open(2 * room + 1, target, 2000, uncached=1000, now=10.0 * room)
        made.prefilled(2 * room, cached=0, now=10.0 * room + 2)
        made.prefilled(2 * room + 1, cached=1000, now=10.0 * room + 3)
        for leg in (2 * room, 2 * room + 1):
            made.release(leg, Role.PREFILL)
    assert made.ranks()[0].tokens_per_second == pytest.approx(1000, rel=0.01)


def test_a_decode_rank_learns_its_pace_from_streams() -> None:
    made = router(group("p0"), group("d0", dp_size=1))
    target = chosen(made).decode
    for room in range(40):
        made.open(room, target, 100, now=0)
        for step in range(101):
            made.grow(room, 1, now=1 + step * 0.065)
        made.release(room, Role.DECODE, now=1 + 100 * 0.065)
    assert made.ranks()[-1].pace_s == pytest.approx(0.065 / (1 + 1 / 64), rel=0.01)


def test_a_new_rank_is_taken_for_as_fast_as_its_like() -> None:
    made = router(group("p0", dp_size=1), group("d0"))
    for _ in range(40):
        made.observed(Worker("p0", 1, 0), tokens=1000, seconds=1.0)
    made.put(group("p1", dp_size=1))
    assert made.ranks()[1].tokens_per_second == pytest.approx(1000, rel=0.05)


def test_a_computed_prompt_waits_no_more() -> None:
    made = router()
    target = chosen(made).prefill
    made.open(1, target, 5000, uncached=3000)
    assert [view.waiting_tokens for view in made.ranks()][target.dp_rank] == 3000
    made.prefilled(1, cached=2000)
    assert [view.waiting_tokens for view in made.ranks()][target.dp_rank] == 0


def test_a_stream_goes_where_its_kv_fits() -> None:
    made = router()
    load(made, "d0", 0, used_tokens=9000, max_total_tokens=10000)
    load(made, "d0", 1, running=80, max_total_tokens=10000)
    assert chosen(made, RouteAsk(PROMPT[:500])).decode.dp_rank == 0
    assert chosen(made, RouteAsk(PROMPT[:500], output_tokens=600)).decode.dp_rank == 1


def test_where_it_fits_nowhere_it_waits_where_least_runs_and_the_choice_says_so() -> None:
    made = router(group("p0"), group("d0", dp_size=1))
    load(made, "d0", 0, used_tokens=9990, max_total_tokens=10000)
    assert not chosen(made, RouteAsk(PROMPT[:500])).choice.keeps_slo


def test_a_target_that_cannot_be_kept_is_told() -> None:
    made = router(slo=Slo(ttft_s=1.0, itl_s=0.05))
    assert not chosen(made, RouteAsk(PROMPT)).choice.keeps_slo
    assert chosen(made, RouteAsk(PROMPT[:1000])).choice.keeps_slo


# Others


def test_what_other_gateways_have_is_what_engines_report_less_our_own() -> None:
    made = router()
    target = chosen(made).decode
    for room in range(3):
        made.open(room, target, 100)
    load(made, "d0", target.dp_rank, running=4, waiting=1, used_tokens=1000, max_total_tokens=10000)
    view = next(view for view in made.ranks() if view.role is Role.DECODE and view.dp_rank == target.dp_rank)
    assert (view.rooms, view.other_rooms, view.kv_used) == (3, 2, pytest.approx(0.1))


def test_a_room_of_ours_that_ended_since_the_engine_counted_is_not_taken_for_anothers() -> None:
    made = router()
    target = chosen(made).decode
    load(made, "d0", target.dp_rank)
    made.open(1, target, 100)
    made.release(1, Role.DECODE)
    load(made, "d0", target.dp_rank, running=1, used_tokens=100)
    assert [view.other_rooms for view in made.ranks()] == [0] * 4


def test_what_we_had_before_the_last_report_is_not_taken_off_again() -> None:
    made = router()
    target = chosen(made).decode
    made.open(1, target, 100)
    made.release(1, Role.DECODE)
    for running in (0, 1):
        load(made, "d0", target.dp_rank, running=running)
    assert sum(view.other_rooms for view in made.ranks()) == 1


def test_the_rank_that_other_gateways_use_is_left_to_them() -> None:
    made = router()
    load(made, "d0", 0, running=30)
    assert {chosen(made).decode.dp_rank for _ in range(4)} == {1}


def test_a_report_that_is_not_renewed_is_forgotten() -> None:
    made = router()
    load(made, "d0", 0, running=30, now=100.0)
    assert {chosen(made, now=105.0).decode.dp_rank for _ in range(4)} == {1}
    assert {chosen(made, now=120.0).decode.dp_rank for _ in range(4)} == {0, 1}


def test_a_report_of_another_epoch_or_of_nobody_is_dropped() -> None:
    made = router()
    made.put_load("d0", [DpLoad(dp_rank=0, running=9), DpLoad(dp_rank=7, running=9)], 1.0, epoch=2)
    made.put_load("x", [DpLoad(dp_rank=0, running=9)], 1.0)
    assert {view.other_rooms for view in made.ranks()} == {0}


@given(st.lists(st.sampled_from(["open", "close", "theirs", "their end", "report"]), max_size=60), st.data())
def test_no_room_is_counted_twice_however_late_the_engines_count_is(steps: list[str], data: st.DataObject) -> None:
    made = router(group("p0", dp_size=1), group("d0", dp_size=1))
    target = chosen(made).decode
    ours: list[int] = []
    theirs = 0
    moments = [(0, 0)]  # (all rooms, others' rooms) at every moment since the last report
    for number, step in enumerate(steps):
        match step:
            case "open":
                made.open(number, target, 10)
                ours.append(number)
            case "close" if ours:
                made.release(ours.pop(0), Role.DECODE)
            case "theirs":
                theirs += 1
            case "their end":
                theirs = max(0, theirs - 1)
            case "report":
                rooms, others = data.draw(st.sampled_from(moments))
                load(made, "d0", 0, running=rooms)
                assert made.ranks()[-1].other_rooms <= others
                moments = []
        moments.append((len(ours) + theirs, theirs))


# Sessions


def test_a_session_stays_on_its_rank_while_that_costs_little_more() -> None:
    made = router()
    first = chosen(made, RouteAsk(PROMPT[:64], "s")).prefill
    load(made, "p0", first.dp_rank, waiting_uncached_tokens=400)
    pair = chosen(made, RouteAsk([5] * 640, "s"))
    assert (pair.prefill, pair.choice.by) == (first, "session")
    load(made, "p0", first.dp_rank, waiting_uncached_tokens=4000)
    assert chosen(made, RouteAsk([6] * 640, "s")).prefill != first


def test_a_session_does_not_stay_for_its_target() -> None:
    made = router(slo=Slo(ttft_s=0.15), affinity=10.0)
    first = chosen(made, RouteAsk([1] * 640, "s")).prefill
    load(made, "p0", first.dp_rank, waiting_uncached_tokens=400)
    assert chosen(made, RouteAsk([5] * 640, "s")).prefill != first


def test_a_session_does_not_follow_a_group_to_avoid() -> None:
    made = router(group("p0"), group("p1"), group("d0"))
    first = chosen(made, RouteAsk(PROMPT, "s")).prefill
    assert chosen(made, RouteAsk(PROMPT, "s"), avoid=(first.group,)).prefill.group != first.group


def test_sessions_are_remembered_up_to_a_number() -> None:
    made = router(sessions=2)
    for session in ("a", "b", "c"):
        chosen(made, RouteAsk(PROMPT[:64], session))
    assert list(made._sessions) == ["b", "c"]


# Groups


def test_the_last_resort_is_told() -> None:
    made = router(group("p0"), group("d0"))
    assert chosen(made, RouteAsk(PROMPT), avoid=("d0",)).choice.by == "last resort"


def test_a_prefix_on_the_wrong_weights_does_not_count() -> None:
    made = router(group("p0", weights="1"), group("p1", weights="2"), group("d0", weights="2"))
    cache(made, 0, PROMPT)
    assert chosen(made, RouteAsk(PROMPT)).prefill.group == "p1"


def test_a_restarted_group_has_lost_what_it_held() -> None:
    made = router()
    cache(made, 0, PROMPT)
    made.put(group("p0", epoch=2))
    assert chosen(made, RouteAsk(PROMPT)).choice.cached_tokens == 0


def test_a_failed_group_has_lost_what_it_held_and_a_cordoned_one_has_not() -> None:
    for state, cached in ((GroupState.CORDONED, 6399), (GroupState.FAILED, 0)):
        made = router()
        cache(made, 0, PROMPT)
        made.put(group("p0", state=state))
        assert isinstance(made.choose(RouteAsk(PROMPT)), NoCapacity)
        made.put(group("p0"))
        assert chosen(made, RouteAsk(PROMPT)).choice.cached_tokens == cached


def test_nothing_is_left_of_groups_that_are_gone() -> None:
    made = router()
    pair = chosen(made, RouteAsk(PROMPT, "s"))
    for role in Role:
        made.open(1, pair.target(role), 10)
    for name in ("p0", "d0"):
        made.remove(name)
    for role in Role:
        made.release(1, role)
    assert (made.loads(), made.ranks(), made.index.workers, made._accounts) == ([], [], [], {})


# Several gateways


def test_two_gateways_that_hear_the_same_choose_the_same() -> None:
    one, other = router(group("p0", dp_size=8), group("d0")), router(group("p0", dp_size=8), group("d0"))
    chosen(one), chosen(one), chosen(one)  # their turns need not agree
    for rank in range(8):
        for made in (one, other):
            cache(made, rank, [rank] * 3200)
    for rank in range(8):
        ask = [rank] * 3200 + [9] * 640
        assert chosen(one, RouteAsk(ask)).prefill.dp_rank == chosen(other, RouteAsk(ask)).prefill.dp_rank == rank


def test_a_prompt_is_hashed_once_for_all_its_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    made = router()
    ask = RouteAsk(PROMPT)
    chosen(made, ask)
    monkeypatch.setattr(made.index, "keys", lambda prompt: pytest.fail("hashed again"))
    chosen(made, ask)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 20)), max_size=30))
def test_the_same_history_makes_the_same_choices(history: list[tuple[int, int]]) -> None:
    def run() -> list[Pair]:
        made = router(group("p0", dp_size=4), group("d0", dp_size=4))
        pairs = []
        for room, (topic, length) in enumerate(history):
            pairs.append(chosen(made, RouteAsk([topic] * 64 * length, str(topic))))
            made.open(room, pairs[-1].prefill, 64 * length, uncached=pairs[-1].choice.uncached_tokens)
        return pairs

    assert run() == run()
