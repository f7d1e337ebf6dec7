"""The numbers of a fleet on this machine: start, memory, one stream, eight at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
import time
from collections.abc import Callable, Sequence

import msgspec
import psutil

from tandem.bench.client import Timing, timed
from tandem.engine.guard import descendants
from tandem.engine.http1 import Pool
from tandem.fleet.run_folder import processes_of

TOKENS = 64
PROMPT_TOKENS = 100


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """Streams that ran together."""

    streams: int
    tokens_per_s: float
    """Completion tokens of all streams over the time from the first request to the last token."""
    ttft_p50_s: float
    ttft_max_s: float
    itl_p50_s: float


class Footprint(msgspec.Struct, frozen=True, kw_only=True):
    """What a run takes while nothing is asked of it."""

    processes: int
    pss_bytes: int
    """Proportional set size: shared pages are counted once."""
    idle_cores: float
    """CPU seconds per second."""
    idle_cores_engine: float
    """The same for the busiest engine, one rank with all its processes."""


class Report(msgspec.Struct, kw_only=True):
    """One run of `tandem bench`."""

    cores: int
    up_s: float | None = None
    """`tandem up` until every group and the gateway were ready; None when the fleet was already up."""
    first_token_s: float | None = None
    """`tandem up` until the first streamed token."""
    footprint: Footprint | None = None
    single: Speed | None = None
    eight: Speed | None = None


async def speed(base: str, model: str, streams: int, *, rounds: int = 1) -> Speed:
    """Run `streams` greedy streams of 64 tokens at once, `rounds` times; every prompt is new to the prefix cache."""
    pool = Pool()
    timings: list[Timing] = []
    began = time.perf_counter()
    for _ in range(rounds):
        timings += await asyncio.gather(*(timed(pool, base, "/v1/completions", _body(model)) for _ in range(streams)))
    took = time.perf_counter() - began
    await pool.close()
    return Speed(
        streams=streams,
        tokens_per_s=sum(timing.tokens for timing in timings) / took,
        ttft_p50_s=statistics.median(timing.ttft for timing in timings),
        ttft_max_s=max(timing.ttft for timing in timings),
        itl_p50_s=statistics.median(timing.itl for timing in timings),
    )


def _body(model: str) -> dict[str, object]:
    prompt = [random.randrange(300, 800) for _ in range(PROMPT_TOKENS)]
    return {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}


async def footprint(run: str, engines: Sequence[int], *, over: float = 10.0) -> Footprint:
    """Memory of every process of `run`, and the CPU time they take over `over` seconds.

    Args:
        engines: PIDs of the engines' main processes.
    """
    trees = [processes_of(run), *([psutil.Process(pid) for pid in (pid, *descendants(pid))] for pid in engines)]
    before = [sum(map(_cpu_seconds, tree)) for tree in trees]
    await asyncio.sleep(over)
    spent = [sum(map(_cpu_seconds, tree)) - start for tree, start in zip(trees, before, strict=True)]
    return Footprint(
        processes=len(trees[0]),
        pss_bytes=sum(map(_pss, trees[0])),
        idle_cores=spent[0] / over,
        idle_cores_engine=max(spent[1:], default=0.0) / over,
    )


def _cpu_seconds(process: psutil.Process) -> float:
    return _or_zero(lambda: sum(process.cpu_times()[:2]))


def _pss(process: psutil.Process) -> int:
    return int(_or_zero(lambda: process.memory_full_info().pss))


def _or_zero(read: Callable[[], float]) -> float:
    with contextlib.suppress(psutil.Error):
        return read()
    return 0.0
