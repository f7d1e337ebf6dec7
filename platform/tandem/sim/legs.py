"""One leg of a pair: the gateway's end of one connection to a simulated engine, and the wire between them.

It behaves as `gateway/pairing/legs.py` does: it reports one end; an abort is told up to four times, then the connection
is closed. Faults can make it say more than it should (`TWICE`, `LATE`), so that the table is tested beyond that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tandem.core.pair_events import (
    Event,
    Failure,
    FailureKind,
    LegAccepted,
    LegClosed,
    LegFailed,
    LegFinished,
    LegTokens,
)
from tandem.core.route_types import Target
from tandem.core.types import Role
from tandem.sim.ledger import Attempt
from tandem.sim.schedule import Fault, FaultKind

if TYPE_CHECKING:
    from tandem.sim.engine import Engine
    from tandem.sim.gateway import SimGateway

NEVER = float("inf")
ABORT_TRIES = 4
ABORT_WAIT_S = 0.5
ABORT_TIMEOUT_S = 1.0
DISCONNECT_S = 2.0
"""SGLang aborts a request whose client has gone after this."""


class SimLeg:
    """One request on one engine."""

    __slots__ = (
        "aborting", "attempt", "begun", "connected", "engine", "faults", "garbage", "gateway", "jitter", "lag", "last",
        "late", "left", "reported", "role", "room", "salt", "state", "stops_at", "target",
    )  # fmt: skip

    def __init__(self, gateway: SimGateway, attempt: Attempt, role: Role, target: Target, jitter: float) -> None:
        self.gateway = gateway
        self.attempt = attempt
        self.role = role
        self.room = attempt.room
        self.target = target
        self.jitter = jitter
        self.lag = 0.001 + 0.012 * jitter
        """Seconds one way."""
        self.faults: tuple[Fault, ...] = ()
        self.late = 0.0
        # The gateway's side
        self.reported = False
        self.aborting = False
        self.connected = True
        self.last = 0.0
        """When what the engine said last arrives: a connection keeps the order."""
        # The engine's side
        self.engine: Engine | None = None
        """The one that holds it."""
        self.stops_at = NEVER
        """The engine produces nothing for it from then on."""
        self.begun = False
        self.garbage = False
        self.state = 0
        self.salt = 0
        self.left = 0

    def fault(self, kind: FaultKind) -> Fault | None:
        for one in self.faults:
            if one.kind is kind:
                return one
        return None

    def start(self) -> None:
        """Send it."""
        clock = self.gateway.world.clock
        delay = self.lag
        if self.attempt.faults:
            self.faults = tuple(fault for fault in self.attempt.faults if fault.role is self.role)
            for fault in self.faults:
                delay += self._expect(fault)
        clock.after(delay, self._arrive)

    def _expect(self, fault: Fault) -> float:
        """Prepare a fault; by how much it delays the request."""
        world = self.gateway.world
        match fault.kind:
            case FaultKind.SEND_LATE:
                self.hit(fault.kind)
                return fault.seconds
            case FaultKind.ANSWERS_LATE:
                self.hit(fault.kind)
                self.late = fault.seconds
            case FaultKind.BREAKS | FaultKind.ABORTED | FaultKind.STALLS:
                world.clock.after(fault.seconds, self._strike, fault.kind)
        return 0.0

    def _strike(self, kind: FaultKind) -> None:
        if kind is FaultKind.BREAKS:
            if not self.reported:
                self.hit(kind)
                self.fail(FailureKind.BROKEN, "the connection broke")
        elif self.engine is not None and self.stops_at == NEVER:
            self.hit(kind)
            if kind is FaultKind.STALLS:
                self.stops_at = self.gateway.world.clock.now
            else:
                self.engine.give_up(self)

    def hit(self, kind: FaultKind) -> None:
        """A fault takes place that may spoil the attempt."""
        world = self.gateway.world
        world.ledger.took_place(kind)
        world.ledger.hit(self.attempt, kind, world.clock.now)
        if world.story is not None:
            world.tell(f"{self} ! {kind.value}")

    def _arrive(self) -> None:
        if self.connected:
            self.gateway.world.engines[self.target.url].receive(self)

    # What the engine says

    def say(self, call: Callable[..., None], *args: Any) -> None:
        """Engine to gateway; what is said on one connection arrives in order."""
        if self.connected:
            clock = self.gateway.world.clock
            self.last = max(self.last, clock.now + self.lag + self.late)
            clock.at(self.last, call, *args)

    def accepted(self) -> None:
        if not self.reported:
            self.gateway.tell(LegAccepted(room=self.room, role=self.role))

    def finished(self, first: int | None, reason: str) -> None:
        """The engine has ended it well."""
        if not self.reported:
            self.gateway.leg_ended(self)
            self._report(LegFinished(room=self.room, role=self.role, reason=reason, first=first))

    def fail(self, kind: FailureKind, message: str) -> None:
        """It is over, and not well; or it was to be ended."""
        if self.reported:
            return
        if self.connected:
            self.connected = False
            if self.engine is not None:
                self.gateway.world.clock.after(DISCONNECT_S, self.engine.disconnected, self)
        if self.aborting:
            self._report(LegClosed(room=self.room, role=self.role))
        else:
            failure = Failure(kind=kind, message=message)
            self._report(LegFailed(room=self.room, role=self.role, failure=failure))

    def orphan(self) -> None:
        """The gateway has died, and with it this end of the connection."""
        clock = self.gateway.world.clock
        self.reported, self.connected = True, False
        self.gateway.world.ledger.hit(self.attempt, FaultKind.GATEWAY_DIES, clock.now)
        if self.engine is not None:
            clock.after(DISCONNECT_S, self.engine.disconnected, self)

    # What the gateway does

    def abort(self, *, notify: bool) -> None:
        """End it: tell the engine if `notify`, then drop the connection."""
        self.aborting = True
        self.gateway.world.clock.after(0.0, self._abort, 1 if notify else ABORT_TRIES + 1)

    def _abort(self, turn: int) -> None:
        if self.reported:
            return
        if turn > ABORT_TRIES:
            self.fail(FailureKind.BROKEN, "the gateway dropped the connection")
            return
        world = self.gateway.world
        engine = world.engines[self.target.url]
        lost = self.fault(FaultKind.ABORT_LOST) is not None
        if lost and turn == 1:
            world.ledger.took_place(FaultKind.ABORT_LOST)
        if lost or engine.silent:
            world.clock.after(ABORT_TIMEOUT_S + ABORT_WAIT_S, self._abort, turn + 1)
        elif engine.dead:
            world.clock.after(self.lag, self._abort, ABORT_TRIES + 1)
        else:
            world.clock.after(self.lag, engine.abort, self)
            world.clock.after(2 * self.lag + ABORT_WAIT_S, self._abort, turn + 1)

    def _report(self, event: Event) -> None:
        self.reported = True
        if self.faults:
            for fault in self.faults:
                if fault.kind is FaultKind.TWICE or fault.kind is FaultKind.LATE:
                    self.gateway.world.ledger.took_place(fault.kind)
                    delay = fault.seconds if fault.kind is FaultKind.LATE else 0.0
                    self.gateway.world.clock.after(delay, self._echo, event)
        self.gateway.tell(event)

    def _echo(self, event: Event) -> None:
        """Once more after the end: tokens, then every kind of end."""
        tell, room, role = self.gateway.tell, self.room, self.role
        failure = Failure(kind=FailureKind.ABORTED, message="said after the end")
        tell(LegAccepted(room=room, role=role))
        if role is Role.DECODE:
            tell(LegTokens(room=room, ids=[7, 7, 7]))
        tell(event)
        tell(LegFinished(room=room, role=role, reason="stop", first=7))
        tell(LegFailed(room=room, role=role, failure=failure))
        tell(LegClosed(room=room, role=role))

    def __str__(self) -> str:
        return (
            f"{self.attempt.request.name} attempt {self.attempt.number} {self.role.value} on "
            f"{self.target.group}/{self.target.epoch}"
        )
