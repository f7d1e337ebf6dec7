"""Admission: which request may run now, which waits, which is refused, as one pure table. Events in, actions out.

Order
- A higher class goes first. Of what is started, each lower class that waits is owed `LOWER_SHARE` (in tokens), so it
  is slowed down, never starved.
- In a class, tenants share by weight (`fair_queue.py`).
- A tenant's own requests start in the order they came.

The reserve
Fair order is not enough for a polite tenant: where a greedy one holds every slot, each request must first wait for
some slot to become free. So while several tenants are here, a few slots (`reserved`), and a quarter of prefill, are
kept from those that hold more than their share. Who holds less than its share, or did of late, takes them at once, at
most the requests of one share ahead of its turn; and they are filled again before others get anything. A tenant that
is alone in its class, with none above it, may use everything; when another comes, its first request may have to wait
for a slot. Slots become free at the rate of the whole fleet, but are taken by the few below their share, whose part of
the load is p: so the reserve is empty for about p ** reserved of the time, 0.2 % for four slots and a polite tenant
with a fifth of the load. Below some 24 slots a fifth of the load in bursts is itself more than half of them, and no
order helps against that.

Deadlines
The start of a new request is predicted from those that go before it (of higher classes all, of its class what its
tenants' weights let go before) and from how fast slots become free: what runs ÷ the mean holding time
(`service_rate.py`). A request that would start after its deadline is refused at once. Without an estimate it waits.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

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
from tandem.core.fair_queue import Asked, FairQueue, Flow
from tandem.core.service_rate import ServiceRate
from tandem.core.tenants import Priority

LOWER_SHARE = 0.05
PREFILL_PART = 0.75
"""Of what prefill may work on, so much is for tenants above their share."""
UNKNOWN_S = 1.0
"""When to come back if nothing is known."""
_LOOK_AHEAD = 32
"""Tenants that are looked at before a slot is left free."""


def reserved(slots: int) -> int:
    """Slots that are kept for tenants below their share: four, or 3 % of many, or a quarter of few."""
    return max(min(4, slots // 4), slots // 32)


class AdmissionTable:
    """All requests that wait or run. `handle` is the only way in; it never blocks and never reads a clock."""

    def __init__(self, *, max_waiting: int = 4096, max_waiting_tokens: int = 64_000_000) -> None:
        """At most so many requests, and input tokens of them, wait."""
        self._max_waiting = max_waiting
        self._max_waiting_tokens = max_waiting_tokens
        self._queues = [FairQueue() for _ in Priority]
        self._rank = {priority: rank for rank, priority in enumerate(Priority)}
        self._owed = [0.0 for _ in Priority]
        self._waiting: dict[str, Asked] = {}
        self._waiting_tokens = 0
        self._running: dict[str, Asked] = {}
        self._held = 0
        """Slots of those."""
        self._prefill_tokens = 0
        self._in_prefill = 0
        self._slots: int | None = None
        self._prefill_limit: int | None = None
        self._reserve = 0
        self._rate = ServiceRate()
        self._deadlines: list[tuple[float, str]] = []
        self._handlers: dict[type[Event], Callable[[Any, float], list[Action]]] = {
            Submit: self._submit,
            Cancel: self._cancel,
            Started: self._started,
            Ended: self._ended,
            Capacity: self._capacity,
            Tick: self._tick,
        }

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event at time `now` (seconds, never going back) and return what is to be done, in order.

        What comes late (a request that is over) is dropped. Raises ValueError for a request name that is in use.
        """
        return self._handlers[type(event)](event, now)

    @property
    def running(self) -> int:
        return len(self._running)

    def waiting(self, priority: Priority) -> int:
        return self._queues[self._rank[priority]].length

    @property
    def waiting_since(self) -> float | None:
        """When the request began to wait that waits longest; None = nothing waits."""
        oldest = next(iter(self._waiting.values()), None)
        return None if oldest is None else oldest.since

    @property
    def holding_s(self) -> float | None:
        """Mean seconds for which a request runs; None = too little was seen."""
        return self._rate.holding_s

    def next_deadline(self) -> float | None:
        """When `Tick` is due at the latest; None = nothing waits."""
        while self._deadlines:
            due, request = self._deadlines[0]
            asked = self._waiting.get(request)
            if asked is not None and asked.submit.deadline == due:
                return due
            heapq.heappop(self._deadlines)
        return None

    def objection(self, event: Submit, now: float) -> Refuse | None:
        """Why the request would be refused if it came now. Changes nothing that matters."""
        queue = self._queues[self._rank[event.priority]]
        flow = queue.flows.get(event.tenant)
        if event.concurrency is not None and flow is not None and flow.held_here >= event.concurrency:
            return self._too_many(event, flow)
        if not self._waiting and self._has_room(event) and now <= event.deadline:
            return None
        self._rate.observe(now, len(self._running))
        wait = self._predict(event, flow)
        if now + (wait or 0.0) > event.deadline:
            wait = wait or 0.0
            late = max(now + wait - event.deadline, 0.001)
            patience = max(0.0, event.deadline - now)
            message = f"the request would wait {wait:.1f} s for its turn, longer than the {patience:.1f} s that it has"
            return Refuse(request=event.request, reason=Reason.DEADLINE, message=message, retry_after=late)
        if self._over_full(event) and self._to_push_out(event, queue) is None:
            return self._full(event.request)
        return None

    # Events

    def _submit(self, event: Submit, now: float) -> list[Action]:
        if event.request in self._waiting or event.request in self._running:
            raise ValueError(f"request {event.request} is already in the table")
        refusal = self.objection(event, now)
        if refusal is not None:
            return [refusal]
        queue = self._queues[self._rank[event.priority]]
        self._forget_quiet(now)
        flow = queue.flow(event.tenant, event.weight, now)
        asked = Asked(event, flow, now)
        if not self._waiting and self._may_start(queue, asked, now):
            queue.start_at_once(asked, now)
            return [self._run(asked, now)]
        actions: list[Action] = []
        while self._over_full(event):
            last = self._to_push_out(event, queue)
            if last is None:
                return [*actions, self._full(event.request)]
            self._leave_queue(last)
            actions.append(self._full(last.submit.request))
        queue.push(asked)
        self._waiting[event.request] = asked
        self._waiting_tokens += event.input_tokens
        self._arm(event)
        return actions + self._fill(now)

    def _cancel(self, event: Cancel, now: float) -> list[Action]:
        asked = self._waiting.get(event.request)
        if asked is None:
            return []
        self._leave_queue(asked)
        return self._fill(now)

    def _started(self, event: Started, now: float) -> list[Action]:
        asked = self._running.get(event.request)
        if asked is None or not asked.in_prefill:
            return []
        self._leave_prefill(asked)
        return self._fill(now) if self._waiting else []

    def _ended(self, event: Ended, now: float) -> list[Action]:
        asked = self._running.get(event.request)
        if asked is None:
            return []
        self._rate.observe(now, len(self._running), ended=1)
        del self._running[event.request]
        self._held -= asked.submit.slots
        if asked.in_prefill:
            self._leave_prefill(asked)
        self._queue_of(asked).end(asked, event.output_tokens, now)
        return self._fill(now) if self._waiting else []

    def _capacity(self, event: Capacity, now: float) -> list[Action]:
        self._slots = event.slots
        self._prefill_limit = event.prefill_tokens
        self._reserve = 0 if event.slots is None else reserved(event.slots)
        for queue in self._queues:
            queue.slots = event.slots or 0
        return self._fill(now)

    def _tick(self, event: Tick, now: float) -> list[Action]:
        return self._fill(now)

    # Who is next

    def _fill(self, now: float) -> list[Action]:
        """Send away what is too late, and start what may be started."""
        self._forget_quiet(now)
        actions: list[Action] = []
        while (due := self.next_deadline()) is not None and due <= now:
            actions.append(self._too_late(self._waiting[self._deadlines[0][1]], now))
        while self._waiting and self._has_slot():
            asked = self._next(now)
            if asked is None:
                break
            rank = self._rank[asked.submit.priority]
            self._owed[rank] = max(0.0, self._owed[rank] - asked.charge)
            for lower in range(rank + 1, len(self._queues)):
                if self._queues[lower].length:
                    self._owed[lower] += LOWER_SHARE * asked.charge
            queue = self._queues[rank]
            del self._waiting[asked.submit.request]
            self._waiting_tokens -= asked.submit.input_tokens
            queue.start(asked, now)
            self._settle_owed(rank)
            actions.append(self._run(asked, now))
        return actions

    def _next(self, now: float) -> Asked | None:
        top = next(rank for rank, queue in enumerate(self._queues) if queue.length)
        for rank in range(len(self._queues) - 1, top, -1):
            queue = self._queues[rank]
            if queue.length:
                head = next(queue.in_order()).head
                due = self._owed[rank] >= head.charge
                if due and self._has_room(head.submit) and self._fits_prefill(head, 1.0):
                    return head
        queue = self._queues[top]
        lowest: float | None = None
        for looked, flow in enumerate(queue.in_order()):
            head = flow.head
            if lowest is None:
                lowest = flow.counter
            elif looked >= _LOOK_AHEAD or flow.counter - lowest > queue.share(flow) * head.charge / flow.weight:
                return None
            if self._may_start(queue, head, now):
                return head
        return None

    def _may_start(self, queue: FairQueue, asked: Asked, now: float) -> bool:
        if self._slots is None:
            return self._fits_prefill(asked, 1.0)
        # One that wants more than there is may start when nothing else runs.
        wanted = min(asked.submit.slots, self._slots)
        free = self._slots - self._held
        if free < wanted or not self._slots:
            return False
        higher = any(above.flows for above in self._queues[: self._rank[asked.submit.priority]])
        if not higher and (len(queue.flows) == 1 or self._below_share(queue, asked, now)):
            return self._fits_prefill(asked, 1.0)
        spared = free - wanted >= self._reserve or not self._held
        return spared and self._fits_prefill(asked, PREFILL_PART)

    def _below_share(self, queue: FairQueue, asked: Asked, now: float) -> bool:
        """Whether it may use the reserve. Whoever held less than its share of late may hold as much more now."""
        flow = asked.flow
        if not flow.running:
            return True
        assert self._slots, "nothing runs where nothing may"
        part = 2 * flow.weight / queue.weights - flow.mean_running(now) / self._slots
        if flow.held + asked.submit.slots > part * self._slots:
            return False
        if self._prefill_limit is None or not flow.prefill_tokens:
            return True
        return flow.prefill_tokens + asked.submit.input_tokens <= part * self._prefill_limit

    def _has_slot(self) -> bool:
        return self._slots is None or self._held < self._slots

    def _has_room(self, event: Submit) -> bool:
        return self._slots is None or self._held + min(event.slots, self._slots) <= self._slots

    def _fits_prefill(self, asked: Asked, part: float) -> bool:
        """Whether its input may go to prefill; one request always may, however long."""
        if self._prefill_limit is None or not self._in_prefill:
            return True
        return self._prefill_tokens + asked.submit.input_tokens <= part * self._prefill_limit

    # Prediction

    def _predict(self, event: Submit, flow: Flow | None) -> float | None:
        """Seconds until the request would start; None = not known."""
        ahead = self._ahead(event, flow)
        free = 0 if self._slots is None else max(0, self._slots - self._held - self._reserve)
        if ahead < free:
            return 0.0
        one = self._slot_every()
        return None if one is None else (ahead + 1 - free) * one

    def _ahead(self, event: Submit, flow: Flow | None) -> float:
        """Requests that go before it."""
        rank = self._rank[event.priority]
        queue = self._queues[rank]
        turn = (len(flow.waiting) + 1) / event.weight if flow is not None else 1 / event.weight
        own = len(flow.waiting) if flow is not None else 0
        others = sum(
            min(len(other.waiting), turn * other.weight) for other in queue.in_order() if other.name != event.tenant
        )
        return own + others + sum(above.length for above in self._queues[:rank])

    def _slot_every(self) -> float | None:
        """Seconds between two slots that become free; None = not known."""
        holding = self._rate.holding_s
        return None if holding is None or not self._running else holding / len(self._running)

    def _one_slot_s(self) -> float:
        return self._slot_every() or UNKNOWN_S

    # The bound of the queue

    def _over_full(self, event: Submit) -> bool:
        tokens = self._waiting_tokens + event.input_tokens
        return len(self._waiting) >= self._max_waiting or (bool(self._waiting) and tokens > self._max_waiting_tokens)

    def _to_push_out(self, event: Submit, queue: FairQueue) -> Asked | None:
        """Whose last request gives its place to the new one: of the lowest class, the tenant with most for its
        weight; None if the new one has no better right."""
        for victims in reversed(self._queues[self._rank[event.priority] :]):
            most = victims.longest()
            if most is None:
                continue
            if victims is queue:
                mine = queue.flows.get(event.tenant)
                own = (1 if mine is None else len(mine.waiting) + 1) / event.weight
                if most is mine or len(most.waiting) / most.weight <= own:
                    return None
            return next(reversed(most.waiting.values()))
        return None

    def _full(self, request: str) -> Refuse:
        message = f"{len(self._waiting)} requests wait already, which is all that may"
        return Refuse(request=request, reason=Reason.QUEUE_FULL, message=message, retry_after=self._one_slot_s())

    def _too_many(self, event: Submit, flow: Flow) -> Refuse:
        message = f"{flow.held_here} requests of yours wait or run already; {event.concurrency} may at once"
        holding = self._rate.holding_s
        retry = UNKNOWN_S if holding is None or not flow.running else holding / flow.running
        return Refuse(request=event.request, reason=Reason.CONCURRENCY, message=message, retry_after=retry)

    def _too_late(self, asked: Asked, now: float) -> Refuse:
        self._leave_queue(asked)
        message = f"the request waited {now - asked.since:.1f} s for its turn, and its time is over"
        retry = self._one_slot_s()
        return Refuse(request=asked.submit.request, reason=Reason.DEADLINE, message=message, retry_after=retry)

    # Bookkeeping

    def _arm(self, event: Submit) -> None:
        if len(self._deadlines) > 64 + 2 * len(self._waiting):
            # Most entries are of requests that wait no longer.
            self._deadlines = [(asked.submit.deadline, name) for name, asked in self._waiting.items()]
            heapq.heapify(self._deadlines)
        else:
            heapq.heappush(self._deadlines, (event.deadline, event.request))

    def _forget_quiet(self, now: float) -> None:
        for queue in self._queues:
            if queue.flows:
                queue.forget_quiet(now)

    def _run(self, asked: Asked, now: float) -> Admit:
        self._rate.observe(now, len(self._running))
        self._running[asked.submit.request] = asked
        self._held += asked.submit.slots
        asked.in_prefill = True
        asked.flow.prefill_tokens += asked.submit.input_tokens
        self._in_prefill += 1
        self._prefill_tokens += asked.submit.input_tokens
        return Admit(request=asked.submit.request, waited=now - asked.since)

    def _leave_prefill(self, asked: Asked) -> None:
        asked.in_prefill = False
        asked.flow.prefill_tokens -= asked.submit.input_tokens
        self._in_prefill -= 1
        self._prefill_tokens -= asked.submit.input_tokens

    def _leave_queue(self, asked: Asked) -> None:
        del self._waiting[asked.submit.request]
        self._waiting_tokens -= asked.submit.input_tokens
        self._queue_of(asked).remove(asked)
        self._settle_owed(self._rank[asked.submit.priority])

    def _settle_owed(self, rank: int) -> None:
        if not self._queues[rank].length:
            self._owed[rank] = 0.0

    def _queue_of(self, asked: Asked) -> FairQueue:
        return self._queues[self._rank[asked.submit.priority]]
