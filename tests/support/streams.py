"""Greedy streams that go on while a test does something to the fleet."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Sequence
from typing import NamedTuple

from support.fleet import Fleet
from tandem.bench.client import RequestFailed, stream
from tandem.engine.http1 import Pool


class Answered(NamedTuple):
    """One stream that has ended."""

    prompt: int
    """Index of its prompt."""
    ids: list[int]
    error: str


class Streams:
    """In a thread of its own, from `with` to its end; each of `workers` asks for one prompt after the other."""

    def __init__(self, fleet: Fleet, prompts: Sequence[Sequence[int]], tokens: int, workers: int) -> None:
        self._fleet = fleet
        self._prompts = prompts
        self._tokens = tokens
        self._workers = workers
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="streams")
        self.answered: list[Answered] = []

    def __enter__(self) -> Streams:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """No new ones; those that run end."""
        self._stop.set()
        self._thread.join()

    def go_on(self, count: int = 1) -> None:
        """Wait until so many more have ended."""
        wanted = len(self.answered) + count
        self._fleet.until(f"{count} more streams have ended", lambda: len(self.answered) >= wanted, 120)

    @property
    def errors(self) -> list[str]:
        return [one.error for one in self.answered if one.error]

    async def _run(self) -> None:
        pool, numbers = Pool(), itertools.cycle(range(len(self._prompts)))
        try:
            await asyncio.gather(*(self._worker(pool, numbers) for _ in range(self._workers)))
        finally:
            await pool.close()

    async def _worker(self, pool: Pool, numbers: itertools.cycle[int]) -> None:
        while not self._stop.is_set():
            number = next(numbers)
            self.answered.append(await self._one(pool, number))

    async def _one(self, pool: Pool, number: int) -> Answered:
        body = {
            "model": self._fleet.status_model,
            "prompt": list(self._prompts[number]),
            "max_tokens": self._tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        ids: list[int] = []
        try:
            async for piece in stream(pool, self._fleet.base, "/v1/completions", body, within=90):
                ids += piece.token_ids
        except RequestFailed as error:
            return Answered(number, ids, str(error) or "failed")
        return Answered(number, ids, "")
