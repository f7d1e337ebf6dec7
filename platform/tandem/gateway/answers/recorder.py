"""The owner's side of an answer that is kept: writes down what is delivered, soon after it is.

Nothing here waits for the journal on the way of a token: what comes within `FLUSH_S` is one entry, written in the
background, in order. While the journal is away entries wait in memory; the stream goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable

from tandem.core.answers import AnswerState, Appended
from tandem.core.pair_events import Fail, FailureKind, Finish
from tandem.engine.client import Ended, Logprob
from tandem.gateway.answers.entries import Complete, Entry, Failed, Left, Tokens, encode
from tandem.gateway.answers.journal import Journal, JournalDown
from tandem.gateway.pairing.reply import Reply
from tandem.gateway.pairing.ticket import Ticket

log = logging.getLogger(__name__)

FLUSH_S = 0.05
RETRY_S = 0.5
LAST_TRIES_S = 30.0
"""An answer that is over waits so long for a journal that is away; then it is not kept."""
_DISTRUSTED = frozenset({FailureKind.BAD_KV})
"""Failures after which what was delivered is not to be trusted: nobody may go on behind it."""


class Recorder:
    """Belongs to one owner of one answer. `listen` to its tickets, then `close` it once."""

    def __init__(
        self,
        journal: Journal,
        name: str,
        owner: str,
        entries: int,
        *,
        on_fenced: Callable[[], object],
    ) -> None:
        """`entries`: how many the log has. `on_fenced` is called when another owner has taken the answer."""
        self.fenced = False
        """Another one owns the answer: nothing of what this one does counts."""
        self.lost = False
        """The answer is not kept any more."""
        self.late = False
        """The journal was away at the end: it does not know how the answer ended."""
        self.on_first: Callable[[], object] | None = None
        """Called with the first tokens."""
        self._journal = journal
        self._name = name
        self._owner = owner
        self._place = entries
        self._on_fenced = on_fenced
        self._loop = asyncio.get_running_loop()
        self._pending: list[Entry] = []
        self._batches: deque[bytes] = deque()
        """Encoded, and not known to be in the journal."""
        self._failed: Failed | None = None
        self._void = False
        self._timer: asyncio.TimerHandle | None = None
        self._work: asyncio.Task[None] | None = None
        self._closed = False
        self._closing = asyncio.Event()

    def listen(self, reply: Reply) -> None:
        """Write down what becomes of the choices that are not complete."""
        for run in reply.runs:
            if run.ticket.end is None:
                run.ticket.listener = _Listener(self, run.index, run.ticket)

    def note(self, entry: Entry) -> None:
        """Something has happened."""
        if self._closed or self.fenced or self.lost:
            return
        if self.on_first is not None and isinstance(entry, Tokens):
            first, self.on_first = self.on_first, None
            first()
        if isinstance(entry, Failed):
            distrusted = entry.kind in _DISTRUSTED
            if self._failed is None or (distrusted and not self._void):
                self._failed = entry
            self._void = self._void or distrusted
            return
        last = self._pending[-1] if self._pending else None
        if not (isinstance(entry, Tokens) and isinstance(last, Tokens) and last.join(entry)):
            self._pending.append(entry)
        if self._timer is None and self._work is None:
            self._timer = self._loop.call_later(FLUSH_S, self._begin)

    async def close(self, left: Left | None) -> bool:
        """It is complete, or its owner lets it go (`left`), or what was delivered is not to be trusted and is not kept;
        returns whether the answer was the owner's to the end.

        Takes long if the journal is away.
        """
        self._closed = True
        self._closing.set()
        if self._timer is not None:
            self._timer.cancel()
        if self._work is not None:
            await asyncio.wait([self._work])
        state = AnswerState.DONE if left is None else AnswerState.FREE
        if self._void:
            assert self._failed is not None, "set with the failure"
            # Who follows is to hear why it ends.
            state, self._pending = AnswerState.VOID, [self._failed]
        elif left is not None:
            self._pending += [left] if self._failed is None else [left, self._failed]
        self._encode()
        try:
            async with asyncio.timeout(LAST_TRIES_S):
                await self._write(state)
        except TimeoutError:
            self.late = True
            log.warning("an answer is not kept any longer: its journal has been away for %g s", LAST_TRIES_S)
        return not self.fenced

    def _begin(self) -> None:
        self._timer = None
        self._work = asyncio.create_task(self._flush(), name="answer-journal")

    async def _flush(self) -> None:
        try:
            while self._pending and not self._closed:
                self._encode()
                await self._write(AnswerState.OPEN)
                if self._pending and not self._closed:
                    # What comes meanwhile goes together.
                    await self._pause(FLUSH_S)
        finally:
            self._work = None

    def _encode(self) -> None:
        pending, self._pending = self._pending, []
        if pending or self._closed:
            self._batches.append(encode(pending))

    async def _write(self, last: AnswerState) -> None:
        """Write all batches, in order; the answer is in state `last` with the last one."""
        pause = FLUSH_S
        while self._batches and not (self.fenced or self.lost):
            state = last if len(self._batches) == 1 else AnswerState.OPEN
            try:
                found = await self._journal.append(
                    self._name, owner=self._owner, place=self._place + 1, entry=self._batches[0], state=state
                )
            except JournalDown as error:
                log.debug("could not write to the journal of answers: %s", error)
                if self._closed and last is AnswerState.OPEN:
                    return
                if self._closed:
                    # Somebody may wait for the answer's end, and the journal may be back at once.
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, RETRY_S)
                else:
                    await self._pause(RETRY_S)
                continue
            if found is Appended.WRITTEN:
                self._batches.popleft()
                self._place += 1
            elif found is Appended.FENCED:
                self.fenced = True
                self._on_fenced()
            else:
                self.lost = True
                log.warning("an answer is not kept any longer: there is no room for it, or its journal was lost")

    async def _pause(self, seconds: float) -> None:
        """Wait, until it is closed at most."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)


class _Listener:
    """See `TicketListener`."""

    def __init__(self, recorder: Recorder, choice: int, ticket: Ticket) -> None:
        self._recorder = recorder
        self._choice = choice
        self._ticket = ticket

    def delivered(self, ids: list[int], logprobs: list[Logprob] | None) -> None:
        ticket = self._ticket
        scored = None if logprobs is None else [(one.logprob, one.token, one.top) for one in logprobs]
        self._recorder.note(
            Tokens(
                choice=self._choice,
                ids=list(ids),
                logprobs=scored,
                version=ticket.weight_version,
                cached=ticket.cached_tokens,
            )
        )

    def finished(self, end: Finish | Fail, ended: Ended | None) -> None:
        if isinstance(end, Fail):
            failure = end.failure
            entry: Entry = Failed(kind=failure.kind, message=failure.message, retry_after=failure.retry_after)
        else:
            cached = self._ticket.cached_tokens
            entry = Complete(choice=self._choice, reason=end.reason, ended=ended, cached=cached)
        self._recorder.note(entry)
