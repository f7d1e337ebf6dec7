"""What every client got, and whether it is what was promised: each check of a run is here or calls `Ledger.fail`.

The ledger knows the right answers (`model.py`) and which faults hit which attempt, and so whether an error was due.
"""

from __future__ import annotations

from collections import Counter
from enum import StrEnum
from typing import TYPE_CHECKING, NoReturn

from tandem.core.pair_events import Fail, FailureKind, Finish, NeedPair
from tandem.core.pair_records import Retries
from tandem.core.route_types import RouteAsk
from tandem.core.types import Role
from tandem.sim.model import advance, ends, prefill, salt_of, token_after
from tandem.sim.schedule import Ask, Fault, FaultKind

if TYPE_CHECKING:
    from tandem.sim.legs import SimLeg

EPSILON = 1e-6
RETRIES = Retries()
FOR_ITSELF = frozenset(
    {
        FailureKind.DEADLINE,
        FailureKind.NO_CAPACITY,
        FailureKind.CLIENT_GONE,
        FailureKind.STOPPING,
        FailureKind.BAD_REQUEST,
    }
)
"""Errors that are not for want of attempts."""


class Invariant(StrEnum):
    """What must hold in every run."""

    LOST = "lost"
    """A request ends with its whole answer, or with an error that was due."""
    DOUBLED = "doubled"
    """No token and no end comes twice."""
    ALTERED = "altered"
    """Every token is the right one."""
    LEAKED = "leaked"
    """Nothing stays behind: on engines, in tables, in accounts."""
    SPURIOUS = "spurious"
    """No attempt is given up that nothing has hit."""
    ATTEMPTS = "attempts"
    """Attempts are bounded."""
    MISDIRECTED = "misdirected"
    """Nothing is sent where the gateway knows that it should not."""
    ROOM = "room"
    """No room is used twice, and its number names prefill's rank."""
    MIXED = "mixed"
    """One answer, one version of the weights."""
    LATE = "late"
    """Every wait has its bound."""
    USAGE = "usage"
    """Each request is counted once, with the tokens that its client got."""
    CRASHED = "crashed"
    """The table takes whatever comes."""


class Violation(Exception):
    """A promise is broken; the run ends here."""

    def __init__(self, invariant: Invariant, message: str, request: int = -1) -> None:
        super().__init__(f"{invariant.value}: {message}")
        self.invariant = invariant
        self.message = message
        self.request = request


class Attempt:
    """One room, as the world sees it."""

    __slots__ = ("faults", "hits", "known", "legs", "moved", "number", "request", "room", "version")

    def __init__(self, request: Tracked, number: int, room: int, version: str, faults: tuple[Fault, ...]) -> None:
        self.request = request
        self.number = number
        self.room = room
        self.version = version
        """What its decode group really holds."""
        self.faults = faults
        self.known = len(request.delivered)
        """Tokens that its prompt has of the answer."""
        self.hits: list[FaultKind] = []
        """Faults that may have spoiled it."""
        self.moved = False
        self.legs: dict[Role, SimLeg] = {}


class Tracked:
    """One request and what became of it."""

    __slots__ = (
        "ask", "attempts", "deadline", "delivered", "ended", "faults", "first_ask", "hit_at", "lean", "name", "prompt",
        "route", "salt", "state", "timeout", "version",
    )  # fmt: skip

    def __init__(self, ask: Ask, prompt: list[int], faults: tuple[Fault, ...], timeout: float) -> None:
        self.ask = ask
        self.name = f"r{ask.number}"
        self.prompt = prompt
        self.faults = faults
        self.first_ask = self.route = RouteAsk(prompt, output_tokens=ask.limit)
        self.timeout = timeout
        self.deadline = 0.0
        """By the gateway that has it now."""
        self.delivered: list[int] = []
        self.version: str | None = None
        """Of the weights that its client has tokens from."""
        self.salt = 0
        self.state = 0
        self.attempts: list[Attempt] = []
        self.lean = 0
        """Attempts in a row since the one that brought the latest token, that one included, moves left out."""
        self.hit_at: tuple[float, Attempt] | None = None
        self.ended: Finish | Fail | None = None

    def rewind(self, kept: int) -> None:
        """Its client begins to read again, and so many tokens are known to whoever goes on."""
        del self.delivered[kept:]
        self.lean = 0
        if not kept:
            self.version = None
        else:
            self.state = prefill(self.salt, [*self.prompt, *self.delivered])

    def has(self, kind: FaultKind) -> bool:
        return any(fault.kind is kind for fault in self.faults)


class Ledger:
    """All requests of a run."""

    def __init__(self) -> None:
        self.requests: dict[str, Tracked] = {}
        self.faults: Counter[str] = Counter()
        self.outcomes: Counter[str] = Counter()
        self.recovered_ms: Counter[int] = Counter()
        """From a fault to the next token, from another pair: milliseconds → how often."""
        self.retries = 0
        self.migrations = 0
        self.moves = 0
        self.tokens = 0
        self.open = 0

    def fail(self, invariant: Invariant, message: str, tracked: Tracked | None = None) -> NoReturn:
        """Raises Violation."""
        name = "" if tracked is None else f"{tracked.name}: "
        raise Violation(invariant, name + message, -1 if tracked is None else tracked.ask.number)

    def took_place(self, kind: FaultKind) -> None:
        self.faults[kind.value] += 1

    def hit(self, attempt: Attempt, kind: FaultKind, now: float) -> None:
        """A fault may have spoiled this attempt."""
        attempt.hits.append(kind)
        tracked = attempt.request
        if tracked.ended is None and tracked.hit_at is None and tracked.attempts[-1] is attempt:
            tracked.hit_at = (now, attempt)

    def submitted(self, tracked: Tracked) -> None:
        self.requests[tracked.name] = tracked
        self.open += 1

    def need(self, need: NeedPair, tracked: Tracked) -> None:
        """The table wants a pair: the one before must have been spoiled, and there may not have been too many."""
        if tracked.ended is not None:
            self.fail(Invariant.DOUBLED, "goes on after its end", tracked)
        if need.attempt > RETRIES.most:
            self.fail(Invariant.ATTEMPTS, f"attempt {need.attempt}", tracked)
        if not tracked.attempts:
            return
        self.spoiled(tracked)
        if tracked.lean > RETRIES.tries:
            self.fail(Invariant.ATTEMPTS, f"{tracked.lean} attempts without a token", tracked)
        if (need.version is None) != (not tracked.delivered) or need.version not in (None, tracked.version):
            self.fail(Invariant.MIXED, f"wants {need.version}, has tokens from {tracked.version}", tracked)

    def spoiled(self, tracked: Tracked) -> None:
        last = tracked.attempts[-1]
        if not last.hits and not last.moved:
            self.fail(Invariant.SPURIOUS, f"gave up attempt {last.number}, which nothing has hit", tracked)

    def opened(self, attempt: Attempt) -> None:
        tracked = attempt.request
        if tracked.attempts:
            if tracked.delivered:
                self.migrations += 1
            else:
                self.retries += 1
            self.moves += tracked.attempts[-1].moved
        tracked.attempts.append(attempt)
        tracked.lean += 1

    def delivered(self, attempt: Attempt, ids: list[int], now: float) -> None:
        """These tokens are the client's."""
        tracked = attempt.request
        if tracked.ended is not None:
            self.fail(Invariant.DOUBLED, f"{ids} after its end", tracked)
        if now > tracked.deadline + EPSILON:
            self.fail(Invariant.LATE, "a token after the deadline", tracked)
        if tracked.version is None:
            tracked.version = attempt.version
            tracked.salt = salt_of(attempt.version)
            tracked.state = prefill(tracked.salt, tracked.prompt)
        elif tracked.version != attempt.version:
            self.fail(Invariant.MIXED, f"tokens of {attempt.version} behind those of {tracked.version}", tracked)
        state, salt, known = tracked.state, tracked.salt, tracked.delivered
        for token in ids:
            right = token_after(state)
            if token != right or len(known) >= tracked.ask.limit:
                again = bool(known) and ids[0] in known
                kind = Invariant.DOUBLED if again else Invariant.ALTERED
                self.fail(kind, f"token {len(known)} is {token}, not {right}", tracked)
            known.append(token)
            state = advance(state, token, salt)
        tracked.state = state
        tracked.lean = 1
        self.tokens += len(ids)
        if tracked.hit_at is not None and tracked.hit_at[1] is not attempt:
            self.recovered_ms[round((now - tracked.hit_at[0]) * 1000)] += 1
            tracked.hit_at = None

    def finished(self, tracked: Tracked, finish: Finish) -> None:
        self._end(tracked, finish)
        known = tracked.delivered
        if not tracked.has(FaultKind.SATISFIED) and not (
            known and (len(known) == tracked.ask.limit or ends(known[-1]))
        ):
            self.fail(Invariant.LOST, f"finished ({finish.reason}) after {len(known)} tokens", tracked)
        self.outcomes["whole answer"] += 1

    def failed(
        self, tracked: Tracked, fail: Fail, now: float, *, dry_s: float | None, coming: bool, wait: float
    ) -> None:
        """`dry_s`: for how long the gateway has known no pair for it, None = it knows one. `coming`: whether it knows
        that one starts. `wait`: how long it may wait for one."""
        self._end(tracked, fail)
        if fail.delivered != len(tracked.delivered):
            self.fail(Invariant.USAGE, f"{fail.delivered} tokens told, {len(tracked.delivered)} given", tracked)
        kind = fail.failure.kind
        dry = dry_s is not None and dry_s >= wait - EPSILON
        match kind:
            case FailureKind.DEADLINE:
                due = now >= tracked.deadline - EPSILON and (tracked.has(FaultKind.DEADLINE) or dry)
            case FailureKind.NO_CAPACITY:
                due = dry_s is not None and (dry or not coming)
            case FailureKind.CLIENT_GONE:
                due = tracked.has(FaultKind.CLIENT_GONE)
            case FailureKind.STOPPING:
                due = tracked.has(FaultKind.WITHDRAWN)
            case FailureKind.BAD_REQUEST:
                due = FaultKind.BAD_REQUEST in tracked.attempts[-1].hits
            case _:
                self.spoiled(tracked)
                due = tracked.lean >= RETRIES.losses
        if not due:
            self.fail(
                Invariant.LOST,
                f"{kind.value} ({fail.failure.message}) after {len(tracked.delivered)} tokens and {tracked.lean} "
                f"attempts without one; no pair known for {dry_s} s, coming: {coming}",
                tracked,
            )
        self.outcomes["attempts used up" if kind not in FOR_ITSELF else kind.value] += 1

    def _end(self, tracked: Tracked, end: Finish | Fail) -> None:
        if tracked.ended is not None:
            self.fail(Invariant.DOUBLED, f"{tracked.ended} and then {end}", tracked)
        tracked.ended = end
        tracked.hit_at = None
        self.open -= 1
