"""What the log of an answer holds: the tokens of its choices as they were delivered, and how it ended.

One entry of the log is a batch of these, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tandem.core.pair_events import Fail, Failure, FailureKind, Finish
from tandem.engine.client import Ended, Logprob
from tandem.gateway.pairing.ticket import Ticket


class Tokens(msgspec.Struct, frozen=True, kw_only=True, tag="t", omit_defaults=True):
    """The next tokens of a choice; `logprobs` if they were asked for."""

    choice: int
    ids: list[int]
    logprobs: list[tuple[float, int, list[tuple[float, int]]]] | None = None
    version: str = ""
    """Of the weights that made them."""
    cached: int = 0
    """Prompt tokens that the prefix cache held, if that is known by now."""


class Complete(msgspec.Struct, frozen=True, kw_only=True, tag="c", omit_defaults=True):
    """A choice has ended well. `ended`: as the engine told it; none where the gateway had enough (a stop string)."""

    choice: int
    reason: str
    ended: Ended | None = None
    cached: int = 0


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="f", omit_defaults=True):
    """Its owner could not complete it, and told its client why."""

    kind: FailureKind
    message: str
    retry_after: float = 0.0


class Left(msgspec.Struct, frozen=True, kw_only=True, tag="l", omit_defaults=True):
    """Its owner has let it go, with a usage record for what it had done: that is not to be counted again."""

    prompt: bool = False
    """The record has the prompt's tokens."""
    completion: int = 0
    reasoning: int = 0


Entry = Tokens | Complete | Failed | Left

_decoder = msgspec.msgpack.Decoder(list[Entry])
encode: Any = msgspec.msgpack.Encoder().encode


def decode(batch: bytes) -> list[Entry]:
    """Raises msgspec.MsgspecError for what no gateway of this version has written."""
    return _decoder.decode(batch)


class Told(msgspec.Struct):
    """What the log of an answer says, all in all."""

    records: int = 0
    """Usage records that former owners have written."""
    prompt: bool = False
    """One of them has the prompt."""
    completion: int = 0
    reasoning: int = 0
    """What they have of the answer's tokens."""
    failed: Failed | None = None
    """Why the latest owner let it go, if it told its client."""

    def take(self, entry: Entry, tickets: Sequence[Ticket]) -> None:
        """Have the tickets deliver what the entry says, as if they had it from an engine."""
        if isinstance(entry, Tokens):
            ticket = tickets[entry.choice]
            ticket.cached_tokens = entry.cached or ticket.cached_tokens
            ticket.weight_version = entry.version or ticket.weight_version
            if entry.logprobs is not None:
                ticket.scored[0] = [Logprob(*one) for one in entry.logprobs]
            self.failed = None
            ticket.deliver(0, entry.ids)
        elif isinstance(entry, Complete):
            ticket = tickets[entry.choice]
            ticket.cached_tokens = entry.cached or ticket.cached_tokens
            ticket.ended = entry.ended
            if entry.ended is not None:
                ticket.weight_version = entry.ended.weight_version or ticket.weight_version
            ticket.finish(Finish(request=ticket.request, reason=entry.reason))
        elif isinstance(entry, Failed):
            self.failed = entry
        else:
            self.records += 1
            self.prompt = self.prompt or entry.prompt
            self.completion += entry.completion
            self.reasoning += entry.reasoning


def fail(tickets: Sequence[Ticket], failed: Failed) -> None:
    """Tell those who read the tickets, as the owner told its own client."""
    failure = Failure(kind=failed.kind, message=failed.message, retry_after=failed.retry_after)
    for ticket in tickets:
        if ticket.end is None:
            ticket.finish(Fail(request=ticket.request, failure=failure, delivered=len(ticket.history)))
