"""Answers that are kept under an idempotency key, and who works on each. Pure: times are passed in.

An answer has one *owner* at a time, which alone may add to its log. Whoever asks with the same key later reads the log.
An owner that is dead, or has let the answer go, is followed by the first that takes it: the log goes on where it ended.
`gateway/answers/redis_scripts.py` does the same within Redis, for several gateways.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Callable
from enum import StrEnum

import msgspec

LONGEST_KEY = 255
"""Characters of an idempotency key, as at Stripe."""
OVERHEAD = 512
"""Bytes that an answer is counted with beside its log."""


class AnswerState(StrEnum):
    """What becomes of an answer now."""

    OPEN = "open"
    """Its owner works on it."""
    FREE = "free"
    """Nobody does, and it is not complete: the next one that asks goes on with it."""
    DONE = "done"
    VOID = "void"
    """What was delivered is not to be trusted, or is not all there: the next one that asks begins anew."""


class Standing(StrEnum):
    """What a claim has come to."""

    OWNED = "owned"
    """The caller is its owner now: it is new, or goes on where the log ends."""
    JOINED = "joined"
    """Another one works on it: its log can be read as it grows."""
    DONE = "done"
    """It is complete, and in the log."""
    MISMATCH = "mismatch"
    """The key is that of another request."""


class Appended(StrEnum):
    """What became of an addition to the log."""

    WRITTEN = "written"
    FENCED = "fenced"
    """Another one owns the answer now: what is added is not part of it."""
    GONE = "gone"
    """It is not kept any more: too old, or there was no room for it."""


class Claim(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a claim. `log`: everything so far."""

    standing: Standing
    number: str = ""
    """The answer's own id, drawn by the first that claimed it."""
    created: int = 0
    """When that was, in Unix seconds."""
    born: str = ""
    """The owner that began the log. Another one under the same name is the log of another try."""
    log: list[bytes] = []


class News(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of an answer."""

    state: AnswerState
    owner: str
    alive: bool
    """Its owner lives."""
    born: str = ""
    """See `Claim`."""
    log: list[bytes] = []
    """What came after the place that was asked for."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much is kept, and how long."""

    keep_s: float
    """After the answer's last change."""
    open_s: float
    """The same while it is not complete."""
    tenant_bytes: int
    total_bytes: int


class _Kept:
    __slots__ = (
        "born",
        "created",
        "expires",
        "fingerprint",
        "left",
        "log",
        "number",
        "owner",
        "size",
        "state",
        "tenant",
        "voided",
    )

    def __init__(self, tenant: str, fingerprint: str, number: str, created: int, owner: str, voided: str) -> None:
        self.tenant = tenant
        self.fingerprint = fingerprint
        self.number = number
        self.created = created
        self.owner = owner
        self.state = AnswerState.OPEN
        self.born = owner
        self.log: list[bytes] = []
        self.left: dict[int, str] = {}
        """Place → the owner that let it go with that entry."""
        self.voided = voided
        """The last owner of the answer that this one is in place of."""
        self.size = OVERHEAD
        self.expires = 0.0


class AnswerTable:
    """All answers that one gateway keeps by itself. Within it no owner dies: it goes with the table."""

    def __init__(self, limits: Limits, *, on_change: Callable[[str], object] = lambda name: None) -> None:
        """`on_change` is called with the name of each answer that has changed or is gone."""
        self._limits = limits
        self._on_change = on_change
        self._answers: OrderedDict[str, _Kept] = OrderedDict()
        """From the oldest to the newest."""
        self._bytes: dict[str, int] = {}
        """Of each tenant."""
        self._expiries: list[tuple[float, str]] = []
        """A heap of times at which answers may have expired; one that was kept longer is put in again."""
        self.size = 0
        """Bytes of all answers together."""

    def __len__(self) -> int:
        return len(self._answers)

    def claim(
        self, name: str, *, tenant: str, fingerprint: str, number: str, created: int, owner: str, now: float
    ) -> Claim:
        """Be its owner if nobody is. `number` and `created` are those of an answer that is new."""
        self._expire(now)
        kept, voided = self._answers.get(name), ""
        if kept is not None and kept.fingerprint != fingerprint:
            return Claim(standing=Standing.MISMATCH)
        if kept is not None and kept.state is AnswerState.VOID:
            voided = kept.owner
            self._remove(name)
            kept = None
        if kept is None:
            kept = self._answers[name] = _Kept(tenant, fingerprint, number, created, owner, voided)
            self._keep(name, kept, now)
            self._grow(kept, OVERHEAD)
            return Claim(standing=Standing.OWNED, number=number, created=created, born=owner)
        standing = {AnswerState.DONE: Standing.DONE, AnswerState.OPEN: Standing.JOINED}.get(kept.state, Standing.OWNED)
        if standing is Standing.OWNED:
            self._own(name, kept, owner, now)
        return Claim(standing=standing, number=kept.number, created=kept.created, born=kept.born, log=list(kept.log))

    def take(self, name: str, *, before: str, owner: str, now: float) -> bool:
        """Be its owner in place of `before`, if that one has let it go; False if another one was first."""
        self._expire(now)
        kept = self._answers.get(name)
        if kept is None or kept.owner != before or kept.state is not AnswerState.FREE:
            return False
        self._own(name, kept, owner, now)
        return True

    def append(self, name: str, *, owner: str, place: int, entry: bytes, state: AnswerState, now: float) -> Appended:
        """Add the entry that is number `place` (from 1) of the log. One that is there already is not added again, also
        if its owner has let the answer go with it and others have gone on since."""
        self._expire(now)
        kept = self._answers.get(name)
        if kept is None:
            return Appended.GONE
        if kept.owner != owner or kept.state is not AnswerState.OPEN:
            there = kept.owner == owner and place <= len(kept.log)
            there = there or kept.left.get(place) == owner or (state is AnswerState.VOID and kept.voided == owner)
            return Appended.WRITTEN if there else Appended.FENCED
        if place > len(kept.log) + 1:
            self._remove(name)
            return Appended.GONE
        kept.state = state
        self._keep(name, kept, now)
        if place == len(kept.log) + 1:
            kept.log.append(entry)
            if state is AnswerState.FREE:
                kept.left[place] = owner
            kept.size += len(entry)
            self._grow(kept, len(entry))
        self._on_change(name)
        return Appended.WRITTEN if name in self._answers else Appended.GONE

    def restart(self, name: str, *, owner: str, now: float) -> bool:
        """Begin the log anew, under the same number; False if it is not (any more) the owner's."""
        self._expire(now)
        kept = self._answers.get(name)
        if kept is None or kept.owner != owner or kept.state is not AnswerState.OPEN:
            return False
        freed = kept.size - OVERHEAD
        kept.born, kept.log, kept.left, kept.size = owner, [], {}, OVERHEAD
        self._bytes[kept.tenant] -= freed
        self.size -= freed
        self._on_change(name)
        return True

    def news(self, name: str, *, after: int, now: float) -> News | None:
        """What came after the first `after` entries; None if the answer is not kept."""
        self._expire(now)
        kept = self._answers.get(name)
        if kept is None:
            return None
        alive = kept.state is AnswerState.OPEN
        return News(state=kept.state, owner=kept.owner, alive=alive, born=kept.born, log=kept.log[after:])

    def _own(self, name: str, kept: _Kept, owner: str, now: float) -> None:
        kept.owner, kept.state = owner, AnswerState.OPEN
        self._keep(name, kept, now)
        self._on_change(name)

    def _keep(self, name: str, kept: _Kept, now: float) -> None:
        before = kept.expires
        kept.expires = now + (self._limits.open_s if kept.state is AnswerState.OPEN else self._limits.keep_s)
        if not before or kept.expires < before:
            heapq.heappush(self._expiries, (kept.expires, name))

    def _expire(self, now: float) -> None:
        while self._expiries and self._expiries[0][0] <= now:
            _, name = heapq.heappop(self._expiries)
            kept = self._answers.get(name)
            if kept is None:
                continue
            if kept.expires <= now:
                self._remove(name)
            else:
                heapq.heappush(self._expiries, (kept.expires, name))

    def _grow(self, kept: _Kept, size: int) -> None:
        """It takes so much more: the oldest of its tenant make room, then the oldest of all."""
        self._bytes[kept.tenant] = self._bytes.get(kept.tenant, 0) + size
        self.size += size
        while self._bytes.get(kept.tenant, 0) > self._limits.tenant_bytes:
            self._remove(next(other for other, one in self._answers.items() if one.tenant == kept.tenant))
        while self.size > self._limits.total_bytes:
            self._remove(next(iter(self._answers)))

    def _remove(self, name: str) -> None:
        kept = self._answers.pop(name)
        self.size -= kept.size
        left = self._bytes[kept.tenant] - kept.size
        if left:
            self._bytes[kept.tenant] = left
        else:
            del self._bytes[kept.tenant]
        self._on_change(name)


def answer_name(tenant: str, key: bytes) -> str:
    """What a tenant's answer is kept under. The same key of two tenants is two answers."""
    return hashlib.blake2b(tenant.encode() + b"\0" + key, digest_size=16).hexdigest()


def is_key(key: bytes) -> bool:
    """Whether it can be an idempotency key: 1 to 255 printable characters of ASCII."""
    return 0 < len(key) <= LONGEST_KEY and all(0x20 <= byte < 0x7F for byte in key)


def fingerprint(endpoint: str, body: object) -> str:
    """What tells a request from another one: its endpoint and its body, whatever the order of the fields.

    `body`: as JSON is decoded."""
    canonical = msgspec.json.encode(body, order="sorted")
    return hashlib.blake2b(endpoint.encode() + b"\0" + canonical, digest_size=16).hexdigest()
