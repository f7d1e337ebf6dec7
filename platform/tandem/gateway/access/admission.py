"""May this request run now? Limits first, then the queue; and what a client is told if not."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

import msgspec

from tandem.core.admission import UNKNOWN_S, AdmissionTable
from tandem.core.admission_events import (
    Action,
    Admit,
    Cancel,
    Capacity,
    Ended,
    Event,
    Reason,
    Refuse,
    Started,
    Submit,
    Tick,
)
from tandem.core.rate_limit import Budget, Reading
from tandem.core.tenants import Priority, Tenant
from tandem.gateway.access.limits import Denial, Grant, Limits, is_limited
from tandem.gateway.errors import ApiError

Headers = list[tuple[bytes, bytes]]

_RANK = {priority: rank for rank, priority in enumerate(Priority)}
_UNITS = {Budget.REQUESTS: "requests", Budget.INPUT: "input tokens", Budget.OUTPUT: "output tokens"}


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """Who wants how much. `deadline`: when it must have started, on the loop's clock."""

    tenant: Tenant
    request: str
    """A name that no other request has."""
    input_tokens: int
    max_output_tokens: int
    priority: Priority
    """Lowered to the tenant's own class if it is above that."""
    deadline: float
    slots: int = 1
    """One for each answer that it is to have."""


class AdmissionObserver(Protocol):
    """Whoever counts what happens. Called on the event loop; must be quick."""

    def queued(self, priority: Priority, length: int) -> None:
        """So many requests of the class wait now."""

    def admitted(self, tenant: str, priority: Priority, waited: float) -> None:
        """One may run, after so many seconds."""

    def refused(self, tenant: str, priority: Priority, reason: str) -> None:
        """`reason`: a `Reason`, or `limit_` and a `Budget`."""


class RateLimited(ApiError):
    """429, with the headers of OpenAI's API."""

    def __init__(
        self, message: str, *, type: str, code: str, reason: str, retry_after: float, readings: list[Reading]
    ) -> None:
        """An infinite `retry_after` says that trying again is of no use. `reason` is for metrics."""
        self.hopeless = math.isinf(retry_after)
        super().__init__(429, message, type=type, code=code, retry_after=0.0 if self.hopeless else retry_after)
        self.reason = reason
        self.readings = readings

    def headers(self) -> Headers:
        found = super().headers() + rate_limit_headers(self.readings)
        if self.hopeless:
            # OpenAI's and Anthropic's clients repeat every 429 unless they are told that it is of no use.
            return [*found, (b"x-should-retry", b"false")]
        return [*found, (b"retry-after-ms", str(math.ceil(self.retry_after * 1000)).encode())]


class Permit:
    """Leave to run. `leave` it exactly once; more often does no harm."""

    __slots__ = ("_admission", "_grant", "_left", "priority", "request", "waited")

    def __init__(
        self, admission: Admission, request: str, priority: Priority, grant: Grant | None, waited: float
    ) -> None:
        self._admission = admission
        self._grant = grant
        self._left = False
        self.request = request
        self.priority = priority
        self.waited = waited
        """Seconds in the queue."""

    def started(self) -> None:
        """The first token is there: prefill has room for others."""
        if not self._left:
            self._admission.started(self.request)

    def leave(self, output_tokens: int) -> None:
        """It is over, after so many output tokens of all choices together."""
        if not self._left:
            self._left = True
            self._admission.leave(self.request, self._grant, output_tokens)

    def headers(self) -> Headers:
        """`x-ratelimit-…`, for a tenant that has such limits."""
        return [] if self._grant is None else rate_limit_headers(self._grant.readings)


class Admission:
    """The door of one gateway replica. Belongs to the event loop that it is used on."""

    def __init__(
        self,
        limits: Limits,
        *,
        slots: int | None = None,
        max_waiting: int = 4096,
        max_waiting_tokens: int = 64_000_000,
        observer: AdmissionObserver | None = None,
    ) -> None:
        """`slots`: how many requests this replica may have running, None = any number; see `set_capacity`."""
        self._limits = limits
        self._observer = observer
        self._table = AdmissionTable(max_waiting=max_waiting, max_waiting_tokens=max_waiting_tokens)
        self._waiters: dict[str, tuple[asyncio.Future[float], Submit]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._closed = False
        self._clock: Callable[[], float] = asyncio.get_running_loop().time
        self._tell(Capacity(slots=slots))

    async def start(self) -> None:
        await self._limits.start()

    async def close(self) -> None:
        """Whoever waits is told that the gateway stops."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for future, _ in list(self._waiters.values()):
            if not future.done():
                future.set_exception(_stopping())
        await self._limits.close()

    @property
    def running(self) -> int:
        return self._table.running

    def waiting(self, priority: Priority) -> int:
        return self._table.waiting(priority)

    @property
    def oldest_s(self) -> float:
        """How long the request has waited that waits longest, in seconds; 0 = nothing waits."""
        since = self._table.waiting_since
        return 0.0 if since is None else self._clock() - since

    def set_capacity(self, slots: int | None, prefill_tokens: int | None = None) -> None:
        """What of this replica's may run at once from now on: its part of the fleet's decode slots, and of the input
        tokens that prefill works on at once; None = no limit."""
        self._tell(Capacity(slots=slots, prefill_tokens=prefill_tokens))

    async def enter(self, ask: Ask) -> Permit:
        """Wait for its turn. Raises ApiError: 429 with Retry-After if it may not or would not run in time."""
        if self._closed:
            raise _stopping()
        tenant = ask.tenant
        submit = Submit(
            request=ask.request,
            tenant=tenant.name,
            priority=ask.priority if _RANK[ask.priority] > _RANK[tenant.priority] else tenant.priority,
            weight=tenant.weight,
            input_tokens=ask.input_tokens,
            max_output_tokens=ask.max_output_tokens,
            deadline=ask.deadline,
            slots=ask.slots,
        )
        if not is_limited(tenant):
            return Permit(self, ask.request, submit.priority, None, await self._queue(submit, []))
        grant = await self._take(ask, submit)
        if grant.concurrency is not None:
            submit = msgspec.structs.replace(submit, concurrency=grant.concurrency)
        try:
            waited = await self._queue(submit, grant.readings)
        except BaseException:
            self._limits.settle(grant, 0, refund=True)
            raise
        return Permit(self, ask.request, submit.priority, grant, waited)

    def started(self, request: str) -> None:
        """See `Permit.started`."""
        self._tell(Started(request=request))

    def leave(self, request: str, grant: Grant | None, output_tokens: int) -> None:
        """See `Permit.leave`."""
        if grant is not None:
            self._limits.settle(grant, output_tokens)
        self._tell(Ended(request=request, output_tokens=output_tokens))

    async def _take(self, ask: Ask, submit: Submit) -> Grant:
        # Looked at before: what the queue would refuse must not use up the tenant's limits.
        objection = self._table.objection(submit, self._clock())
        if objection is not None:
            raise self._refused(submit, _queue_error(objection))
        taken = await self._limits.take(ask.tenant, ask.input_tokens, ask.max_output_tokens)
        if isinstance(taken, Grant):
            return taken
        raise self._refused(submit, _limit_error(taken, ask, self._table.holding_s))

    async def _queue(self, submit: Submit, readings: list[Reading]) -> float:
        """Seconds that it waited. Raises ApiError."""
        actions = self._table.handle(submit, self._clock())
        if len(actions) == 1 and isinstance(actions[0], Admit) and actions[0].request == submit.request:
            self._admitted(submit, actions[0].waited)
            return actions[0].waited
        future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiters[submit.request] = (future, submit)
        self._apply(actions)
        try:
            return await future
        except RateLimited as error:
            error.readings = readings
            raise
        except BaseException:
            # The client has left, or the gateway stops.
            if self._waiters.pop(submit.request, None) is not None:
                self._tell(Cancel(request=submit.request))
            elif not future.cancelled() and future.exception() is None:
                self._tell(Ended(request=submit.request, output_tokens=0))
            raise

    def _tell(self, event: Event) -> None:
        actions = self._table.handle(event, self._clock())
        if actions or self._waiters or self._timer is not None:
            self._apply(actions)

    def _apply(self, actions: list[Action]) -> None:
        todo = deque(actions)
        while todo:
            action = todo.popleft()
            future, submit = self._waiters.pop(action.request)
            if isinstance(action, Refuse):
                error = self._refused(submit, _queue_error(action))
                if not future.done():
                    future.set_exception(error)
            elif future.done():
                # Its client left a moment ago: its place is for the next.
                todo += self._table.handle(Ended(request=action.request, output_tokens=0), self._clock())
            else:
                self._admitted(submit, action.waited)
                future.set_result(action.waited)
        if self._observer is not None:
            for priority in Priority:
                self._observer.queued(priority, self._table.waiting(priority))
        self._arm()

    def _arm(self) -> None:
        due = self._table.next_deadline()
        if self._timer is not None and (due is None or self._timer_due != due):
            self._timer.cancel()
            self._timer = None
        if due is not None and self._timer is None and not self._closed:
            # Kept here, as uvloop's handle of a time that is due already does not tell it.
            self._timer, self._timer_due = asyncio.get_running_loop().call_at(due, self._tick), due

    def _tick(self) -> None:
        self._timer = None
        self._tell(Tick())

    def _admitted(self, submit: Submit, waited: float) -> None:
        if self._observer is not None:
            self._observer.admitted(submit.tenant, submit.priority, waited)

    def _refused(self, submit: Submit, error: RateLimited) -> RateLimited:
        if self._observer is not None:
            self._observer.refused(submit.tenant, submit.priority, error.reason)
        return error


def rate_limit_headers(readings: list[Reading]) -> Headers:
    """OpenAI's headers. It has one limit of tokens; of ours, the one with the smaller part left is shown."""
    found: Headers = []
    requests = [reading for reading in readings if reading.budget is Budget.REQUESTS]
    tokens = [reading for reading in readings if reading.budget is not Budget.REQUESTS]
    tightest = min(tokens, key=lambda reading: reading.remaining / (reading.limit or 1), default=None)
    for unit, reading in (("requests", requests[0] if requests else None), ("tokens", tightest)):
        if reading is not None:
            found += [
                (f"x-ratelimit-limit-{unit}".encode(), str(int(reading.limit)).encode()),
                (f"x-ratelimit-remaining-{unit}".encode(), str(int(reading.remaining)).encode()),
                (f"x-ratelimit-reset-{unit}".encode(), span(reading.reset_s).encode()),
            ]
    return found


def span(seconds: float) -> str:
    """A time as OpenAI writes it: 120ms, 8.64s, 6m0s, 1h2m3s."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{math.ceil(seconds * 100) / 100:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s"


def _limit_error(denial: Denial, ask: Ask, holding_s: float | None) -> RateLimited:
    tenant = ask.tenant.name
    if denial.shortage is None:
        retry = UNKNOWN_S if holding_s is None else holding_s / max(1, denial.limit)
        message = f"{denial.limit} requests of {tenant} run or wait, as many as may at once. Wait until one has ended."
        return RateLimited(
            message,
            type="requests",
            code="rate_limit_exceeded",
            reason=Reason.CONCURRENCY.value,
            retry_after=retry,
            readings=denial.readings,
        )
    budget, wait = denial.shortage.budget, denial.shortage.wait_s
    limit = f"{denial.limit} {_UNITS[budget]} per minute"
    if math.isinf(wait) and denial.limit:
        message = f"The request is too large for {tenant}: {ask.input_tokens} input tokens, and the limit is {limit}."
    elif math.isinf(wait):
        message = f"{tenant} may use no {_UNITS[budget]}: the limit is {limit}."
    else:
        message = f"Rate limit reached for {tenant}: {limit}. Please try again in {span(wait)}."
    return RateLimited(
        message,
        type="requests" if budget is Budget.REQUESTS else "tokens",
        code="rate_limit_exceeded",
        reason=f"limit_{budget.value}",
        retry_after=wait,
        readings=denial.readings,
    )


def _queue_error(refusal: Refuse) -> RateLimited:
    limited = refusal.reason is Reason.CONCURRENCY
    return RateLimited(
        f"The request was not started: {refusal.message}. Please try again in {span(refusal.retry_after)}.",
        type="requests",
        code="rate_limit_exceeded" if limited else "overloaded",
        reason=refusal.reason.value,
        retry_after=refusal.retry_after,
        readings=[],
    )


def _stopping() -> ApiError:
    message = "The gateway goes down. Please try again: another one will answer."
    return ApiError(503, message, type="server_error", code="stopping", retry_after=1.0)
