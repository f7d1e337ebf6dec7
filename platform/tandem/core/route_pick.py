"""The least costly rank of a role. Pure; a few hundred nanoseconds a rank, as every request looks at every one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from tandem.core.prefix_index import Worker
from tandem.core.route_cost import RouteSettings, between_tokens_s, cached_tokens, first_token_s
from tandem.core.route_types import RoutableRank


class Picked(NamedTuple):
    """A rank, what it costs in seconds, and why it is this one."""

    rank: RoutableRank
    cost: float
    by: str
    fits: bool = True
    """Whether its KV pool has room."""


def allowed(ranks: list[RoutableRank], avoid: Collection[str]) -> list[RoutableRank]:
    """The ranks of groups that need not be avoided, or all if there are none."""
    if not avoid:
        return ranks
    return [rank for rank in ranks if rank.target.group not in avoid] or ranks


def pick_prefill(
    ranks: list[RoutableRank],
    prompt: int,
    depths: Sequence[int],
    *,
    block_tokens: int,
    settings: RouteSettings,
    turn: int,
    home: Worker | None = None,
) -> Picked:
    """Where a prompt of so many tokens would be computed first.

    `depths`: how many of its blocks each slot holds, empty = none are known. `home` is the rank that the session had
    last: it is kept while it costs little more than the best, and the request still gets its target.
    """
    if depths:
        costs = [
            first_token_s(
                rank.account.waiting + rank.account.other_waiting,
                prompt - cached_tokens(depths[rank.slot], block_tokens, prompt),
                rank.account.rate.value,
            )
            for rank in ranks
        ]
    else:
        costs = [
            first_token_s(rank.account.waiting + rank.account.other_waiting, prompt, rank.account.rate.value)
            for rank in ranks
        ]
    best = min(costs)
    if home is not None:
        bound = best * (1 + settings.affinity) + settings.affinity_s
        bound = max(best, min(bound, settings.slo.ttft_s))
        for rank, cost in zip(ranks, costs, strict=True):
            if cost <= bound and rank.worker == home:
                return Picked(rank, cost, "session")
    bound = best + settings.tie * settings.slo.ttft_s
    near = [place for place, cost in enumerate(costs) if cost <= bound]
    if len(near) == 1:
        return Picked(ranks[near[0]], costs[near[0]], "cost")

    def order(place: int) -> tuple[int, int, int]:
        rank = ranks[place]
        return rank.account.streams, -depths[rank.slot] if depths else 0, (place - turn) % len(ranks)

    place = _first(near, order)
    return Picked(ranks[place], costs[place], "tie")


def pick_decode(ranks: list[RoutableRank], tokens: int, *, settings: RouteSettings, turn: int) -> Picked:
    """Where a stream that will hold so many tokens would see the shortest steps; where it fits, if it fits anywhere."""
    used: list[float] = []
    costs: list[float] = []
    for rank in ranks:
        account = rank.account
        share = account.used(tokens)
        used.append(share)
        costs.append(between_tokens_s(account.pace.value, account.rooms + account.other_rooms + 1, min(1.0, share)))
    places = [place for place, share in enumerate(used) if share <= 1]
    fits = bool(places)
    places = places or list(range(len(ranks)))
    bound = min([costs[place] for place in places]) + settings.tie * settings.slo.itl_s
    near = [place for place in places if costs[place] <= bound]
    place = _first(near, lambda place: (ranks[place].account.streams, 0, (place - turn) % len(ranks)))
    return Picked(ranks[place], costs[place], "cost", fits)


def _first(places: list[int], order: Callable[[int], tuple[int, int, int]]) -> int:
    return places[0] if len(places) == 1 else min(places, key=order)
