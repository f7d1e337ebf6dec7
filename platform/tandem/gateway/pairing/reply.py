"""A reply on its way: one or several choices, read as they come."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec

from tandem.core.pair_events import Fail, FailureKind
from tandem.gateway.access.admission import Permit
from tandem.gateway.errors import ApiError, from_failure
from tandem.gateway.http.exchange import ClientLeft
from tandem.gateway.observe.metrics import TenantMetrics
from tandem.gateway.observe.tracing import Phase, RequestTrace
from tandem.gateway.pairing.bell import Bell
from tandem.gateway.pairing.pairs import PairDriver
from tandem.gateway.pairing.ticket import Ticket
from tandem.gateway.text.answer import Answer, Piece, Usage

_GIVEN = ("ok", "client_gone")
"""Outcomes of answers that were the client's to judge."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of one choice; with `reason` at its end, and with `usage` at the end of the whole reply."""

    index: int
    piece: Piece
    reason: str | None = None
    usage: Usage | None = None


class Run:
    """One choice: its ticket in the pair table and its answer."""

    def __init__(self, index: int, ticket: Ticket, answer: Answer, driver: PairDriver, reply: Reply) -> None:
        self.index = index
        self.ticket = ticket
        self.answer = answer
        self.failed: Fail | None = None
        self.over = False
        self.reason = ""
        """The finish reason, once it is complete."""
        self._driver = driver
        self._reply: Reply | None = reply
        self._last = 0.0

    def take(self, now: float) -> Step | None:
        """What is new; None if nothing is. Sets `over` with the last, or `failed`, of which `piece` is the rest."""
        ticket = self.ticket
        ids, logprobs, end = ticket.ids, ticket.logprobs, ticket.end
        if not ids and end is None:
            return None
        ticket.ids, ticket.logprobs = [], None
        piece = self.answer.feed(ids, ticket.ended, logprobs)
        if ids:
            assert self._reply is not None, "nothing is taken after the end"
            self._reply.came(len(ids), self._last, now)
            self._last = now
        if self.answer.stopped:
            if end is None:
                self._driver.satisfied(ticket)
            return self._finish(piece, "stop")
        if end is None:
            return Step(index=self.index, piece=piece)
        if isinstance(end, Fail):
            self.failed = end
            return Step(index=self.index, piece=piece)
        return self._finish(piece, end.reason)

    def leave(self) -> None:
        """Nobody wants it any more."""
        self._driver.client_gone(self.ticket)

    def detach(self) -> None:
        """It is over: no cycle is to be left for the collector."""
        self._reply = None

    def _finish(self, piece: Piece, reason: str) -> Step:
        self.over = True
        rest = self.answer.end()
        self.reason = self.answer.reason(reason)
        return Step(index=self.index, piece=piece + rest if rest else piece, reason=self.reason)


class Reply:
    """`next` until a step has `usage`; `leave` when nobody wants the rest."""

    def __init__(
        self,
        bell: Bell,
        prompts: Sequence[Sequence[int]],
        metrics: TenantMetrics,
        arrived: float,
        permit: Permit | None,
        trace: RequestTrace,
    ) -> None:
        """`prompts`: token ids of each prompt; the choices of one follow each other. `arrived` on the loop's clock."""
        self.runs: list[Run] = []
        self.prompts = prompts
        self.usage: Usage | None = None
        """Of the whole reply, when it is complete."""
        self.first: float | None = None
        """When the first token came, on the loop's clock."""
        self._bell = bell
        self._metrics = metrics
        self._arrived = arrived
        self._permit = permit
        self._trace = trace
        self._streaming: Phase | None = None
        self._after_s, self._after = 0.0, 0
        """Over its choices, the time from each one's first token to its last, and the tokens that came in it."""
        self._loop = asyncio.get_running_loop()
        self._open: list[Run] = []
        self._failed: Fail | None = None

    def add(self, run: Run) -> None:
        """One more choice; all are added before the first is read."""
        self.runs.append(run)
        self._open.append(run)

    async def next(self) -> list[Step]:
        """Wait for news. Raises ApiError when a choice has failed, ClientLeft when nobody waits."""
        while True:
            if self._failed is None:
                await self._bell.wait()
            steps = self._take()
            if steps:
                return steps

    def leave(self) -> None:
        """Nobody wants the rest: all legs are ended. Harmless when it is over."""
        for run in self._open:
            run.leave()

    def came(self, tokens: int, last: float, now: float) -> None:
        """Tokens of a choice have come, `last` being when its latest ones had; 0 = these are its first."""
        if last:
            self._after_s += now - last
            self._after += tokens
            self._metrics.tokens_between(now - last, tokens)
        elif self.first is None:
            self.first = now
            self._streaming = self._trace.phase("stream")
            self._metrics.first_token(now - self._arrived, tokens)
            if self._permit is not None:
                self._permit.started()
        else:
            self._metrics.delivered(tokens)

    def close(self, outcome: str) -> None:
        """It is over; nothing more is read."""
        self.leave()
        if self._streaming is not None:
            self._streaming.end(outcome)
        if self.first is not None and outcome in _GIVEN:
            self._metrics.answered(self.first - self._arrived, self._after_s / max(1, self._after))
        for run in self.runs:
            run.detach()

    @property
    def reasons(self) -> list[str]:
        """Why the choices that are complete have ended."""
        return [run.reason for run in self.runs if run.reason]

    @property
    def weight_version(self) -> str:
        """Of the weights that answer; empty = not known yet."""
        return next((version for run in self.runs if (version := run.ticket.answered_by)), "")

    def so_far(self) -> Usage:
        """What was read until now."""
        each = max(1, len(self.runs) // max(1, len(self.prompts)))
        return Usage(
            prompt=sum(map(len, self.prompts)),
            completion=sum(run.answer.completion_tokens for run in self.runs),
            reasoning=sum(run.answer.reasoning_tokens for run in self.runs),
            cached=sum(min(run.ticket.cached_tokens, len(run.ticket.prompt)) for run in self.runs[::each]),
            version=self.weight_version,
        )

    def _take(self) -> list[Step]:
        if self._failed is not None:
            raise self._error(self._failed)
        steps: list[Step] = []
        now = self._loop.time()
        for run in tuple(self._open):
            step = run.take(now)
            if run.failed is not None:
                self._failed = run.failed
            if step is None:
                continue
            if run.over:
                self._open.remove(run)
            if step.piece or run.over:
                steps.append(step)
        if self._failed is not None and not steps:
            raise self._error(self._failed)
        # What has come beside a failure goes out before it.
        if not self._open and steps:
            self.usage = self.so_far()
            steps[-1] = msgspec.structs.replace(steps[-1], usage=self.usage)
        return steps

    def _error(self, end: Fail) -> ApiError | ClientLeft:
        self.leave()
        return ClientLeft() if end.failure.kind is FailureKind.CLIENT_GONE else from_failure(end.failure)
