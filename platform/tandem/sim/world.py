"""One run: a schedule against the real pair tables and routers until nothing is to come. Then everything is checked."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import msgspec

from tandem.core.pairing import PairTable
from tandem.core.types import Role
from tandem.sim.clock import Clock
from tandem.sim.engine import Engine
from tandem.sim.fleet import Fleet
from tandem.sim.gateway import LINGER_S, SimGateway
from tandem.sim.ledger import Attempt, Invariant, Ledger, Tracked, Violation
from tandem.sim.model import VOCABULARY
from tandem.sim.schedule import OF_FLEET, OF_REQUESTS, Ask, Fault, FaultKind, Schedule

TIMEOUT_S = 300.0
"""What a request may take: far more than any fault costs, so that one that hits it was forgotten."""
GATEWAY_START_S = 0.3
"""Until another gateway takes the place of one that has died."""
END_S = 1000.0
"""Virtual seconds after the last request when nothing may be left to come."""


def make_table() -> PairTable:
    return PairTable(linger_s=LINGER_S)


class Outcome(msgspec.Struct, kw_only=True):
    """What a run, or many, came to."""

    seeds: int = 0
    requests: int = 0
    tokens: int = 0
    events: int = 0
    faults: dict[str, int] = {}
    outcomes: dict[str, int] = {}
    retries: int = 0
    migrations: int = 0
    moves: int = 0
    """Migrations that no fault forced: the group was draining."""
    recovered_ms: dict[int, int] = {}
    """From a fault to the client's next token, from another pair: virtual milliseconds → how often."""
    virtual_s: float = 0.0
    seconds: float = 0.0
    """Of a processor core."""


class World:
    """A schedule on its way."""

    def __init__(
        self,
        schedule: Schedule,
        make: Callable[[], PairTable] = make_table,
        *,
        story: Callable[[str], None] | None = None,
    ) -> None:
        """`make` makes a gateway's table; `story` is told everything that happens, a line each."""
        self.schedule = schedule
        self.story = story
        self.clock = Clock()
        self.ledger = Ledger()
        self.engines: dict[str, Engine] = {}
        """URL → engine, those that are dead too."""
        self.versions = ["v0"]
        self._leg_faults: dict[tuple[int, int], tuple[Fault, ...]] = {}
        self._request_faults: dict[int, tuple[Fault, ...]] = {}
        rng = random.Random(schedule.seed)
        self._rng = rng
        self._jitter = [rng.random() for _ in range(1021)]
        self._sort_faults()
        self._make = make
        self._over: list[SimGateway] = []
        """Gateways that have died."""
        self.gateways = [SimGateway(self, number, make()) for number in range(schedule.gateways)]
        self.fleet = Fleet(self, schedule)
        for ask in schedule.asks:
            self.clock.at(ask.at, self._submit, ask)

    def _sort_faults(self) -> None:
        for fault in self.schedule.faults:
            if fault.kind in OF_REQUESTS:
                self._request_faults[fault.request] = (*self._request_faults.get(fault.request, ()), fault)
            elif fault.kind not in OF_FLEET:
                key = fault.request, fault.attempt
                self._leg_faults[key] = (*self._leg_faults.get(key, ()), fault)

    def faults_of(self, tracked: Tracked, attempt: int) -> tuple[Fault, ...]:
        """What is to go wrong with an attempt."""
        faults = self._leg_faults.get((tracked.ask.number, attempt), ())
        for fault in tracked.faults:
            if fault.kind is FaultKind.POISON:
                kind = FaultKind.ABORTED if fault.after % 2 else FaultKind.UNREACHABLE
                faults = (*faults, Fault(kind=kind, role=fault.role, seconds=0.03))
        return faults

    def jitter(self, tracked: Tracked, attempt: Attempt, role: Role) -> float:
        """A number in 0 … 1 for a leg; it stays when other faults are left out."""
        return self._jitter[(tracked.ask.prompt + attempt.number * 31 + (7 if role is Role.DECODE else 0)) % 1021]

    def room_bits(self) -> int:
        return self._rng.getrandbits(63)

    def tell(self, line: str) -> None:
        """A line of the story."""
        if self.story is not None:
            self.story(f"{self.clock.now:9.4f} {line}")

    def gateway_dies(self, fault: Fault) -> None:
        """Another takes its place; what it leaves is asked for again, of any."""
        number = fault.gateway % len(self.gateways)
        dead, now = self.gateways[number], self.clock.now
        if now < dead.up_at:
            return
        self._over.append(dead)
        new = self.gateways[number] = SimGateway(self, number, self._make())
        new.up_at = now + GATEWAY_START_S
        self.clock.at(new.up_at, self.fleet.resync, number)
        for tracked in dead.die():
            tracked.rewind(max(0, len(tracked.delivered) - fault.after))
            self.clock.after(fault.seconds, self._go_on, tracked, tracked.ask.number % len(self.gateways))

    def _go_on(self, tracked: Tracked, number: int) -> None:
        gateway = self.gateways[number]
        if self.clock.now < gateway.up_at:
            self.clock.at(gateway.up_at, self._go_on, tracked, number)
        else:
            gateway.submit(tracked)

    def _submit(self, ask: Ask) -> None:
        faults = self._request_faults.get(ask.number, ())
        seconds = TIMEOUT_S
        for fault in faults:
            if fault.kind is FaultKind.DEADLINE:
                seconds = fault.seconds
                self.ledger.took_place(fault.kind)
        prompt = [(ask.prompt * 31 + place * place * 7919) % VOCABULARY for place in range(ask.length)]
        tracked = Tracked(ask, prompt, faults, seconds)
        self.ledger.submitted(tracked)
        self._go_on(tracked, ask.gateway)

    def run(self) -> Outcome:
        """Raises Violation when a promise is broken."""
        began = time.process_time()
        last = self.schedule.asks[-1].at if self.schedule.asks else 0.0
        if not self.clock.run(last + END_S):
            self.ledger.fail(Invariant.LATE, f"something still happens {END_S:.0f} s after the last request")
        self._check_end()
        return self.outcome(time.process_time() - began)

    def _check_end(self) -> None:
        ledger = self.ledger
        for tracked in ledger.requests.values():
            if tracked.ended is None:
                ledger.fail(Invariant.LOST, "never ends", tracked)
        for gateway in self.gateways:
            gateway.check_empty()
        self.fleet.check_empty()
        charged = {name: tokens for gateway in (*self._over, *self.gateways) for name, tokens in gateway.usage.items()}
        if charged != {name: len(tracked.delivered) for name, tracked in ledger.requests.items()}:
            ledger.fail(Invariant.USAGE, "what is charged is not what was delivered")

    def outcome(self, seconds: float) -> Outcome:
        ledger = self.ledger
        return Outcome(
            seeds=1,
            requests=len(ledger.requests),
            tokens=ledger.tokens,
            events=self.clock.events,
            faults=dict(ledger.faults),
            outcomes=dict(ledger.outcomes),
            retries=ledger.retries,
            migrations=ledger.migrations,
            moves=ledger.moves,
            recovered_ms=dict(ledger.recovered_ms),
            virtual_s=self.clock.now,
            seconds=seconds,
        )


def breaks(schedule: Schedule, make: Callable[[], PairTable] = make_table) -> Violation | None:
    """Run a schedule; the promise that it breaks, if any."""
    try:
        World(schedule, make).run()
    except Violation as violation:
        return violation
    return None
