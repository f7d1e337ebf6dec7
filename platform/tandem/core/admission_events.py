"""What the admission table is told (events) and what it asks for (actions). Plain values, no behaviour."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from tandem.core.tenants import Priority


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened. `AdmissionTable.handle` takes it with the time."""


class Submit(Event, frozen=True, kw_only=True):
    """A request wants to run. `deadline`: when it must have started, on the caller's clock."""

    request: str
    tenant: str
    priority: Priority = Priority.NORMAL
    weight: float = 1.0
    input_tokens: int
    max_output_tokens: int
    deadline: float
    slots: int = 1
    """How many it takes of what may run at once: one for each of its choices."""
    concurrency: int | None = None
    """How many of the tenant's requests may wait or run here at once."""


class Cancel(Event, frozen=True, kw_only=True):
    """Nobody waits for the request any more. If it runs already, its end is still to be told with `Ended`."""

    request: str


class Started(Event, frozen=True, kw_only=True):
    """The request has its first token: it is through prefill."""

    request: str


class Ended(Event, frozen=True, kw_only=True):
    """The request that was admitted is over, after so many output tokens."""

    request: str
    output_tokens: int


class Capacity(Event, frozen=True, kw_only=True):
    """What may run at once from now on; None = no limit. What runs already is left alone.

    `prefill_tokens`: input tokens of requests without a first token. More of them only queue in the engines, where
    nobody is fair.
    """

    slots: int | None
    prefill_tokens: int | None = None


class Tick(Event, frozen=True, kw_only=True):
    """Time has passed; due at `AdmissionTable.next_deadline`."""


class Reason(StrEnum):
    """Why a request was refused."""

    CONCURRENCY = "concurrency"
    """Its tenant has as many requests here as it may have."""
    QUEUE_FULL = "queue_full"
    """Too much waits, and its tenant has no smaller part of that than others."""
    DEADLINE = "deadline"
    """It would not start, or did not start, before its deadline."""


class Admit(msgspec.Struct, frozen=True, kw_only=True):
    """Let it run. `waited` in seconds."""

    request: str
    waited: float


class Refuse(msgspec.Struct, frozen=True, kw_only=True):
    """Send it away. `retry_after`: after so many seconds the same request would be taken if nobody else came."""

    request: str
    reason: Reason
    message: str
    retry_after: float


Action = Admit | Refuse
