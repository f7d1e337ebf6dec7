"""Weighted fairness between the tenants of one priority class: virtual token counters.

After Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): each tenant has a counter of the tokens
that it was served, divided by its weight; the waiting tenant with the smallest counter is next. Input tokens and the
expected output are charged when a request starts, and corrected when the real output is known.

A tenant that comes back after a pause starts at the counter that was served last (`virtual`), so what it did not use
in the past is no credit. What it used too much stays on its counter, until it has been away for `RECENT_S`.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator

from tandem.core.admission_events import Submit

OUTPUT_FACTOR = 4.0
"""An output token costs a fleet about as much as this many input tokens (the ratio of R1's prices)."""
FIRST_GUESS = 512
"""Output tokens that an answer is thought to have before a tenant has had one."""
RECENT_S = 60.0
"""A tenant counts as here for so long after its last request came or ended."""
MEMORY_S = 30.0
"""What a tenant held so long ago counts 1/e of what it holds now."""
_SETTLE = 0.2


class Flow:
    """One tenant in one class."""

    __slots__ = (
        "_mean",
        "_mean_at",
        "active_at",
        "counter",
        "held",
        "key",
        "mean_output",
        "name",
        "prefill_tokens",
        "running",
        "waiting",
        "weight",
    )

    def __init__(self, name: str, weight: float, counter: float, now: float) -> None:
        self.name = name
        self.weight = weight
        self.counter = counter
        self.key: tuple[float, int, Flow] | None = None
        self.waiting: OrderedDict[str, Asked] = OrderedDict()
        self.running = 0
        self.held = 0
        """Slots of those."""
        self.prefill_tokens = 0
        self.mean_output: float | None = None
        self.active_at = now
        self._mean = 0.0
        self._mean_at = now

    @property
    def head(self) -> Asked:
        return next(iter(self.waiting.values()))

    @property
    def held_here(self) -> int:
        return self.running + len(self.waiting)

    def set_mean(self, running: float) -> None:
        self._mean = running

    def mean_running(self, now: float) -> float:
        """How many slots it has held at once of late."""
        if now > self._mean_at:
            self._mean = self.held + (self._mean - self.held) * math.exp((self._mean_at - now) / MEMORY_S)
            self._mean_at = now
        return self._mean

    def expected_output(self, at_most: int) -> float:
        return min(at_most, FIRST_GUESS if self.mean_output is None else self.mean_output)

    def learn(self, output_tokens: int) -> None:
        if not output_tokens:
            return  # it never ran, or failed: that says nothing of the next
        mean = self.mean_output
        self.mean_output = float(output_tokens) if mean is None else mean + _SETTLE * (output_tokens - mean)


class Asked:
    """One request, waiting or running, with what it was or will be charged."""

    __slots__ = ("charge", "flow", "in_prefill", "since", "submit")

    def __init__(self, submit: Submit, flow: Flow, since: float) -> None:
        self.submit = submit
        self.flow = flow
        self.since = since
        self.charge = submit.input_tokens + OUTPUT_FACTOR * flow.expected_output(submit.max_output_tokens)
        self.in_prefill = False


class FairQueue:
    """The tenants of one class, and what of theirs waits."""

    def __init__(self) -> None:
        self.slots = 0
        """What all its tenants may have running, to tell what a share is; 0 = no limit."""
        self.flows: OrderedDict[str, Flow] = OrderedDict()
        """Whoever has something waiting or running, or had within `RECENT_S`; the longest quiet first."""
        self.length = 0
        self.weights = 0.0
        """Sum over `flows`."""
        self._order: list[tuple[float, int, Flow]] = []
        self._serial = itertools.count()
        self._virtual = 0.0

    def flow(self, name: str, weight: float, now: float) -> Flow:
        """The tenant's flow, made if it is new; the tenant counts as active now."""
        flow = self.flows.get(name)
        if flow is None:
            self.weights += weight
            flow = self.flows[name] = Flow(name, weight, self._virtual, now)
            # Of a newcomer nothing is known: as if it had held just its share, beside at least one other.
            flow.set_mean(min(self.share(flow), self.slots / 2))
        else:
            self.touch(flow, now)
            if flow.weight != weight:
                self.weights += weight - flow.weight
                flow.weight = weight
        flow.active_at = now
        return flow

    def share(self, flow: Flow) -> float:
        """The slots that are a tenant's by its weight among all who are here."""
        return self.slots * flow.weight / self.weights

    def touch(self, flow: Flow, now: float) -> None:
        flow.active_at = now
        self.flows.move_to_end(flow.name)

    def forget_quiet(self, now: float) -> None:
        """Drop tenants that have been away. A step or two per call, so that no call takes long."""
        for _ in range(2):
            if not self.flows:
                return
            flow = next(iter(self.flows.values()))
            if flow.active_at + RECENT_S > now:
                return
            if flow.held_here:
                self.touch(flow, now)
            else:
                del self.flows[flow.name]
                self.weights = self.weights - flow.weight if self.flows else 0.0

    def push(self, asked: Asked) -> None:
        flow = asked.flow
        if not flow.waiting:
            flow.counter = max(flow.counter, self._virtual)
            self._place(flow)
        flow.waiting[asked.submit.request] = asked
        self.length += 1

    def remove(self, asked: Asked) -> None:
        """It waits no longer."""
        flow = asked.flow
        del flow.waiting[asked.submit.request]
        self.length -= 1
        if not flow.waiting:
            self._take_out(flow)

    def start(self, asked: Asked, now: float) -> None:
        """It waits no longer, since it runs: its tenant is charged."""
        self._virtual = max(self._virtual, self._order[0][0])
        self.remove(asked)
        self._hold(asked, now)

    def start_at_once(self, asked: Asked, now: float) -> None:
        """The same for one that need not wait, while nobody of its class waits."""
        flow = asked.flow
        flow.counter = self._virtual = max(flow.counter, self._virtual)
        self._hold(asked, now)

    def end(self, asked: Asked, output_tokens: int, now: float) -> None:
        """It is over: its tenant is charged for what the output really was."""
        flow = asked.flow
        flow.mean_running(now)
        flow.running -= 1
        flow.held -= asked.submit.slots
        real = asked.submit.input_tokens + OUTPUT_FACTOR * output_tokens
        flow.learn(output_tokens)
        self._charge(flow, real - asked.charge)
        self.touch(flow, now)

    def in_order(self) -> Iterator[Flow]:
        """Tenants with something waiting, whoever is next first."""
        return (entry[2] for entry in self._order)

    def longest(self) -> Flow | None:
        """The tenant with most waiting for its weight."""
        flows = (entry[2] for entry in self._order)
        return max(flows, key=lambda flow: len(flow.waiting) / flow.weight, default=None)

    def _hold(self, asked: Asked, now: float) -> None:
        asked.flow.mean_running(now)
        asked.flow.running += 1
        asked.flow.held += asked.submit.slots
        self._charge(asked.flow, asked.charge)

    def _charge(self, flow: Flow, cost: float) -> None:
        flow.counter += cost / flow.weight
        if flow.key is not None:
            self._take_out(flow)
            self._place(flow)

    def _place(self, flow: Flow) -> None:
        flow.key = (flow.counter, next(self._serial), flow)
        bisect.insort(self._order, flow.key)

    def _take_out(self, flow: Flow) -> None:
        assert flow.key is not None, "only a waiting tenant has a place"
        del self._order[bisect.bisect_left(self._order, flow.key)]
        flow.key = None
