"""Who goes first, who waits, who is sent away."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.admission import LOWER_SHARE, AdmissionTable, reserved
from tandem.core.admission_events import Action, Admit, Cancel, Capacity, Ended, Reason, Refuse, Started, Submit, Tick
from tandem.core.fair_queue import OUTPUT_FACTOR, RECENT_S
from tandem.core.service_rate import ServiceRate
from tandem.core.tenants import Priority

_names = itertools.count()


class Door:
    """A table whose requests are named after their tenants."""

    def __init__(self, slots: int | None, prefill: int | None = None, **bounds: int) -> None:
        self.table = AdmissionTable(**bounds)
        self.now = 0.0
        self.running: list[str] = []
        self.refused: list[Refuse] = []
        self.apply(self.table.handle(Capacity(slots=slots, prefill_tokens=prefill), 0.0))

    def ask(
        self,
        tenant: str,
        *,
        tokens: int = 100,
        answer: int = 10,
        priority: Priority = Priority.NORMAL,
        weight: float = 1.0,
        patience: float = 1e6,
        concurrency: int | None = None,
        slots: int = 1,
    ) -> str:
        name = f"{tenant}-{next(_names)}"
        submit = Submit(
            request=name,
            tenant=tenant,
            priority=priority,
            weight=weight,
            input_tokens=tokens,
            max_output_tokens=answer,
            deadline=self.now + patience,
            concurrency=concurrency,
            slots=slots,
        )
        self.apply(self.table.handle(submit, self.now))
        return name

    def apply(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Admit):
                self.running.append(action.request)
            else:
                self.refused.append(action)

    def end(self, name: str | None = None, answer: int = 10) -> str:
        """The oldest ends; returns its tenant."""
        name = self.running[0] if name is None else name
        self.running.remove(name)
        self.apply(self.table.handle(Ended(request=name, output_tokens=answer), self.now))
        return name.partition("-")[0]

    def runs(self, tenant: str) -> int:
        return sum(name.partition("-")[0] == tenant for name in self.running)


def test_without_a_limit_everything_runs_at_once() -> None:
    door = Door(None)
    for _ in range(1000):
        door.ask("a")
    assert len(door.running) == 1000


def test_a_tenant_that_is_alone_may_use_every_slot() -> None:
    door = Door(16)
    for _ in range(20):
        door.ask("a")
    assert len(door.running) == 16


def test_while_another_is_here_a_greedy_tenant_leaves_the_reserve_free() -> None:
    door = Door(16)
    door.ask("polite")
    door.end()
    for _ in range(40):
        door.ask("greedy")
    assert door.runs("greedy") == 16 - reserved(16) == 12
    for _ in range(3):
        door.ask("polite")
    assert door.runs("polite") == 3
    door.end(next(name for name in door.running if name.startswith("greedy")))
    assert door.runs("greedy") == 11


def test_the_reserve_is_given_up_when_the_other_has_been_away() -> None:
    door = Door(16)
    door.ask("polite")
    door.end()
    for _ in range(40):
        door.ask("greedy")
    door.now = RECENT_S + 1
    door.apply(door.table.handle(Tick(), door.now))
    assert door.runs("greedy") == 16


def test_a_higher_class_goes_first() -> None:
    door = Door(1)
    door.ask("a")
    for priority in (Priority.LOW, Priority.NORMAL, Priority.HIGH):
        door.ask(priority.value, priority=priority)
    assert [door.end() for _ in range(4)] == ["a", "high", "normal", "low"]


def test_a_lower_class_is_slowed_down_but_not_starved() -> None:
    door = Door(1)
    for _ in range(2000):
        door.ask("high", priority=Priority.HIGH)
        door.ask("low", priority=Priority.LOW)
    served = Counter(door.end() for _ in range(1000))
    assert served["low"] / served["high"] == pytest.approx(LOWER_SHARE, rel=0.1)


def test_nobody_has_credit_from_a_pause() -> None:
    door = Door(1)
    door.ask("a")
    door.ask("b")
    for _ in range(500):
        door.ask("a")
    for _ in range(300):
        door.end()
    for _ in range(300):
        door.ask("b")
    served = Counter(door.end() for _ in range(100))
    assert abs(served["a"] - served["b"]) <= 4


def test_nobody_has_credit_from_a_time_without_a_queue() -> None:
    door = Door(1)
    door.ask("b")
    door.end()
    for _ in range(500):
        door.ask("a")
        door.end()
    for _ in range(100):
        door.ask("a")
        door.ask("b")
    served = Counter(door.end() for _ in range(100))
    assert abs(served["a"] - served["b"]) <= 4


def test_long_answers_that_nobody_foresaw_are_charged_when_they_end() -> None:
    door = Door(1)
    served = Counter[str]()
    for _ in range(200):
        door.ask("short", answer=4000)
        door.ask("long", answer=4000)
    for _ in range(150):
        tenant = door.running[0].partition("-")[0]
        answer = 100 if tenant == "short" else 1100
        door.end(answer=answer)
        served[tenant] += 100 + round(OUTPUT_FACTOR) * answer
    assert served["short"] == pytest.approx(served["long"], rel=0.15)


@settings(max_examples=25)
@given(
    slots=st.integers(1, 24),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=4),
    costs=st.lists(st.integers(1, 2000), min_size=4, max_size=4),
    order=st.randoms(use_true_random=False),
)
def test_tenants_that_always_wait_are_served_by_weight(
    slots: int, weights: list[float], costs: list[int], order: random.Random
) -> None:
    door = Door(slots)
    names = [chr(ord("a") + index) for index in range(len(weights))]
    cost = dict(zip(names, costs, strict=False))
    weight = dict(zip(names, weights, strict=True))
    for _ in range(3):
        for name in names:
            door.ask(name, tokens=cost[name], answer=1, weight=weight[name])
    marks: list[dict[str, float]] = []
    total = sum(weights)
    for step in range(300):
        door.end(order.choice(door.running), answer=1)
        for name in names:
            while sum(w.submit.tenant == name for w in door.table._waiting.values()) < 3:
                door.ask(name, tokens=cost[name], answer=1, weight=weight[name])
        if step >= 40:
            flows = door.table._queues[1].flows
            marks.append({name: flows[name].counter for name in names})
    # A tenant may be ahead by the requests of one share of the slots, and by one more.
    bound = max((slots * weight[name] / total + 1) * (cost[name] + OUTPUT_FACTOR) / weight[name] for name in names)
    for mark in marks:
        assert max(mark.values()) - min(mark.values()) <= 2 * bound


def test_a_request_that_would_start_too_late_is_refused_at_once_with_the_time_to_come_back() -> None:
    door = Door(1)
    for second in range(20):
        door.ask("a")
        door.now = second + 1.0
        door.end()
    for _ in range(5):
        door.ask("a")
    door.ask("a", patience=3.0)
    [refusal] = door.refused
    assert refusal.reason is Reason.DEADLINE
    assert refusal.retry_after == pytest.approx(2.0, rel=0.1)
    # Nobody else asks, and what runs takes as long as before: then it is taken.
    for _ in range(2):
        door.now += 1.0
        door.end()
    door.now = 20.0 + refusal.retry_after
    door.ask("a", patience=3.0)
    assert len(door.refused) == 1


def test_before_anything_is_known_everything_may_wait() -> None:
    door = Door(1)
    for _ in range(100):
        door.ask("a", patience=0.1)
    assert door.refused == []


def test_the_prediction_knows_that_a_polite_tenant_passes_a_greedy_one() -> None:
    door = Door(1)
    for second in range(20):
        door.ask("a")
        door.now = second + 1.0
        door.end()
    for _ in range(50):
        door.ask("greedy")
    door.ask("polite", patience=5.0)
    door.ask("greedy", patience=5.0)
    assert [refusal.request.partition("-")[0] for refusal in door.refused] == ["greedy"]


def test_whoever_waited_to_its_deadline_is_refused_then() -> None:
    door = Door(1)
    door.ask("a")
    door.ask("b", patience=5.0)
    assert door.table.next_deadline() == 5.0
    door.now = 5.0
    door.apply(door.table.handle(Tick(), 5.0))
    assert [refusal.reason for refusal in door.refused] == [Reason.DEADLINE]
    assert door.table.next_deadline() is None


def test_a_full_queue_pushes_out_whoever_has_most_in_it() -> None:
    door = Door(1, max_waiting=10)
    for _ in range(11):
        door.ask("greedy")
    door.ask("polite")
    [refusal] = door.refused
    assert refusal.request.startswith("greedy")
    assert refusal.reason is Reason.QUEUE_FULL
    door.ask("greedy")
    assert [refusal.request.partition("-")[0] for refusal in door.refused] == ["greedy", "greedy"]
    assert door.table.waiting(Priority.NORMAL) == 10


def test_a_full_queue_pushes_out_a_lower_class_first() -> None:
    door = Door(1, max_waiting=4)
    for _ in range(4):
        door.ask("a")
    door.ask("b", priority=Priority.LOW)
    door.ask("a")
    assert [refusal.request.partition("-")[0] for refusal in door.refused] == ["b"]


def test_the_queue_is_bounded_in_tokens_too_but_takes_one_request_of_any_size() -> None:
    door = Door(1, max_waiting_tokens=1000)
    door.ask("a")
    door.ask("a", tokens=5000)
    door.ask("a", tokens=1)
    assert [refusal.reason for refusal in door.refused] == [Reason.QUEUE_FULL]


def test_more_than_its_concurrency_is_refused() -> None:
    door = Door(1)
    for _ in range(4):
        door.ask("a", concurrency=3)
    [refusal] = door.refused
    assert refusal.reason is Reason.CONCURRENCY
    door.end()
    door.ask("a", concurrency=3)
    assert len(door.refused) == 1


def test_prefill_takes_no_more_tokens_than_it_can_work_on() -> None:
    door = Door(100, prefill=1000)
    door.ask("a", tokens=5000)
    door.ask("a", tokens=600)
    door.ask("a", tokens=300)
    assert len(door.running) == 1
    door.apply(door.table.handle(Started(request=door.running[0]), 0.0))
    assert len(door.running) == 3


def test_a_waiting_request_that_is_cancelled_is_gone() -> None:
    door = Door(1)
    door.ask("a")
    gone, other = door.ask("b"), door.ask("c")
    door.apply(door.table.handle(Cancel(request=gone), 0.0))
    door.end()
    assert door.running == [other]


def test_a_name_that_is_in_use_is_a_fault() -> None:
    table = AdmissionTable()
    submit = Submit(request="x", tenant="a", input_tokens=1, max_output_tokens=1, deadline=9.0)
    table.handle(submit, 0.0)
    with pytest.raises(ValueError, match="already"):
        table.handle(submit, 0.0)


def test_more_capacity_starts_what_waits_and_less_stops_nothing() -> None:
    door = Door(2)
    for _ in range(10):
        door.ask("a")
    door.apply(door.table.handle(Capacity(slots=5), 0.0))
    assert len(door.running) == 5
    door.apply(door.table.handle(Capacity(slots=1), 0.0))
    for _ in range(4):
        door.end()
    assert len(door.running) == 1


def test_long_requests_count_before_they_have_ended() -> None:
    rate = ServiceRate()
    rate.observe(0.0, 0)
    for second in range(1, 21):
        rate.observe(float(second), 11, ended=1)
    # One slot turns over every second; ten others have not ended once.
    assert rate.holding_s is not None
    assert rate.holding_s > 10


def test_a_request_with_many_choices_takes_a_slot_for_each() -> None:
    door = Door(slots=4)
    door.ask("a", slots=3)
    door.ask("a", slots=2)
    assert (door.runs("a"), len(door.refused)) == (1, 0)
    door.end()
    assert door.runs("a") == 1


def test_one_with_more_choices_than_there_are_slots_runs_alone() -> None:
    door = Door(slots=4)
    door.ask("a")
    many = door.ask("b", slots=100)
    assert door.runs("b") == 0
    door.end()
    assert door.running == [many]
    door.ask("a")
    assert door.runs("a") == 0
