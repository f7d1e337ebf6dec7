"""Answers that a gateway may own and does not work on: they are let go of, however long the journal is away.

Another gateway takes an owner for alive as long as its gateway is, so nobody else would ever free them.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from tandem.core.answers import AnswerState, Appended
from tandem.gateway.answers.entries import encode
from tandem.gateway.answers.journal import Journal, JournalDown

log = logging.getLogger(__name__)

RETRY_S = 1.0
MOST = 10_000
"""Then the oldest are left to expire."""
_NOTHING = encode([])


@dataclass
class _Release:
    state: AnswerState
    until: float
    after: asyncio.Future[Any] | None
    doubt: bool
    """It may become the owner's after it was said not to be."""


class Releases:
    """`add`; `settle` what somebody waits for now. Belongs to the event loop that it was made on."""

    def __init__(self, journal: Journal, *, within: float) -> None:
        """`within`: it is tried for so long, in seconds; then the answer has expired by itself."""
        self._journal = journal
        self._within = within
        self._loop = asyncio.get_running_loop()
        self._waiting: dict[tuple[str, str], _Release] = {}
        self._work: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()

    def add(
        self, name: str, owner: str, state: AnswerState = AnswerState.FREE, *, after: asyncio.Future[Any] | None = None
    ) -> None:
        """Put the answer into the state if it is (still) the owner's, when `after` is over: what may make it that."""
        before = self._waiting.pop((name, owner), None)
        if before is not None and before.state is AnswerState.VOID:
            state = AnswerState.VOID
        until = self._loop.time() + self._within
        self._waiting[name, owner] = _Release(state=state, until=until, after=after, doubt=after is not None)
        if len(self._waiting) > MOST:
            log.error("more than %d answers could not be let go of: the journal is away too long", MOST)
            del self._waiting[next(iter(self._waiting))]
        if self._work is None:
            self._work = asyncio.create_task(self._let_go(), name="answer-releases")

    async def settle(self, name: str, owner: str = "") -> None:
        """Let go of the answer now: in the name of this owner, who works on it no more, and of those who are waiting.

        Raises JournalDown."""
        for key in [key for key in self._waiting if key[0] == name]:
            await self._append(*key, self._waiting[key].state)
            owner = "" if key[1] == owner else owner
        if owner:
            await self._append(name, owner, AnswerState.FREE)

    async def close(self, within: float) -> None:
        """Try it once more. What is left ends with the gateway's lease."""
        self._closing.set()
        if (work := self._work) is not None:
            await asyncio.wait([work], timeout=within)
            work.cancel()

    async def _let_go(self) -> None:
        try:
            while self._waiting:
                for key, one in list(self._waiting.items()):
                    await self._try(key, one)
                if self._waiting and self._closing.is_set():
                    return
                if self._waiting:
                    await self._pause()
        finally:
            self._work = None

    async def _try(self, key: tuple[str, str], one: _Release) -> None:
        if one.after is not None:
            await asyncio.wait([one.after], timeout=RETRY_S)
        try:
            found = await self._append(*key, one.state)
        except JournalDown as error:
            log.debug("could not let go of an answer: %s", error)
            if self._loop.time() < one.until:
                return
        else:
            if found is not Appended.WRITTEN and one.doubt:
                # Redis may get to see what was sent first as the last.
                one.doubt = False
                return
        if self._waiting.get(key) is one:
            del self._waiting[key]

    async def _append(self, name: str, owner: str, state: AnswerState) -> Appended:
        return await self._journal.append(name, owner=owner, place=1, entry=_NOTHING, state=state)

    async def _pause(self) -> None:
        try:
            async with asyncio.timeout(RETRY_S):
                await self._closing.wait()
        except TimeoutError:
            pass
