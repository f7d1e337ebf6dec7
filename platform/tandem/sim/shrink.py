"""Make a failing run small: leave requests and faults out as long as the same promise is still broken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import msgspec

from tandem.core.pairing import PairTable
from tandem.sim.ledger import Violation
from tandem.sim.schedule import Schedule
from tandem.sim.world import breaks, make_table

Item = TypeVar("Item")
RUNS = 400
"""So often is the schedule run again, at the most."""


def shrink(
    schedule: Schedule, make: Callable[[], PairTable] = make_table, *, runs: int = RUNS
) -> tuple[Schedule, Violation]:
    """The smallest schedule that was found, and what it breaks. Raises ValueError when the schedule breaks nothing."""
    found = breaks(schedule, make)
    if found is None:
        raise ValueError("this schedule keeps every promise: there is nothing to make small")
    left, invariant = runs, found.invariant

    def fails(smaller: Schedule) -> bool:
        nonlocal left, found
        if left <= 0:
            return False
        left -= 1
        violation = breaks(smaller, make)
        if violation is None or violation.invariant is not invariant:
            return False
        found = violation
        return True

    if found.request >= 0:
        # What is asked after the request that suffers can rarely matter.
        early = tuple(ask for ask in schedule.asks if ask.number <= found.request)
        if fails(smaller := msgspec.structs.replace(schedule, asks=early)):
            schedule = smaller
    size = -1
    while left > 0 and size != (size := len(schedule.asks) + len(schedule.faults)):
        for part in ("faults", "asks"):
            keep = partial(_with, schedule, part)
            schedule = keep(_fewest(getattr(schedule, part), partial(_fails, fails, keep)))
    return schedule, found


def _fails(fails: Callable[[Schedule], bool], keep: Callable[[Sequence[Any]], Schedule], kept: Sequence[Any]) -> bool:
    return fails(keep(kept))


def _with(schedule: Schedule, part: str, items: Sequence[Any]) -> Schedule:
    return msgspec.structs.replace(schedule, **{part: tuple(items)})


def _fewest(items: Sequence[Item], fails: Callable[[Sequence[Item]], bool]) -> Sequence[Item]:
    """Delta debugging: leave out halves, then quarters, and so on, whatever it still fails without."""
    parts = 2
    while items:
        size = max(1, len(items) // parts)
        for start in range(0, len(items), size):
            rest = [*items[:start], *items[start + size :]]
            if fails(rest):
                items, parts = rest, max(2, parts - 1)
                break
        else:
            if size == 1:
                break
            parts = min(len(items), parts * 2)
    return items
