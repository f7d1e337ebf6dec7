"""Streams that follow each other without a pause, as many at a time as is wanted, and what they see."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from tandem.bench.client import RequestFailed, stream
from tandem.engine.http1 import Pool

TOKENS = 120
_WITHIN_S = 60.0
_AGAIN_S = 1.0
"""A fleet that refuses is not asked in a loop."""


class Clients:
    """Belongs to one event loop."""

    def __init__(self, base: str, model: str) -> None:
        self.answers = 0
        self.failed = 0
        self.other = 0
        """Answers to a prompt that differ from the first answer to it: they are greedy."""
        self._base = base
        self._model = model
        self._pool = Pool()
        self._wanted = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._gaps: deque[tuple[float, float]] = deque()
        """When, and seconds since the token before."""
        self._first: dict[int, tuple[int, ...]] = {}

    def want(self, count: int) -> None:
        """From now on so many streams at a time; those above it end with their answer."""
        self._wanted = count
        running = [task for task in self._tasks if not task.done()]
        started = range(len(running), count)
        self._tasks = running + [asyncio.create_task(self._client(number), name="client") for number in started]

    def itl(self, window_s: float) -> float | None:
        """95th percentile of the seconds between tokens over the last `window_s`; None = there were none."""
        since = time.monotonic() - window_s
        gaps = sorted(gap for at, gap in self._gaps if at >= since)
        return gaps[int(0.95 * (len(gaps) - 1))] if gaps else None

    async def stop(self) -> None:
        """Let what runs end."""
        self._wanted = 0
        async with asyncio.timeout(2 * _WITHIN_S):
            await asyncio.gather(*self._tasks)
        await self._pool.close()

    async def _client(self, number: int) -> None:
        while number < self._wanted:
            try:
                ids = await self._ask(number)
            except RequestFailed:
                self.failed += 1
                await asyncio.sleep(_AGAIN_S)
                continue
            self.answers += 1
            if ids != self._first.setdefault(number, ids):
                self.other += 1

    async def _ask(self, number: int) -> tuple[int, ...]:
        body = {
            "model": self._model,
            "prompt": [3 + (number * 31 + place * 7) % 500 for place in range(40)],
            "max_tokens": TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        ids: list[int] = []
        before = None
        async for piece in stream(self._pool, self._base, "/v1/completions", body, within=_WITHIN_S):
            now = time.monotonic()
            ids += piece.token_ids
            if before is not None and piece.token_ids:
                self._gaps.append((now, (now - before) / len(piece.token_ids)))
            before = now
        while self._gaps and self._gaps[0][0] < time.monotonic() - 60:
            self._gaps.popleft()
        return tuple(ids)
