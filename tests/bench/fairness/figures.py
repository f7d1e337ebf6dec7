"""What the rounds say: quantiles of each arm, and how sure their ratio is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import chain

import msgspec

from bench.fairness.client import Seen

DRAWS = 2000


class Round(msgspec.Struct, frozen=True):
    """The polite tenant alone, and beside the greedy one; what that one saw; the polite one without fairness."""

    alone: Seen
    beside: Seen
    greedy: Seen
    unfair: Seen | None = None
    """The same load as `beside`, where both are one tenant: nothing tells them apart."""


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else float("nan")


def pooled(seen: Sequence[Seen]) -> list[float]:
    """First tokens of all rounds, in ms."""
    return [1e3 * value for one in seen for value in one.ttft_s]


def ratio(rounds: Sequence[Round], share: float = 0.99) -> float:
    """How many times longer the polite tenant waits beside the greedy one."""
    beside, alone = (pooled([getattr(one, arm) for one in rounds]) for arm in ("beside", "alone"))
    return quantile(beside, share) / quantile(alone, share)


def interval(rounds: Sequence[Round], share: float = 0.99) -> tuple[float, float]:
    """Where the ratio lies with 95 %: whole rounds are drawn anew (bootstrap), as what disturbs one request of a
    round disturbs its neighbours as well."""
    draw = random.Random(1)
    found = sorted(ratio(draw.choices(rounds, k=len(rounds)), share) for _ in range(DRAWS))
    return found[int(0.025 * DRAWS)], found[int(0.975 * DRAWS)]


def statuses(seen: Sequence[Seen]) -> dict[int, int]:
    total: dict[int, int] = {}
    for status, count in chain.from_iterable(one.statuses.items() for one in seen):
        total[status] = total.get(status, 0) + count
    return total
