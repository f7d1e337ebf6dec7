"""A request in the pair table, as the one who submitted it sees it."""

from __future__ import annotations

import asyncio

import msgspec

from tandem.core.pair_events import Fail, Finish
from tandem.engine.client import Ended


class News(msgspec.Struct):
    """What has come of a request since the last look."""

    ids: list[int]
    end: Finish | Fail | None


class Ticket:
    """A request in the table, as the one who submitted it sees it."""

    def __init__(self, request: str, common: bytes, prompt_tokens: int) -> None:
        self.request = request
        self.common = common
        """The part of the engines' JSON body that all legs share (see `leg_body`)."""
        self.prompt_tokens = prompt_tokens
        self.cached_tokens = 0
        self.ended: Ended | None = None
        """How decode ended; set before the `Finish` is seen."""
        self._ids: list[int] = []
        self._end: Finish | Fail | None = None
        self._wake = asyncio.Event()

    async def news(self) -> News:
        """Wait for tokens or the end; both may come together. The table's deadlines bound the wait."""
        await self._wake.wait()
        self._wake.clear()
        ids, self._ids = self._ids, []
        return News(ids, self._end)

    def deliver(self, ids: list[int]) -> None:
        self._ids += ids
        self._wake.set()

    def finish(self, end: Finish | Fail) -> None:
        self._end = end
        self._wake.set()
