"""Where answers are kept: what every such place can do, and the one within a single gateway."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from tandem.core.answers import AnswerState, AnswerTable, Appended, Claim, Limits, News


class JournalDown(Exception):
    """The journal cannot be reached, or did not answer in time."""

    def __init__(self, why: str, *, sent: bool = True) -> None:
        """`sent`: what was asked may have been done."""
        super().__init__(why)
        self.sent = sent


class Journal(Protocol):
    """See `core.answers`. `owner` names one attempt of one gateway at an answer: `<incarnation>:<number>`.

    All calls raise JournalDown, within their deadline.
    """

    async def claim(
        self, name: str, *, tenant: str, fingerprint: str, number: str, created: int, owner: str
    ) -> Claim: ...
    async def take(self, name: str, *, before: str, owner: str) -> bool: ...
    async def append(self, name: str, *, owner: str, place: int, entry: bytes, state: AnswerState) -> Appended: ...
    async def restart(self, name: str, *, owner: str) -> bool: ...
    async def news(self, name: str, *, after: int, within: float) -> News | None:
        """As soon as there is news, at the latest after `within` seconds; None if the answer is not kept any more."""

    async def wanted(self, name: str) -> bool:
        """Whether somebody has waited for its news a moment ago."""

    async def close(self) -> None:
        """No call may follow. What its gateway owns is nobody's now."""


class LocalJournal:
    """For a gateway whose state is embedded: it keeps its own answers, and no other gateway knows of them."""

    def __init__(self, limits: Limits, *, clock: Callable[[], float] | None = None) -> None:
        self._table = AnswerTable(limits, on_change=self._changed)
        self._clock = clock or asyncio.get_running_loop().time
        self._waiting: dict[str, set[asyncio.Event]] = {}

    async def claim(self, name: str, *, tenant: str, fingerprint: str, number: str, created: int, owner: str) -> Claim:
        return self._table.claim(
            name,
            tenant=tenant,
            fingerprint=fingerprint,
            number=number,
            created=created,
            owner=owner,
            now=self._clock(),
        )

    async def take(self, name: str, *, before: str, owner: str) -> bool:
        return self._table.take(name, before=before, owner=owner, now=self._clock())

    async def append(self, name: str, *, owner: str, place: int, entry: bytes, state: AnswerState) -> Appended:
        return self._table.append(name, owner=owner, place=place, entry=entry, state=state, now=self._clock())

    async def restart(self, name: str, *, owner: str) -> bool:
        return self._table.restart(name, owner=owner, now=self._clock())

    async def news(self, name: str, *, after: int, within: float) -> News | None:
        changed = asyncio.Event()
        self._waiting.setdefault(name, set()).add(changed)
        try:
            found = self._table.news(name, after=after, now=self._clock())
            if found is None or found.log or not found.alive:
                return found
            try:
                async with asyncio.timeout(within):
                    await changed.wait()
            except TimeoutError:
                return found
            return self._table.news(name, after=after, now=self._clock())
        finally:
            self._waiting[name].discard(changed)
            if not self._waiting[name]:
                del self._waiting[name]

    async def wanted(self, name: str) -> bool:
        return name in self._waiting

    async def close(self) -> None:
        """Nothing is to be let go of: it all ends with the gateway."""

    def _changed(self, name: str) -> None:
        for one in self._waiting.get(name, ()):
            one.set()
