"""One request's hold on the answer that is kept under its idempotency key.

It *owns* the answer: it is the one that has the engines work, and what is delivered is written down. Or it *follows*:
it reads what the owner has written, as it comes, and renders it anew. A follower whose owner is gone becomes the owner,
and the same answer goes on by migration, behind the tokens that are written down.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import msgspec

from tandem.core.answers import AnswerState, Claim, News, Standing
from tandem.core.pair_events import Failure, FailureKind, Withdraw
from tandem.core.usage import UsageRecord
from tandem.gateway.answers.entries import Complete, Entry, Failed, Left, Tokens, Told, decode, fail, pieces
from tandem.gateway.answers.journal import Journal, JournalDown
from tandem.gateway.answers.recorder import Recorder
from tandem.gateway.errors import ApiError
from tandem.gateway.http.exchange import ClientLeft
from tandem.gateway.pairing.reply import Reply

if TYPE_CHECKING:
    from tandem.gateway.answers.answers import Answers
    from tandem.gateway.asked import Asked

log = logging.getLogger(__name__)

READ_S = 0.5
"""A follower looks so often whether the owner lives; news come at once."""
AWAY_S = 5.0
"""A follower whose journal has been away for so long goes on by itself: a doubled effort is better than none."""
RETRY_S = 0.25
SETTLE_S = 0.5
"""So long the end of an answer waits until it is counted, and closed in the journal."""
WANTED_S = 2.0
"""An answer whose client has gone goes on so long at a time while others follow it."""
TRIES = 20
"""Of taking an answer over, while the journal can be read and not be written."""
TURN_TOKENS = 1000
"""So many are delivered at a time before others have their turn on the event loop."""
INLINE_BYTES = 32 * 1024
"""What is more than that is decoded in a thread."""
_TAKEN_UP = frozenset({FailureKind.STOPPING, FailureKind.CLIENT_GONE})
"""Ends of an owner that say nothing of the request: a follower goes on."""


class Kept:
    """Made by `Answers.claim`. `start` once; `over` in the end."""

    def __init__(
        self,
        answers: Answers,
        journal: Journal,
        name: str,
        tenant: str,
        owner: str,
        claim: Claim,
        entries: list[Entry],
        place: int,
    ) -> None:
        """`entries`: what the log's first `place` batches say."""
        self.number = claim.number
        self.created = claim.created
        self.owns = claim.standing is Standing.OWNED
        self.replayed = not self.owns or bool(claim.log)
        """An earlier request has begun this answer."""
        self._answers = answers
        self._service = answers.service
        self._journal = journal
        self._name = name
        self._tenant = tenant
        self._owner = owner
        self._born = claim.born
        self._done = claim.standing is Standing.DONE
        self._entries = entries
        self._place = place
        self._told = Told()
        self._told.count(entries)
        self.paid = bool(entries) and not self._told.records
        """Its tenant's limits were told of this answer, by an owner that has died or still works on it."""
        self._recorder: Recorder | None = None
        self._reply: Reply | None = None
        self._following: asyncio.Task[None] | None = None
        self._counted = not self.owns
        """Among those that follow."""
        self._taking: asyncio.Future[bool] | None = None
        """It may own the answer by this, and does not know."""
        self._tries = 0
        self._failed = False
        """Its reader was told so: nothing more comes."""
        self._suffix = ""
        self._outlived = False
        self._settled = False
        """It is counted already."""
        if self.owns:
            self._begin_recording()

    def start(self, asked: Asked, reply: Reply) -> None:
        """Have the reply say what the log has and the owner writes down, and the engines work on the rest if that is
        this one."""
        self._reply = reply
        for run in reply.runs:
            # The answer's own name may be in use here, by an owner that is thought dead.
            run.ticket.request = f"{self.number}-{run.index}-{self._owner}"
        if self.owns and not self._entries:
            self._go_on(asked, reply)
        else:
            self._following = self._answers.follow(self._follow(asked, reply), self)

    def withdraw(self) -> None:
        """The gateway goes down: whoever follows an answer here can do so elsewhere."""
        self._fail(Failed(kind=FailureKind.STOPPING, message="this gateway is going down; try again", retry_after=1.0))

    def outlives(self, asked: Asked, error: BaseException | None) -> bool:
        """Whether the request goes on without its client, as one may come back for it; then it is closed later."""
        reply, recorder = asked.reply, self._recorder
        if self._outlived or not isinstance(error, ClientLeft | asyncio.CancelledError):
            return False
        if reply is None or reply.usage is not None or recorder is None or recorder.fenced or recorder.lost:
            return False
        if self._following is not None and not self._following.done():
            return False
        if not self._answers.orphan_s or self._answers.closing:
            return False
        self._outlived = True
        self._answers.go(self._without_client(asked, reply))
        return True

    def share(self, record: UsageRecord) -> UsageRecord:
        """What of the record is this request's own: what no other one was or will be counted for."""
        if not self.owns:
            return msgspec.structs.replace(
                record,
                prompt_tokens=0,
                cached_tokens=0,
                completion_tokens=0,
                reasoning_tokens=0,
                outcome="replayed" if record.outcome == "ok" else record.outcome,
            )
        told = self._told
        if not told.records:
            return record
        completion = max(0, record.completion_tokens - told.completion)
        return msgspec.structs.replace(
            record,
            id=f"{record.id}{self._suffix or f'-r{told.records}'}",
            prompt_tokens=0 if told.prompt else record.prompt_tokens,
            cached_tokens=0 if told.prompt else record.cached_tokens,
            completion_tokens=completion,
            reasoning_tokens=min(completion, max(0, record.reasoning_tokens - told.reasoning)),
        )

    async def settle(self, record: UsageRecord, *, known: bool) -> None:
        """The answer is complete, and this is the request's share: count it and close it, before the client is told.
        What takes longer than `SETTLE_S`, as with a journal that is away, goes on in the background."""
        self._settled = True
        self._stop_following()
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            # Whoever waits here may be cancelled, as his client leaves; this is done all the same.
            closing = self._answers.finish(self._close(recorder, None, record if known else None))
            await asyncio.wait([closing], timeout=SETTLE_S)
        else:
            self._let_go()
            if self.owns and known:
                await self._service.meter.written(record)

    def over(self, asked: Asked, record: UsageRecord, *, known: bool) -> None:
        """The request is over, and this is its share: it is counted if the answer was its own to the end."""
        self._stop_following()
        recorder, self._recorder = self._recorder, None
        self._reply = None
        if self._settled:
            return
        if recorder is None:
            self._let_go()
            if self.owns and known:
                self._service.meter.record(record)
            return
        left = None
        if asked.reply is None or asked.reply.usage is None:
            left = Left(
                prompt=record.prompt_tokens > 0,
                completion=record.completion_tokens,
                reasoning=record.reasoning_tokens,
            )
        self._answers.finish(self._close(recorder, left, record if known else None))

    # The owner

    def _begin_recording(self) -> None:
        self.owns, self._taking = True, None
        self._recorder = Recorder(self._journal, self._name, self._owner, self._place, on_fenced=self._fenced)

    def _go_on(self, asked: Asked, reply: Reply) -> None:
        recorder = self._recorder
        assert recorder is not None, "only an owner has the engines work"
        for run in reply.runs:
            ticket = run.ticket
            if run.over and ticket.end is None:
                # A stop string; its owner did not come to write that it had seen it.
                recorder.note(Complete(choice=run.index, reason="stop", cached=ticket.cached_tokens))
        recorder.listen(reply)
        self._submit(asked, reply)

    def _submit(self, asked: Asked, reply: Reply) -> None:
        """Send the choices that are not complete to the engines."""
        part = copy.copy(reply)
        part.runs = [run for run in reply.runs if run.ticket.end is None and not run.over]
        for run in part.runs:
            if run.ticket.history:
                run.ticket.restore([], None, run.ticket.weight_version)
        self._service.submit(asked, part)

    def _fenced(self) -> None:
        message = "another gateway has taken this request over; ask again with the same key"
        failure = Failure(kind=FailureKind.STOPPING, message=message, retry_after=1.0)
        for run in self._reply.runs if self._reply is not None else ():
            self._service.driver.tell(Withdraw(request=run.ticket.request, failure=failure))

    async def _without_client(self, asked: Asked, reply: Reply) -> None:
        """Read the reply for nobody, as long as somebody may come back for it."""
        error: BaseException | None = None
        loop = asyncio.get_running_loop()
        until = loop.time() + self._answers.orphan_s
        try:
            while reply.usage is None:
                try:
                    async with asyncio.timeout_at(until):
                        while reply.usage is None:
                            await reply.next()
                except TimeoutError:
                    if not await self._wanted():
                        error = ClientLeft()
                        break
                    until = loop.time() + WANTED_S
        except (ApiError, ClientLeft, asyncio.CancelledError) as found:
            error = found
        finally:
            asked.close(error)

    async def _wanted(self) -> bool:
        try:
            return await self._journal.wanted(self._name)
        except JournalDown:
            return False

    async def _close(self, recorder: Recorder, left: Left | None, record: UsageRecord | None) -> None:
        """A complete answer (`left` is None) is counted first: whoever dies in between leaves one that another gateway
        closes, and counts under the same id. The other way round it would be replayed, and never be counted. A part is
        counted last: whoever goes on behind it counts the rest, if he knows of it."""
        if left is None and record is not None and not recorder.fenced:
            await self._service.meter.written(record)
            record = None
        try:
            await recorder.close(left)
        finally:
            if recorder.late:
                # Its tokens are counted, and cannot be kept: nobody is to wait for them, or to go on behind a part.
                self._answers.release(self._name, self._owner, AnswerState.VOID)
            self._answers.rests(self._owner)
            if record is not None and not recorder.fenced:
                await self._service.meter.written(record)

    # The follower

    async def _follow(self, asked: Asked, reply: Reply) -> None:
        try:
            async with asyncio.timeout_at(asked.deadline):
                entries, self._entries = self._entries, []
                await self._deliver(entries)
                if self.owns and not self._failed:
                    self._go_on(asked, reply)
                    return
                while not (self._done or self._failed):
                    self._done = await self._step(asked, reply)
        except TimeoutError:
            self._fail(Failed(kind=FailureKind.DEADLINE, message="the request's time is over"))
        except ApiError as error:
            # There is no place for it now, where its owner had one.
            kind = FailureKind.NO_CAPACITY
            self._fail(Failed(kind=kind, message=error.message, retry_after=error.retry_after or 1.0))
        except Exception:  # the boundary of the task: whoever reads the reply must hear of it
            log.exception("an answer could not be followed")
            self._fail(Failed(kind=FailureKind.BROKEN, message="internal error in the gateway"))

    async def _step(self, asked: Asked, reply: Reply) -> bool:
        """Take what is new; whether that was the last, or the answer is this request's own from now on."""
        news = await self._news()
        if news is None:
            log.warning("the answer %s is not kept any more: it is made again from where it was", self.number)
            await self._become_owner(asked, reply, alone=True)
            return True
        if news.born != self._born:
            message = "its answer was begun anew meanwhile; ask again with the same key"
            self._fail(Failed(kind=FailureKind.STOPPING, message=message, retry_after=1.0))
            return True
        await self._feed(news.log)
        if news.state is AnswerState.DONE:
            return True
        failed = self._told.failed
        if news.state is AnswerState.VOID:
            if failed is not None:
                self._fail(failed)
            else:
                await self._become_owner(asked, reply, alone=True)
            return True
        if news.owner == self._owner:
            await self._become_owner(asked, reply, alone=False)
            return True
        if news.alive:
            if self._answers.forsaken(news.owner):
                await self._try(self._answers.settle(self._name, news.owner))
            return False
        if news.state is AnswerState.FREE and failed is not None and failed.kind not in _TAKEN_UP:
            self._fail(failed)
            return True
        if self._tries >= TRIES:
            await self._become_owner(asked, reply, alone=True)
            return True
        self._tries += 1
        await self._try(self._take(news.owner))
        return False

    async def _try(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except JournalDown as error:
            log.debug("could not write to the journal of answers: %s", error)
            await asyncio.sleep(RETRY_S)

    async def _take(self, before: str) -> None:
        """Be the owner, as the next news will say: the old one may have written until a moment ago. Raises
        JournalDown, and is the owner perhaps."""
        self._answers.works(self._owner)
        self._taking = asyncio.ensure_future(self._journal.take(self._name, before=before, owner=self._owner))
        if not await asyncio.shield(self._taking):
            self._taking = None
            self._answers.rests(self._owner)

    def _let_go(self) -> None:
        """It does not work on the answer that may be its own."""
        taking, self._taking = self._taking, None
        if taking is None:
            self._answers.rests(self._owner)
        else:
            self._answers.release(self._name, self._owner, after=taking)

    async def _news(self) -> News | None:
        """None: the answer is not kept any more, or nobody can say."""
        loop = asyncio.get_running_loop()
        until = loop.time() + AWAY_S
        while True:
            try:
                within = READ_S if self._taking is None else 0
                return await self._journal.news(self._name, after=self._place, within=within)
            except JournalDown as error:
                log.debug("could not read the journal of answers: %s", error)
                if loop.time() >= until:
                    return None
                await asyncio.sleep(RETRY_S)

    async def _become_owner(self, asked: Asked, reply: Reply, *, alone: bool) -> None:
        """`alone`: nothing is written down any more. Raises ApiError."""
        log.info("request %s goes on with the answer %s of another", asked.request_id, self.number)
        self._follows_no_more()
        if alone:
            self._let_go()
            # Its owner may live, and be counted for it: this has a record of its own, with what it does itself. What
            # has come and was not read yet is not that.
            used, told = reply.so_far(), self._told
            told.records, told.prompt = told.records + 1, True
            told.completion = used.completion + sum(len(run.ticket.ids) for run in reply.runs if not run.over)
            told.reasoning = used.reasoning
            self._suffix = f"-{self._owner.replace(':', '-')}"
            self.owns = True
        else:
            self._begin_recording()
        await asked.admit(free=self.paid)
        if self._recorder is not None and asked.permit is not None:
            # The reply was made before there was a permit.
            self._recorder.on_first = asked.permit.started
        if alone:
            self._submit(asked, reply)
        else:
            self._go_on(asked, reply)

    async def _feed(self, batches: list[bytes]) -> None:
        if sum(map(len, batches)) <= INLINE_BYTES:
            entries = decode(batches)
        else:
            entries = await asyncio.to_thread(decode, batches)
        self._place += len(batches)
        self._told.count(entries)
        self.paid = self._place > 0 and not self._told.records
        await self._deliver(entries)

    async def _deliver(self, entries: list[Entry]) -> None:
        """Have the reply say it, in turns."""
        turn = 0
        for entry in entries:
            for piece in pieces(entry, TURN_TOKENS):
                if self._reply is None or self._failed:
                    return
                self._told.take(piece, [run.ticket for run in self._reply.runs])
                turn += len(piece.ids) if isinstance(piece, Tokens) else 0
                if turn >= TURN_TOKENS:
                    turn = 0
                    await asyncio.sleep(0)

    def _stop_following(self) -> None:
        if self._following is not None:
            self._following.cancel()
        self._follows_no_more()

    def _follows_no_more(self) -> None:
        if self._counted:
            self._counted = False
            self._answers.follows_no_more(self._name, self._tenant)

    def _fail(self, failed: Failed) -> None:
        self._failed = True
        if self._reply is not None:
            fail([run.ticket for run in self._reply.runs], failed)
