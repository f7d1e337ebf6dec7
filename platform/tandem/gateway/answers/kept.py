"""One request's hold on the answer that is kept under its idempotency key.

It *owns* the answer: it is the one that has the engines work, and what is delivered is written down. Or it *follows*:
it reads what the owner has written, as it comes, and renders it anew. A follower whose owner is gone becomes the owner,
and the same answer goes on by migration, behind the tokens that are written down.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from typing import TYPE_CHECKING

import msgspec

from tandem.core.answers import AnswerState, Claim, News, Standing
from tandem.core.pair_events import Failure, FailureKind, Withdraw
from tandem.core.usage import UsageRecord
from tandem.gateway.answers.entries import Complete, Failed, Left, Told, decode, fail
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
WANTED_S = 2.0
"""An answer whose client has gone goes on so long at a time while others follow it."""
_TAKEN_UP = frozenset({FailureKind.STOPPING, FailureKind.CLIENT_GONE})
"""Ends of an owner that say nothing of the request: a follower goes on."""


class Kept:
    """Made by `Answers.claim`. `own` or `follow`, once; `over` in the end."""

    def __init__(self, answers: Answers, journal: Journal, name: str, owner: str, claim: Claim) -> None:
        self.number = claim.number
        self.created = claim.created
        self.owns = claim.standing is Standing.OWNED
        self.replayed = not self.owns or bool(claim.log)
        """An earlier request has begun this answer."""
        self._answers = answers
        self._service = answers.service
        self._journal = journal
        self._name = name
        self._owner = owner
        self._done = claim.standing is Standing.DONE
        self._entries = [entry for batch in claim.log for entry in decode(batch)]
        self._place = len(claim.log)
        self.paid = bool(self._entries) and not any(isinstance(entry, Left) for entry in self._entries)
        """Its tenant's limits were told of this answer, by an owner that has died or still works on it."""
        self._told = Told()
        self._recorder: Recorder | None = None
        self._reply: Reply | None = None
        self._following: asyncio.Task[None] | None = None
        self._outlived = False
        if self.owns:
            self._begin_recording()

    def own(self, asked: Asked, reply: Reply) -> None:
        """Have the engines work on what the log has not got."""
        self._take_in(reply)
        self._go_on(asked, reply)

    def follow(self, asked: Asked, reply: Reply) -> None:
        """Have the reply say what the owner writes down."""
        self._take_in(reply)
        if not self._done:
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
        return msgspec.structs.replace(
            record,
            id=f"{record.id}-r{told.records}",
            prompt_tokens=0 if told.prompt else record.prompt_tokens,
            cached_tokens=0 if told.prompt else record.cached_tokens,
            completion_tokens=max(0, record.completion_tokens - told.completion),
            reasoning_tokens=max(0, record.reasoning_tokens - told.reasoning),
        )

    def over(self, asked: Asked, record: UsageRecord, *, known: bool) -> None:
        """The request is over, and this is its share: it is counted if the answer was its own to the end."""
        if self._following is not None:
            self._following.cancel()
        recorder, self._recorder = self._recorder, None
        self._reply = None
        if recorder is None:
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
        self.owns = True
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
        try:
            await recorder.close(left)
        finally:
            if record is not None and not recorder.fenced:
                self._service.meter.record(record)

    # The follower

    async def _follow(self, asked: Asked, reply: Reply) -> None:
        try:
            async with asyncio.timeout_at(asked.deadline):
                while not await self._step(asked, reply):
                    pass
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
        self._feed(news.log)
        if news.state is AnswerState.DONE:
            return True
        if news.alive:
            return False
        failed = self._told.failed
        if news.state is AnswerState.FREE and failed is not None and failed.kind not in _TAKEN_UP:
            self._fail(failed)
            return True
        if not await self._journal.take(self._name, before=news.owner, owner=self._owner):
            return False
        # The owner may have written until a moment ago.
        last = await self._journal.news(self._name, after=self._place, within=0)
        self._feed(last.log if last is not None else [])
        await self._become_owner(asked, reply, alone=last is None)
        return True

    async def _news(self) -> News | None:
        """None: the answer is not kept any more, or nobody can say."""
        loop = asyncio.get_running_loop()
        until = loop.time() + AWAY_S
        while True:
            try:
                return await self._journal.news(self._name, after=self._place, within=READ_S)
            except JournalDown as error:
                log.debug("could not read the journal of answers: %s", error)
                if loop.time() >= until:
                    return None
                await asyncio.sleep(RETRY_S)

    async def _become_owner(self, asked: Asked, reply: Reply, *, alone: bool) -> None:
        """`alone`: nothing is written down any more. Raises ApiError."""
        log.info("request %s goes on with the answer %s of another", asked.request_id, self.number)
        if alone:
            # Its owner may live, and be counted for it: this has a record of its own, with what it does itself.
            used, told = reply.so_far(), self._told
            told.records, told.prompt = told.records + 1, True
            told.completion, told.reasoning = used.completion, used.reasoning
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

    def _take_in(self, reply: Reply) -> None:
        """The reply says what the log has. Its tickets have names of their own: the answer's may be in use here."""
        self._reply = reply
        if self.replayed:
            for run in reply.runs:
                run.ticket.request = f"{self.number}-{run.index}-{self._owner}"
        tickets = [run.ticket for run in reply.runs]
        for entry in self._entries:
            self._told.take(entry, tickets)
        self._entries = []

    def _feed(self, batches: list[bytes]) -> None:
        assert self._reply is not None, "it follows for a reply"
        tickets = [run.ticket for run in self._reply.runs]
        for batch in batches:
            self._place += 1
            for entry in decode(batch):
                self._told.take(entry, tickets)
        self.paid = self._place > 0 and not self._told.records

    def _fail(self, failed: Failed) -> None:
        if self._reply is not None:
            fail([run.ticket for run in self._reply.runs], failed)
