"""What the log of an answer holds: the tokens of its choices as they were delivered, and how it ended.

One entry of the log is a batch of these, in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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

    def join(self, more: Tokens) -> bool:
        """Take these in as well, if they can be one entry."""
        if (self.choice, self.version, self.cached) != (more.choice, more.version, more.cached):
            return False
        if (self.logprobs is None) != (more.logprobs is None):
            return False
        self.ids.extend(more.ids)
        if self.logprobs is not None and more.logprobs is not None:
            self.logprobs.extend(more.logprobs)
        return True


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


def decode(log: Iterable[bytes]) -> list[Entry]:
    """What the batches say, in few entries: tokens of a choice that follow each other are one.

    Raises msgspec.MsgspecError or UnicodeDecodeError for what no gateway of this version has written.
    """
    found: list[Entry] = []
    last: dict[int, Tokens] = {}
    for batch in log:
        for entry in _decoder.decode(batch):
            if isinstance(entry, Tokens):
                before = last.get(entry.choice)
                if before is not None and before.join(entry):
                    continue
                last[entry.choice] = entry
            elif not isinstance(entry, Complete):
                # What came before it stays before it.
                last.clear()
            found.append(entry)
    return found


def pieces(entry: Entry, size: int) -> Iterator[Entry]:
    """The entry, its tokens in pieces of this many."""
    if not isinstance(entry, Tokens) or len(entry.ids) <= size:
        yield entry
        return
    for at in range(0, len(entry.ids), size):
        logprobs = entry.logprobs[at : at + size] if entry.logprobs is not None else None
        yield msgspec.structs.replace(entry, ids=entry.ids[at : at + size], logprobs=logprobs)


def versions(entries: Iterable[Entry]) -> set[str]:
    """Weight versions that the choices which have begun and are not complete have to go on with."""
    found: dict[int, str] = {}
    over: set[int] = set()
    for entry in entries:
        if isinstance(entry, Tokens):
            found[entry.choice] = entry.version or found.get(entry.choice, "")
        elif isinstance(entry, Complete):
            over.add(entry.choice)
    return {version for choice, version in found.items() if choice not in over}


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

    def count(self, entries: Iterable[Entry]) -> None:
        """Take note of what others were counted for; at once, however long the tickets take to deliver the rest."""
        for entry in entries:
            if isinstance(entry, Left):
                self.records += 1
                self.prompt = self.prompt or entry.prompt
                self.completion += entry.completion
                self.reasoning += entry.reasoning

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


def fail(tickets: Sequence[Ticket], failed: Failed) -> None:
    """Tell those who read the tickets, as the owner told its own client."""
    failure = Failure(kind=failed.kind, message=failed.message, retry_after=failed.retry_after)
    for ticket in tickets:
        if ticket.end is None:
            ticket.finish(Fail(request=ticket.request, failure=failure, delivered=len(ticket.history)))
