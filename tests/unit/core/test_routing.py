"""The first router: ready groups only, least loaded first, ties in turn."""

from __future__ import annotations

from tandem.core.routing import NoCapacity, Pair, Router
from tandem.core.types import Group, GroupState, Role

READY = GroupState.READY


def group(
    name: str, *, dp_size: int = 1, epoch: int = 1, state: GroupState = READY, weights: str = "1", kv: str = ""
) -> Group:
    return Group(
        group=name,
        role=Role.PREFILL if name.startswith("p") else Role.DECODE,
        epoch=epoch,
        state=state,
        url=f"http://{name}",
        bootstrap_host=name,
        bootstrap_port=8998,
        dp_size=dp_size,
        weight_version=weights,
        kv_format=kv,
    )


def router(*groups: Group) -> Router:
    made = Router()
    for one in groups:
        made.put(one)
    return made


def chosen(made: Router, avoid: tuple[str, ...] = ()) -> Pair:
    pair = made.choose(avoid=avoid)
    assert isinstance(pair, Pair)
    return pair


def test_a_pair_is_a_prefill_and_a_decode_group_that_are_ready() -> None:
    pair = chosen(router(group("p0"), group("d0")))
    assert (pair.prefill.group, pair.decode.group, pair.bootstrap_host) == ("p0", "d0", "p0")


def test_groups_that_are_not_ready_are_never_chosen() -> None:
    for state in set(GroupState) - {GroupState.READY}:
        refusal = router(group("p0"), group("d0", state=state)).choose()
        assert isinstance(refusal, NoCapacity)
        assert refusal.reason == "no decode group is ready"


def test_an_idle_fleet_is_used_in_turn_rank_by_rank() -> None:
    made = router(group("p0", dp_size=2), group("d0", dp_size=2))
    assert [chosen(made).decode.dp_rank for _ in range(4)] == [0, 1, 0, 1]


def test_prefill_goes_where_the_fewest_prompt_tokens_wait() -> None:
    made = router(group("p0", dp_size=2), group("d0"))
    made.open(1, chosen(made).prefill, 1000)
    made.open(2, chosen(made).prefill, 10)
    assert [chosen(made).prefill.dp_rank for _ in range(2)] == [1, 1]


def test_decode_goes_where_the_fewest_streams_run() -> None:
    made = router(group("p0"), group("d0", dp_size=2))
    first = chosen(made).decode
    made.open(1, first, 10)
    assert chosen(made).decode.dp_rank == 1 - first.dp_rank
    made.release(1, Role.DECODE)
    assert {chosen(made).decode.dp_rank for _ in range(2)} == {0, 1}


def test_groups_to_avoid_are_the_last_resort() -> None:
    made = router(group("p0"), group("d0"), group("d1"))
    assert {chosen(made, ("d0",)).decode.group for _ in range(4)} == {"d1"}
    made.remove("d1")
    assert chosen(made, ("d0",)).decode.group == "d0"


def test_the_two_halves_have_the_same_kv_format() -> None:
    made = router(group("p0", kv="fp8"), group("d0", kv="bf16"))
    refusal = made.choose(version="1")
    assert isinstance(refusal, NoCapacity)
    assert "KV formats" in refusal.reason
    made.put(group("p1", kv="bf16"))
    assert {(pair.prefill.group, pair.decode.group) for pair in (chosen(made), chosen(made))} == {("p1", "d0")}


def test_a_stream_goes_on_with_the_same_weights_in_any_kv_format() -> None:
    made = router(group("p0", kv="new"), group("d0", kv="new"), group("p1", weights="2"), group("d1", weights="2"))
    pair = made.choose(version="1")
    assert isinstance(pair, Pair)
    assert (pair.prefill.group, pair.decode.group) == ("p0", "d0")


def test_the_two_halves_have_the_same_weights() -> None:
    made = router(group("p0", weights="1"), group("d0", weights="2"))
    refusal = made.choose()
    assert isinstance(refusal, NoCapacity)
    assert "different weight versions" in refusal.reason
    made.put(group("d1", weights="1"))
    assert chosen(made).decode.group == "d1"


def test_a_new_epoch_starts_with_a_clean_account() -> None:
    made = router(group("p0"), group("d0"), group("d1"))
    for room in range(3):
        made.open(room, chosen(made).decode, 10)
    made.put(group("d0", epoch=2))
    assert chosen(made).decode.epoch == 2


def test_everything_that_was_opened_and_released_leaves_no_load() -> None:
    made = router(group("p0"), group("d0"))
    pair = chosen(made)
    for role in Role:
        made.open(1, pair.target(role), 10)
    made.grow(1, 5)
    assert [(load.rooms, load.tokens) for load in made.loads()] == [(1, 15), (1, 10)]
    for role in Role:
        made.release(1, role)
        made.release(1, role)
    assert (made.loads(), made.open_legs) == ([], 0)


def test_a_role_that_autoscaling_left_without_groups_gets_one_when_somebody_asks() -> None:
    made = router(group("p0"))
    made.summoned = frozenset({Role.DECODE})
    refusal = made.choose()
    assert isinstance(refusal, NoCapacity)
    assert (refusal.coming, refusal.asleep) == (True, True)
    made.remove("p0")
    refusal = made.choose()
    assert isinstance(refusal, NoCapacity)
    assert (refusal.coming, refusal.asleep) == (False, False)
