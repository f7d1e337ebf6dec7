"""Whatever happens in whatever order, the admission table keeps its promises."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tandem.core.admission import AdmissionTable, reserved
from tandem.core.admission_events import Admit, Cancel, Capacity, Ended, Event, Reason, Refuse, Started, Submit, Tick
from tandem.core.tenants import Priority

MAX_WAITING = 12
MAX_TOKENS = 9000
CONCURRENCY = {"a": None, "b": 4, "c": None, "d": 2}
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 1.0}
picks = st.integers(0, 10**6)


class Door(RuleBasedStateMachine):
    """Clients that come and leave, and a fleet whose size changes."""

    def __init__(self) -> None:
        super().__init__()
        self.table = AdmissionTable(max_waiting=MAX_WAITING, max_waiting_tokens=MAX_TOKENS)
        self.now = 1000.0
        self.slots: int | None = 2
        self.prefill: int | None = None
        self.names = itertools.count()
        self.asked: dict[str, Submit] = {}
        self.waiting: dict[str, Submit] = {}
        self.running: dict[str, Submit] = {}
        self.tell(Capacity(slots=2))

    def tell(self, event: Event) -> None:
        for action in self.table.handle(event, self.now):
            submit = self.waiting.pop(action.request)
            if isinstance(action, Refuse):
                assert action.retry_after > 0
                assert action.message
                if action.reason is Reason.CONCURRENCY:
                    assert self.held(submit.tenant) == CONCURRENCY[submit.tenant]
                if action.reason is Reason.QUEUE_FULL:
                    tokens = sum(other.input_tokens for other in self.waiting.values())
                    assert len(self.waiting) >= MAX_WAITING or tokens + 2 * 3000 > MAX_TOKENS
                continue
            assert isinstance(action, Admit)
            if self.slots is not None and self.running:
                assert self.taken() + submit.slots <= self.slots, "more than may run at once"
            assert self.now <= submit.deadline, "started after its deadline"
            own = [name for name, other in self.waiting.items() if same_line(other, submit)]
            assert all(int(name) > int(action.request) for name in own), "a tenant's requests changed their order"
            self.running[action.request] = submit

    def taken(self) -> int:
        return sum(submit.slots for submit in self.running.values())

    def held(self, tenant: str) -> int:
        return sum(other.tenant == tenant for other in [*self.waiting.values(), *self.running.values()])

    @rule(
        tenant=st.sampled_from("abcd"),
        priority=st.sampled_from(Priority),
        tokens=st.integers(0, 3000),
        patience=st.floats(0.1, 100),
        count=st.integers(1, 4),
        slots=st.sampled_from([1, 1, 1, 3, 20]),
    )
    def submit(self, tenant: str, priority: Priority, tokens: int, patience: float, count: int, slots: int) -> None:
        for _ in range(count):
            name = str(next(self.names))
            submit = Submit(
                request=name,
                tenant=tenant,
                priority=priority,
                weight=WEIGHTS[tenant],
                input_tokens=tokens,
                max_output_tokens=500,
                deadline=self.now + patience,
                slots=slots,
                # One class per tenant, or the limit of one flow would not be that of the tenant.
                concurrency=CONCURRENCY[tenant] if priority is Priority.NORMAL else None,
            )
            if CONCURRENCY[tenant] is not None and priority is not Priority.NORMAL:
                return
            self.waiting[name] = submit
            self.tell(submit)

    @precondition(lambda self: self.running)
    @rule(pick=picks, output=st.integers(0, 2000))
    def end(self, pick: int, output: int) -> None:
        name = list(self.running)[pick % len(self.running)]
        del self.running[name]
        self.tell(Ended(request=name, output_tokens=output))

    @precondition(lambda self: self.running)
    @rule(pick=picks)
    def first_token(self, pick: int) -> None:
        self.tell(Started(request=list(self.running)[pick % len(self.running)]))

    @precondition(lambda self: self.waiting)
    @rule(pick=picks)
    def cancel(self, pick: int) -> None:
        name = list(self.waiting)[pick % len(self.waiting)]
        del self.waiting[name]
        self.tell(Cancel(request=name))

    @rule(late=st.sampled_from([Cancel(request="x"), Started(request="x"), Ended(request="x", output_tokens=3)]))
    def of_nobody(self, late: Event) -> None:
        self.tell(late)

    @rule(slots=st.one_of(st.none(), st.integers(0, 12)), prefill=st.one_of(st.none(), st.integers(1, 5000)))
    def capacity(self, slots: int | None, prefill: int | None) -> None:
        self.slots, self.prefill = slots, prefill
        self.tell(Capacity(slots=slots, prefill_tokens=prefill))

    @rule(seconds=st.one_of(st.floats(0, 2), st.floats(0, 100)))
    def time_passes(self, seconds: float) -> None:
        due = self.table.next_deadline()
        self.now += seconds if due is None else max(0.0, min(seconds, due - self.now))
        self.tell(Tick())

    @invariant()
    def nobody_is_lost(self) -> None:
        assert self.table.running == len(self.running)
        for priority in Priority:
            count = sum(submit.priority is priority for submit in self.waiting.values())
            assert self.table.waiting(priority) == count
        assert len(self.waiting) <= MAX_WAITING

    @invariant()
    def no_slot_is_idle_but_the_reserve(self) -> None:
        if self.waiting and self.prefill is None:
            assert self.slots is not None, "waits though there is no limit"
            most = max(min(submit.slots, self.slots) for submit in self.waiting.values())
            assert self.slots == 0 or self.slots - self.taken() <= reserved(self.slots) + most - 1

    @invariant()
    def whoever_waits_has_a_time_at_which_that_ends(self) -> None:
        due = self.table.next_deadline()
        if self.waiting:
            assert due == min(submit.deadline for submit in self.waiting.values())
            assert due > self.now
        else:
            assert due is None

    @invariant()
    def nobody_has_more_than_its_concurrency(self) -> None:
        for tenant, limit in CONCURRENCY.items():
            assert limit is None or self.held(tenant) <= limit

    def teardown(self) -> None:
        """When all is over nothing is left."""
        while self.waiting:
            name = next(iter(self.waiting))
            del self.waiting[name]
            self.tell(Cancel(request=name))
        while self.running:
            self.end(0, 10)
        self.nobody_is_lost()
        assert self.table._held == 0
        assert self.table._prefill_tokens == self.table._in_prefill == self.table._waiting_tokens == 0


def same_line(one: Submit, other: Submit) -> bool:
    return one.tenant == other.tenant and one.priority is other.priority


TestDoor = Door.TestCase
TestDoor.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
TestDoor.pytestmark = [pytest.mark.timeout(180)]
