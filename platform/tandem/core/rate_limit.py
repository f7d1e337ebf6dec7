"""Limits per minute as arithmetic: what a tenant has used in the last minute, and when there is room for more.

A limit is a *sliding window*: in no 60 seconds is more granted than the limit, and whoever used less than that in the
last 60 seconds is let in at once, also with all of it at once. (A bucket that refills would let twice the limit
through in the minute after a pause.) The window moves in slots of a quarter of a second, and what was used counts
until its whole slot is over 60 seconds old: at ten times its limit a tenant gets 99.6 % of it, never 100.1 %.

What is only known afterwards (output tokens) is *debited*: what no longer fits is a debt, paid from the room of the
minutes that follow. So one answer may overdraw, but on average over time the limit holds exactly.
"""

from __future__ import annotations

import math
from collections import deque
from enum import StrEnum

import msgspec

SPAN_S = 60.0
SLOT_S = 0.25
SLOTS = int(SPAN_S / SLOT_S) + 1
"""After so many slots what was used in a slot is free again."""
FIRST_GUESS = 1024
"""Output tokens that an answer is thought to have before a tenant has had one."""
_SETTLE = 0.2
"""Weight of the newest answer in the mean length of a tenant's answers."""
_CRUMB = 1e-6
"""Shares of limits are fractions; this much is rounding."""


class Budget(StrEnum):
    """What is limited per minute."""

    REQUESTS = "requests"
    INPUT = "input_tokens"
    OUTPUT = "output_tokens"


class Quota(msgspec.Struct, frozen=True):
    """Limits per minute, in the order of `Budget`; None = no such limit. A share of a limit may be a fraction."""

    requests: float | None = None
    input_tokens: float | None = None
    output_tokens: float | None = None

    def each(self) -> tuple[float | None, float | None, float | None]:
        return (self.requests, self.input_tokens, self.output_tokens)

    def share(self, replicas: int) -> Quota:
        """What one of `replicas` may grant when they cannot ask each other."""
        return Quota(*(None if limit is None else limit / max(1, replicas) for limit in self.each()))


class Reading(msgspec.Struct, frozen=True):
    """Where a tenant stands with one limit. `reset_s`: seconds until all of it is free if nothing more is used."""

    budget: Budget
    limit: float
    remaining: float
    reset_s: float


class Shortage(msgspec.Struct, frozen=True):
    """A limit that has no room: it has after `wait_s` if nobody else asks, never if that is infinite."""

    budget: Budget
    wait_s: float


class Window:
    """One limit of one tenant. Times are seconds on any clock that never goes back."""

    __slots__ = ("_slots", "debt", "limit", "used")

    def __init__(self, limit: float) -> None:
        self.limit = limit
        """May be changed at any time; it holds for what is asked from then on."""
        self.used = 0.0
        self.debt = 0.0
        self._slots: deque[tuple[int, float]] = deque()

    def wait(self, cost: float, now: float) -> float:
        """Seconds until `cost` fits, 0 = it does now. What is larger than the limit fits into an empty window."""
        self.advance(now)
        need = self.used + self.debt + min(cost, self.limit) - self.limit
        if need <= _CRUMB:
            return 0.0
        # In debt, all that becomes free in one turn of the window is taken by the debt in the same pattern.
        turns = max(0, math.ceil((need - _CRUMB) / self.used) - 1) if self.used > _CRUMB else 0
        need -= turns * self.used
        slot = self._slots[-1][0] if self._slots else _slot(now)
        freed = 0.0
        for candidate, amount in self._slots:
            freed += amount
            if freed >= need - _CRUMB:
                slot = candidate
                break
        return _until(slot + SLOTS * (turns + 1), now)

    def take(self, cost: float, now: float) -> float:
        """Grant it and return 0, or return the seconds until it would be granted if nobody else asks."""
        wait = self.wait(cost, now)
        if not wait:
            self.debit(cost, now)
        return wait

    def debit(self, cost: float, now: float) -> None:
        """Count what was used, whether it fits or not. A negative cost gives back."""
        self.advance(now)
        if cost < 0:
            paid = min(self.debt, -cost)
            self.debt -= paid
            self._book(cost + paid, _slot(now))
            return
        booked = min(cost, max(0.0, self.limit - self.used))
        self.debt += cost - booked
        self._book(booked, _slot(now))

    def reset(self, now: float) -> float:
        """Seconds until the window is empty if nothing more is used."""
        self.advance(now)
        if not self._slots:
            return 0.0
        turns = math.ceil(self.debt / self.limit) if self.debt > _CRUMB and self.limit > 0 else 0
        return _until(self._slots[-1][0] + SLOTS * (turns + 1), now)

    def remaining(self, now: float) -> float:
        self.advance(now)
        return max(0.0, self.limit - self.used - self.debt)

    def entries(self, now: float) -> list[tuple[int, float]]:
        """What counts now: how many slots ago, and how much. Debts come on top."""
        self.advance(now)
        return [(max(0, _slot(now) - slot), amount) for slot, amount in self._slots]

    @property
    def empty(self) -> bool:
        return not self._slots

    def advance(self, now: float) -> None:
        """Forget what is over a minute old; pay debts from the room that this makes, at the time it was made."""
        gone = _slot(now) - SLOTS
        slots = self._slots
        while slots and slots[0][0] <= gone:
            slot, amount = slots.popleft()
            self.used -= amount
            if self.debt > _CRUMB:
                paid = min(self.debt, self.limit - self.used)
                if paid > 0:
                    self.debt -= paid
                    self._book(paid, slot + SLOTS)
        if not slots:
            self.used = 0.0

    def _book(self, amount: float, slot: int) -> None:
        if not amount:
            return
        self.used += amount
        if self._slots and self._slots[-1][0] >= slot:
            last, before = self._slots[-1]
            self._slots[-1] = (last, before + amount)
        else:
            self._slots.append((slot, amount))


class Account:
    """What one tenant has used of its three limits, as far as this side knows.

    Of running requests an *expected* output is held: the mean of the tenant's answers so far, at most `max_tokens`.
    Not `max_tokens` itself: clients leave it at its maximum, and would then be refused for what they never use.
    """

    __slots__ = ("_windows", "held", "mean_output")

    def __init__(self) -> None:
        self._windows: dict[Budget, Window] = {}
        self.held = 0.0
        """Output tokens expected of running requests."""
        self.mean_output: float | None = None

    def expected_output(self, at_most: int) -> int:
        mean = FIRST_GUESS if self.mean_output is None else math.ceil(self.mean_output)
        return min(at_most, max(1, mean))

    def learn(self, output_tokens: int) -> None:
        """An answer had so many tokens; none = it failed, which says nothing of the next."""
        if not output_tokens:
            return
        mean = self.mean_output
        self.mean_output = float(output_tokens) if mean is None else mean + _SETTLE * (output_tokens - mean)

    def shortage(self, quota: Quota, input_tokens: int, now: float) -> Shortage | None:
        """The limit that a request with this input has to wait longest for; None = it may start.

        Of output, only that any is left is asked for: how much it will be nobody knows.
        """
        worst: Shortage | None = None
        for budget, limit, cost in zip(Budget, quota.each(), (1, input_tokens, 1), strict=True):
            if limit is None:
                continue
            if limit <= 0:
                return Shortage(budget, math.inf)
            window = self._window(budget, limit)
            held = self.held if budget is Budget.OUTPUT else 0.0
            wait = window.wait(cost, now)
            if held and not wait and window.remaining(now) <= held + _CRUMB:
                # What is held will have been used when it ends, and counts for a minute from then.
                wait = SPAN_S
            if wait and (worst is None or wait > worst.wait_s):
                worst = Shortage(budget, wait)
        return worst

    def spend(self, quota: Quota, amounts: tuple[int, int, int], now: float) -> None:
        """Count requests, input tokens and output tokens; negative ones are given back."""
        for budget, limit, amount in zip(Budget, quota.each(), amounts, strict=True):
            if limit is not None and amount:
                self._window(budget, limit).debit(amount, now)

    def readings(self, quota: Quota, now: float) -> list[Reading]:
        found = []
        for budget, limit in zip(Budget, quota.each(), strict=True):
            if limit is not None:
                window = self._window(budget, limit)
                left = window.remaining(now) - (self.held if budget is Budget.OUTPUT else 0.0)
                found.append(Reading(budget, limit, max(0.0, left), window.reset(now)))
        return found

    def entries(self, now: float) -> list[tuple[int, int, int]]:
        """All that counts now, in whole tokens: number of the budget (from 1), slots ago, amount. A debt is "-1 slots
        ago"."""
        found = []
        for kind, budget in enumerate(Budget, 1):
            window = self._windows.get(budget)
            if window is not None:
                found += [(kind, age, round(amount)) for age, amount in window.entries(now)]
                found.append((kind, -1, round(window.debt)))
        return [entry for entry in found if entry[2]]

    def idle(self, now: float) -> bool:
        """Whether nothing would be lost by forgetting it (but for the mean)."""
        for window in self._windows.values():
            window.advance(now)
        return self.held <= 0 and all(window.empty for window in self._windows.values())

    def _window(self, budget: Budget, limit: float) -> Window:
        window = self._windows.get(budget)
        if window is None:
            window = self._windows[budget] = Window(limit)
        window.limit = limit
        return window


def _slot(now: float) -> int:
    return math.floor(now / SLOT_S)


def _until(slot: int, now: float) -> float:
    """Seconds from `now` to the slot's start, such that adding them never falls short of it by rounding."""
    wait = max(0.0, slot * SLOT_S - now)
    while _slot(now + wait) < slot:
        wait += math.ulp(now + wait)
    return wait
