"""Many seeds, on several cores, and what came of them together."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import msgspec

from tandem.core.pairing import PairTable
from tandem.sim.ledger import Violation
from tandem.sim.schedule import draw
from tandem.sim.world import Outcome, World, make_table

Name = TypeVar("Name", str, int)
BATCH = 4
"""Seeds that a process is given at once."""


class Broken(msgspec.Struct, frozen=True, kw_only=True):
    """A seed that broke a promise."""

    seed: int
    invariant: str
    message: str


class Report(msgspec.Struct, kw_only=True):
    """What many seeds came to."""

    total: Outcome = msgspec.field(default_factory=Outcome)
    broken: list[Broken] = []


def run_seed(
    seed: int, requests: int, make: Callable[[], PairTable] = make_table, *, story: Callable[[str], None] | None = None
) -> Report:
    """One seed, to its end or to the first promise that it breaks."""
    began = time.process_time()
    world = World(draw(seed, requests), make, story=story)
    try:
        world.run()
        broken = []
    except Violation as violation:
        world.tell(str(violation))
        broken = [Broken(seed=seed, invariant=violation.invariant.value, message=violation.message)]
    return Report(total=world.outcome(time.process_time() - began), broken=broken)


def run_seeds(first: int, seeds: int, requests: int) -> Report:
    """Seeds one after the other."""
    report = Report()
    for seed in range(first, first + seeds):
        add(report, run_seed(seed, requests))
    return report


def run_all(first: int, seeds: int, requests: int, jobs: int) -> Iterator[Report]:
    """All seeds, on `jobs` processes; a report of each batch as it is done, in no certain order."""
    batches = [(start, min(BATCH, first + seeds - start)) for start in range(first, first + seeds, BATCH)]
    if jobs <= 1:
        for start, count in batches:
            yield run_seeds(start, count, requests)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(run_seeds, start, count, requests) for start, count in batches]
        try:
            for done in as_completed(waiting):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def add(report: Report, more: Report) -> None:
    """Add what further seeds came to."""
    total, other = report.total, more.total
    for name in ("seeds", "requests", "tokens", "events", "retries", "migrations", "moves", "virtual_s", "seconds"):
        setattr(total, name, getattr(total, name) + getattr(other, name))
    _count(total.faults, other.faults)
    _count(total.outcomes, other.outcomes)
    _count(total.recovered_ms, other.recovered_ms)
    report.broken += more.broken


def _count(counts: dict[Name, int], more: dict[Name, int]) -> None:
    for name, count in more.items():
        counts[name] = counts.get(name, 0) + count


def percentile(counts: dict[int, int], share: float) -> float | None:
    """The value that this share of all does not exceed; None if there are none."""
    left = share * sum(counts.values())
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return value
    return None
