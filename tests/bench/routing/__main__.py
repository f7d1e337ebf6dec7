"""The command line; see the package."""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from tandem.core.prefix_index import PrefixIndex, Worker
from tandem.core.routing import Pair, RouteAsk, Router
from tandem.core.types import Group, GroupState, Role

PROMPT_TOKENS = 6000
PREFIX_BLOCKS = 2
RANKS = (1, 8, 32, 64)


def measured(work: Callable[[], object], times: int) -> list[float]:
    """Seconds of each of so many calls."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken


def fill(prefixes: int, megabytes: int) -> dict[str, Any]:
    """Store distinct prefixes, as events tell of them, and look at size and speed at each tenth."""
    process = psutil.Process()
    index = PrefixIndex(max_bytes=megabytes * 2**20)
    worker = Worker("prefill-0", 1, 0)
    index.join(worker)
    size = index.block_tokens * PREFIX_BLOCKS
    tail = [7] * (size - 2)
    resident = process.memory_info().rss
    steps = []
    for tenth in range(10):
        first = tenth * prefixes // 10
        start = time.perf_counter()
        for number in range(first, (tenth + 1) * prefixes // 10):
            names = [number * PREFIX_BLOCKS + place for place in range(PREFIX_BLOCKS)]
            index.stored(worker, names, None, [number >> 16, number & 0xFFFF, *tail], index.block_tokens)
        seconds = time.perf_counter() - start
        stored = (prefixes // 10) * PREFIX_BLOCKS
        newest = [number >> 16, number & 0xFFFF, *tail]
        keys = index.keys(newest)
        steps.append(
            {
                "prefixes": first + prefixes // 10,
                "blocks": len(index),
                "evicted": index.evicted,
                "megabytes": index.size / 2**20,
                "resident_megabytes": (process.memory_info().rss - resident) / 2**20,
                "bytes_per_block": index.size / len(index),
                "stored_blocks_per_second": stored / seconds,
                "match_us": statistics.median(measured(lambda keys=keys: index.match(keys, 0.0), 2000)) * 1e6,
                "found": index.match(keys, 0.0)[0] == PREFIX_BLOCKS,
            }
        )
    start = time.perf_counter()
    index.leave(worker)
    return {"steps": steps, "leave_us": (time.perf_counter() - start) * 1e6}


def choose(ranks: int, requests: int = 400) -> dict[str, Any]:
    """Route prompts of 6,000 tokens, half of each shared, over so many prefill and as many decode ranks."""
    router = Router()
    for name, role in (("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE)):
        router.put(Group(group=name, role=role, epoch=1, state=GroupState.READY, url="http://x", dp_size=ranks))
    rng = random.Random(1)
    shared = [[rng.randrange(129_000) for _ in range(PROMPT_TOKENS // 2)] for _ in range(8)]
    hashing, choosing, again = [], [], []
    for room in range(requests):
        prompt = shared[room % 8] + [rng.randrange(129_000) for _ in range(PROMPT_TOKENS // 2)]
        ask = RouteAsk(prompt, f"session {room % 50}")
        hashing += measured(lambda ask=ask: ask.keys(router.index), 1)
        start = time.perf_counter()
        pair = router.choose(ask, now=room * 0.01)
        choosing.append(time.perf_counter() - start)
        again += measured(lambda ask=ask, room=room: router.choose(ask, now=room * 0.01), 1)
        assert isinstance(pair, Pair)
        for role in Role:
            router.open(room, pair.target(role), PROMPT_TOKENS, uncached=pair.choice.uncached_tokens)
            router.release(room - 50, role)
    micro = {"hash_us": hashing, "choose_us": choosing, "again_us": again}
    return {
        "ranks": ranks,
        **{name: statistics.median(taken) * 1e6 for name, taken in micro.items()},
        "choose_p99_us": statistics.quantiles(choosing, n=100)[98] * 1e6,
    }


def show(result: dict[str, Any]) -> None:
    console = Console()
    table = Table(title=f"Distinct prefixes of {PREFIX_BLOCKS} blocks of 64 tokens")
    for column in ("prefixes", "blocks", "MB (own count)", "MB (resident)", "B/block", "blocks/s stored", "match µs"):
        table.add_column(column, justify="right")
    for step in result["index"]["steps"]:
        table.add_row(
            f"{step['prefixes']:,}",
            f"{step['blocks']:,}",
            f"{step['megabytes']:.1f}",
            f"{step['resident_megabytes']:.1f}",
            f"{step['bytes_per_block']:.0f}",
            f"{step['stored_blocks_per_second']:,.0f}",
            f"{step['match_us']:.2f}",
        )
    console.print(table)
    table = Table(title=f"One choice, {PROMPT_TOKENS:,} prompt tokens: median µs")
    for column in ("prefill + decode ranks", "hash, once", "choose", "choose again", "choose p99"):
        table.add_column(column, justify="right")
    for row in result["choose"]:
        times = (f"{row[name]:.0f}" for name in ("hash_us", "choose_us", "again_us", "choose_p99_us"))
        table.add_row(f"{row['ranks']} + {row['ranks']}", *times)
    console.print(table)
    console.print(
        f"A rank with {result['index']['steps'][-1]['blocks']:,} blocks leaves in {result['index']['leave_us']:.0f} µs."
        f" Load of the machine (1 min): {result['load']:.1f} on {os.cpu_count()} cores."
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.routing", description="What a prefix index and a choice cost."
    )
    parser.add_argument("--prefixes", type=int, default=1_000_000)
    parser.add_argument("--megabytes", type=int, default=64, help="bound of the index")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    result = {
        "index": fill(asked.prefixes, asked.megabytes),
        "choose": [choose(ranks) for ranks in RANKS],
        "load": os.getloadavg()[0],
    }
    if asked.json:
        json.dump(result, sys.stdout, indent=1)
    else:
        show(result)
    steps = result["index"]["steps"]
    return 0 if all(step["found"] and step["megabytes"] <= asked.megabytes for step in steps) else 1


if __name__ == "__main__":
    sys.exit(main())
