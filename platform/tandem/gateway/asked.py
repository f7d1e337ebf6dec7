"""One request from its arrival to its end, whatever that is; it is accounted for once."""

from __future__ import annotations

import asyncio
import hashlib
import time
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from tandem.core.tenants import ANONYMOUS, without_limits
from tandem.core.usage import UsageRecord
from tandem.gateway.access.admission import Ask, Permit
from tandem.gateway.access.auth import Identity, check_model
from tandem.gateway.answers.answers import HEADER as IDEMPOTENCY_KEY
from tandem.gateway.answers.answers import Answers
from tandem.gateway.answers.kept import Kept
from tandem.gateway.api.requests import Wanted
from tandem.gateway.api.wire import Writer
from tandem.gateway.errors import ApiError
from tandem.gateway.http.endpoints import Endpoint
from tandem.gateway.http.exchange import ClientLeft
from tandem.gateway.pairing.reply import Reply

if TYPE_CHECKING:
    from tandem.gateway.service import Body, Prepared, Service

CLIENT_CLOSED = 499
"""nginx's status, in the log, for a request whose client has left."""
RATE_LIMITED = 429
USER_CHARACTERS = 256
"""Of OpenAI's `user` field, in a usage record."""


class Asked:
    """A request. `identify`, then `begin`, then read the reply; `close` it in the end, exactly once."""

    def __init__(
        self,
        service: Service,
        endpoint: Endpoint,
        *,
        headers: Mapping[bytes, bytes],
        certificate: Mapping[str, Any] | None,
        request_id: str,
        arrived: float,
        deadline: float | None = None,
        answers: Answers | None = None,
    ) -> None:
        """`arrived` and `deadline` on the loop's clock; no deadline = the gateway's own time-out. `answers` keeps those
        of requests with an idempotency key; None = such keys are not looked at."""
        self.endpoint = endpoint
        self.identity = Identity(ANONYMOUS)
        self.request_id = request_id
        self.number = uuid.uuid4().hex
        """The request's own name: in the pair table, in answers, in usage records. Of an answer that another request
        has begun it is that one's."""
        self.created = int(time.time())
        """When the answer was begun, in Unix seconds."""
        self.kept: Kept | None = None
        """Its hold on the answer of its idempotency key."""
        self.arrived = arrived
        self.deadline = arrived + service.config.request_timeout_s
        if deadline is not None:
            self.deadline = min(self.deadline, deadline)
        self.reply: Reply | None = None
        self.prepared: Prepared | None = None
        self.permit: Permit | None = None
        self.trace = service.tracing.request(headers)
        self._turn = self.number
        self._answers = answers
        self._unkept = False
        self._headers = headers
        self._certificate = certificate
        self._service = service
        self._known = False
        self._closed = False
        self._settled: UsageRecord | None = None
        service.metrics.in_flight.inc()

    @property
    def wanted(self) -> Wanted:
        assert self.prepared is not None, "asked for only after the request was prepared"
        return self.prepared.wanted

    @property
    def session(self) -> str:
        """Requests of one session begin alike, and go where their prefix is."""
        named = self.wanted.session or self._headers.get(b"x-session-id", b"").decode("latin-1")
        if not named:
            return ""
        # As long as any other, whatever the client sent; and one tenant's sessions are no other's.
        whole = f"{self.identity.tenant.name}\0{named}".encode("utf-8", "surrogatepass")
        return hashlib.blake2b(whole, digest_size=16).hexdigest()

    async def identify(self) -> None:
        """Find out who asks. Raises ApiError."""
        self.identity = await self._service.authenticator.identify(self._headers, self._certificate)
        self._known = True

    async def begin(self, body: Body) -> Reply:
        """Everything up to the engines. Raises ApiError, ClientLeft."""
        service, trace = self._service, self.trace
        tenant = self.identity.tenant
        with trace.phase("tokenize"):
            try:
                async with asyncio.timeout_at(self.deadline):
                    self.prepared = prepared = await service.prepare(self.endpoint, body, tenant.name)
            except TimeoutError:
                message = "The request's time was over before it could be read. Try again, or send less at once."
                raise ApiError(504, message, type="server_error", code="timeout") from None
        wanted = prepared.wanted
        check_model(tenant, wanted.model)
        trace.describe(self.endpoint.operation, wanted.model, tandem__tenant=tenant.name)
        await self._claim(body)
        if self.kept is None or self.kept.owns:
            with trace.phase("admission"):
                await self.admit(free=self.kept is not None and self.kept.paid)
        self.reply = reply = service.reply_to(self, self.prepared)
        if self.kept is None:
            service.submit(self, reply)
        else:
            self.kept.start(self, reply)
        return reply

    async def admit(self, *, free: bool = False) -> None:
        """Wait for its turn; `free`: its tenant's limits know of it already. Raises ApiError."""
        service, wanted, prepared = self._service, self.wanted, self.prepared
        assert prepared is not None
        tenant = self.identity.tenant
        ask = Ask(
            tenant=without_limits(tenant) if free else tenant,
            request=self._turn,
            input_tokens=sum(len(prompt.ids) for prompt in prepared.prompts),
            max_output_tokens=prepared.limit * wanted.choices,
            priority=wanted.priority or tenant.priority,
            slots=wanted.choices,
            # From now on: how long its body took to arrive is not the queue's affair.
            deadline=min(self.deadline, asyncio.get_running_loop().time() + service.queue_s),
        )
        self.permit = await service.admission.enter(ask)

    async def _claim(self, body: Body) -> None:
        """Have its answer kept, or find the one that is. Raises ApiError."""
        key = self._headers.get(IDEMPOTENCY_KEY)
        if key is None or self._answers is None:
            return
        self.kept = await self._answers.claim(self, key, body)
        self._unkept = self.kept is None
        if self.kept is not None:
            self.number, self.created = self.kept.number, self.kept.created
            self._draw_seed()

    def _draw_seed(self) -> None:
        """Whichever gateway goes on with the answer samples with the same seed, also where the client gave none."""
        assert self.prepared is not None
        wanted = self.prepared.wanted
        if "sampling_seed" not in wanted.sampling:
            seed = int(self.number, 16) % 2**63
            wanted = msgspec.structs.replace(wanted, sampling={**wanted.sampling, "sampling_seed": seed})
            self.prepared = msgspec.structs.replace(self.prepared, wanted=wanted)

    def writer(self) -> Writer:
        """What turns this request's reply into bytes."""
        assert self.prepared is not None
        return self.endpoint.writer(
            self.wanted, self.number, self.prepared.prompt_ids, self._service.vocabulary, created=self.created
        )

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What the client is told of its limits, of the weights that answer, and of its idempotency key."""
        found = [] if self.permit is None else self.permit.headers()
        if self.reply is not None and (version := self.reply.weight_version):
            found.append((b"x-tandem-weight-version", version.encode("ascii", "replace")))
        if self._unkept:
            return [*found, (b"x-tandem-idempotency", b"unavailable")]
        if self.kept is not None and self.kept.replayed:
            return [*found, (b"idempotent-replayed", b"true")]
        return found

    def leave(self) -> None:
        """Nobody waits for it any more."""
        if self.reply is not None:
            self.reply.leave()

    async def settle(self) -> None:
        """Its reply is complete: count it before its client is told so, lest the record die with this gateway. Waits
        for half a second at most: then the record comes later."""
        if self._closed or self._settled is not None:
            return
        record = self._record("ok")
        if self.kept is not None:
            self._settled = record = self.kept.share(record)
            await self.kept.settle(record, known=self._known)
        else:
            self._settled = record
            if self._known:
                await self._service.meter.written(record)

    def close(self, error: BaseException | None) -> None:
        """It is over: complete, or with this error."""
        if self._closed or (self.kept is not None and self.kept.outlives(self, error)):
            return
        self._closed = True
        if self._settled is not None and isinstance(error, ClientLeft | asyncio.CancelledError):
            error = None  # whoever left between the last token and the end has had it all
        outcome = outcome_of(error)
        service = self._service
        service.metrics.in_flight.dec()
        tokens = 0
        try:
            if self.reply is not None:
                self.reply.close(outcome)
            if self._settled is not None:
                record = self._settled
            else:
                record = self._record(outcome)
                if self.kept is not None:
                    record = self.kept.share(record)
            tokens = record.completion_tokens
        finally:
            # Whatever goes wrong here, its place is for the next.
            if self.permit is not None:
                self.permit.leave(tokens)
        tenant = service.metrics.tenant(record.tenant)
        if self.permit is None and isinstance(error, ApiError) and error.status != RATE_LIMITED:
            # Admission counts its own refusals, and knows more of them.
            tenant.refused(record.outcome)
        if self.reply is not None:
            tenant.usage(
                cached=record.cached_tokens, completion=record.completion_tokens, reasoning=record.reasoning_tokens
            )
        tenant.done(self.endpoint.name, record.outcome, record.seconds)
        if self.kept is not None:
            self.kept.over(self, record, known=self._known)
        elif self._known and self._settled is None:
            # Who has not said who he is uses nothing, and must not be able to fill the sink.
            service.meter.record(record)
        self._log(record, error)
        self.trace.end(
            record.outcome,
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            completion_tokens=record.completion_tokens,
            reasoning_tokens=record.reasoning_tokens,
            finish_reasons=self.reply.reasons if self.reply is not None else (),
        )

    def _record(self, outcome: str) -> UsageRecord:
        service, reply = self._service, self.reply
        now = asyncio.get_running_loop().time()
        used = reply.so_far() if reply is not None else None
        tickets = [run.ticket for run in reply.runs] if reply is not None else []
        first = reply.first if reply is not None else None
        wanted = self.prepared.wanted if self.prepared is not None else None
        return UsageRecord(
            id=self.number,
            at=time.time(),
            model=service.card.name,
            tenant=self.identity.tenant.name,
            key=self.identity.key,
            weight_version=reply.weight_version if reply is not None else "",
            endpoint=self.endpoint.name,
            stream=wanted.stream if wanted is not None else False,
            prompt_tokens=used.prompt if used is not None else 0,
            cached_tokens=used.cached if used is not None else 0,
            completion_tokens=used.completion if used is not None else 0,
            reasoning_tokens=used.reasoning if used is not None else 0,
            choices=wanted.choices if wanted is not None else 1,
            seconds=now - self.arrived,
            ttft_seconds=None if first is None else first - self.arrived,
            service_seconds=sum(ticket.service_seconds(now) for ticket in tickets),
            outcome=outcome,
            attempts=sum(ticket.attempts for ticket in tickets),
            migrations=sum(ticket.migrations for ticket in tickets),
            user=wanted.user[:USER_CHARACTERS] if wanted is not None else "",
            replica=service.replica,
            priority=self.permit.priority.value if self.permit is not None else "",
        )

    def _log(self, record: UsageRecord, error: BaseException | None) -> None:
        service = self._service
        pair = next((run.ticket.pair for run in self.reply.runs if run.ticket.pair), None) if self.reply else None
        status = 200 if error is None else CLIENT_CLOSED if record.outcome == "client_gone" else 500
        prompt = None
        if service.log.log_prompts and self.prepared is not None:
            prompt = "\n".join(service.tokenizer.decode(ids) for ids in self.prepared.prompt_ids)
        service.log.write(
            record,
            status=error.status if isinstance(error, ApiError) else status,
            request_id=self.request_id,
            error=error.message if isinstance(error, ApiError) else "",
            prefill=f"{pair.prefill.group}/{pair.prefill.dp_rank}" if pair else "",
            decode=f"{pair.decode.group}/{pair.decode.dp_rank}" if pair else "",
            trace_id=self.trace.trace_id,
            prompt=prompt,
        )


def outcome_of(error: BaseException | None) -> str:
    """How a request that ended so is counted."""
    if error is None:
        return "ok"
    if isinstance(error, ApiError):
        return error.code or error.type
    if isinstance(error, ClientLeft | asyncio.CancelledError):
        return "client_gone"
    return "internal_error"
