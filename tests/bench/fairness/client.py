"""One tenant's load: streams at random times (open loop), each with an answer of a random length.

Takes a `Plan` as a line of JSON, prints `started`, and ends with its plan, or with its standard input: then what is
still open is given up. Prints a `Seen` as JSON.
"""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from collections import Counter

import msgspec
import orjson
import uvloop

from bench.gateway.processes import machine
from tandem.engine.http1 import HttpFailure, Pool, Response

WITHIN_S = 60.0


class Plan(msgspec.Struct, kw_only=True, frozen=True):
    """What to ask, of whom."""

    url: str
    key: str
    rate: float
    """Requests per second."""
    lead_s: float
    """So long before anything counts."""
    seconds: float
    most_tokens: int
    """An answer has from one to so many."""
    seed: int


class Seen(msgspec.Struct, kw_only=True):
    """Of the requests that count."""

    ttft_s: list[float] = []
    """Of those that were answered."""
    statuses: dict[int, int] = {}
    late_s: list[float] = []
    """How much later than planned the generator sent."""
    idle: float = 0.0
    """Share of the machine's CPU time that nobody used meanwhile."""


class Load:
    """One tenant."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._pool = Pool()
        self._draw = random.Random(plan.seed)
        self._seen = Seen()
        self._statuses: Counter[int] = Counter()
        self._loop = asyncio.get_running_loop()

    async def run(self, ended: asyncio.Event) -> Seen:
        plan, loop = self._plan, self._loop
        due = begin = loop.time()
        busy, total = machine()
        running: set[asyncio.Task[None]] = set()
        while (due := due + self._draw.expovariate(plan.rate)) < begin + plan.lead_s + plan.seconds:
            await asyncio.sleep(due - loop.time())
            if ended.is_set():
                break
            task = loop.create_task(self._ask(due, counts=due >= begin + plan.lead_s))
            running.add(task)
            task.add_done_callback(running.discard)
        while running and not ended.is_set():
            await asyncio.wait(running, timeout=0.1)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await self._pool.close()
        busy_then, total_then = machine()
        self._seen.idle = 1 - (busy_then - busy) / (total_then - total)
        self._seen.statuses = dict(self._statuses)
        return self._seen

    async def _ask(self, due: float, *, counts: bool) -> None:
        tokens = self._draw.randint(1, self._plan.most_tokens)
        body = orjson.dumps({"model": "standin", "prompt": [5, 6], "max_tokens": tokens, "stream": True})
        headers = [(b"authorization", b"Bearer " + self._plan.key.encode())]
        sent = self._loop.time()
        try:
            begun = self._pool.begin("POST", f"{self._plan.url}/v1/completions", body=body, headers=headers)
            response = begun if isinstance(begun, Response) else await begun
            try:
                status = await response.head(WITHIN_S)
                await response.chunk(WITHIN_S)
                first = self._loop.time()
                await response.read(WITHIN_S)
            finally:
                response.close()
        except HttpFailure as failure:
            print(failure, file=sys.stderr)
            status = 0
        if counts:
            self._statuses[status] += 1
            self._seen.late_s.append(sent - due)
            if status == 200:
                self._seen.ttft_s.append(first - sent)


async def _main() -> None:
    plan = msgspec.json.decode(sys.stdin.readline(), type=Plan)
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def wait() -> None:
        sys.stdin.read()
        loop.call_soon_threadsafe(ended.set)

    threading.Thread(target=wait, daemon=True).start()
    print("started", flush=True)
    print(msgspec.json.encode(await Load(plan).run(ended)).decode(), flush=True)


if __name__ == "__main__":
    uvloop.run(_main())
