"""A simulated group of SGLang workers: its side of the prefill/decode protocol, and how it breaks.

Both legs of a room must be there before prefill begins; then the KV is handed over, prefill answers with the first
token, and decode says it too and goes on. A leg whose partner is gone waits `PARTNER_WAIT_S`, unless it is aborted;
an abort of decode reaches prefill, one of prefill does not reach decode (SGLang 0.5.23).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tandem.core.pair_events import FailureKind
from tandem.core.types import Role
from tandem.sim.ledger import Attempt, Invariant
from tandem.sim.legs import NEVER, SimLeg
from tandem.sim.model import VOCABULARY, advance, ends, prefill, salt_of, token_after
from tandem.sim.schedule import FaultKind

if TYPE_CHECKING:
    from tandem.sim.world import World

OTHER = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}
_ANSWERS = (
    (FaultKind.UNREACHABLE, FailureKind.UNREACHABLE),
    (FaultKind.REFUSED, FailureKind.REFUSED),
    (FaultKind.BAD_REQUEST, FailureKind.BAD_REQUEST),
)
"""What goes wrong at once, and what the gateway makes of it."""
PARTNER_WAIT_S = 20.0
"""SGLang's own is 300 s; either is far beyond what the gateway waits."""
STEP_S = 0.06
"""Between two chunks of a stream."""
SLOW_TIMES = 10.0


class Engine:
    """One epoch of one group. Where a request can be sent, `World.engines` has one for its URL for ever."""

    def __init__(self, world: World, group: str, role: Role, epoch: int, version: str, url: str) -> None:
        self.world = world
        self.group = group
        self.role = role
        self.epoch = epoch
        self.version = version
        self.salt = salt_of(version)
        self.url = url
        self.legs: dict[SimLeg, None] = {}
        """What it holds, in order."""
        self.rooms: set[int] = set()
        """Every room that it ever had."""
        self.cause: FaultKind | None = None
        """Why it answers nothing any more."""
        self.dead = False
        self.silent = False
        """Nothing answers at its address: connections stay, and time out."""
        self.slow_until = 0.0
        self.busy_until = 0.0

    # Requests

    def receive(self, leg: SimLeg) -> None:
        """A leg has arrived."""
        now = self.world.clock.now
        attempt = leg.attempt
        if now < self.busy_until:
            self.world.ledger.hit(attempt, FaultKind.PAUSES, now)
            self.world.clock.at(self.busy_until, leg._arrive)
            return
        if self.cause is not None:
            self.world.ledger.hit(attempt, self.cause, now)
            if not self.silent:
                leg.say(leg.fail, FailureKind.UNREACHABLE, "nobody listens there")
            elif not self.dead:
                self._hold(leg)
                leg.stops_at = now
            self._left_alone(leg)
            return
        for kind, failure in _ANSWERS:
            if attempt.faults and leg.fault(kind) is not None:
                leg.hit(kind)
                leg.say(leg.fail, failure, f"the engine says {kind.value}")
                self._left_alone(leg)
                return
        if leg.room in self.rooms:
            self.world.ledger.fail(Invariant.ROOM, f"room {leg.room} came to {self.group} twice", attempt.request)
        self.rooms.add(leg.room)
        if self.role is Role.PREFILL and leg.room % leg.target.dp_size != leg.target.dp_rank:
            self.world.ledger.fail(Invariant.ROOM, f"room {leg.room} is not of rank {leg.target.dp_rank}")
        self._hold(leg)
        if leg.jitter < 0.3:
            leg.say(leg.accepted)
        partner = attempt.legs[OTHER[self.role]]
        if partner.engine is not None:
            self._meet(attempt)

    def _hold(self, leg: SimLeg) -> None:
        self.legs[leg] = None
        leg.engine = self

    def abort(self, leg: SimLeg) -> None:
        """`POST /abort_request`: what is not known (yet) is not minded."""
        if self.world.clock.now < self.busy_until:
            self.world.clock.at(self.busy_until, self.abort, leg)
        else:
            self.give_up(leg)

    def disconnected(self, leg: SimLeg) -> None:
        """The client's connection is gone."""
        self.abort(leg)

    def give_up(self, leg: SimLeg) -> None:
        """The engine ends it without an answer."""
        if leg.engine is self and self.cause is None:
            self._give_up(leg)

    def _give_up(self, leg: SimLeg) -> None:
        self._end(leg)
        leg.say(leg.fail, FailureKind.ABORTED, "aborted inside a 200")
        partner = leg.attempt.legs[OTHER[self.role]]
        if self.role is Role.DECODE and partner.engine is not None:
            partner.engine.give_up(partner)
        elif self.role is Role.PREFILL:
            self._left_alone(leg)

    def _end(self, leg: SimLeg) -> None:
        leg.stops_at = min(leg.stops_at, self.world.clock.now)
        self.legs.pop(leg, None)
        leg.engine = None

    def _left_alone(self, leg: SimLeg) -> None:
        """The partner of this leg waits for nothing."""
        partner = leg.attempt.legs[OTHER[self.role]]
        if not partner.reported and not partner.begun:
            self.world.clock.after(PARTNER_WAIT_S, self._waited, partner)

    @staticmethod
    def _waited(leg: SimLeg) -> None:
        if leg.engine is not None and not leg.begun:
            leg.engine.give_up(leg)

    # The work

    def _meet(self, attempt: Attempt) -> None:
        """Both legs are there: prefill computes, and hands the KV over."""
        leg = attempt.legs[Role.PREFILL]
        engine = leg.engine
        assert engine is not None, "both are there"
        seconds = 0.03 + 0.1 * leg.jitter
        if engine.slow_until > self.world.clock.now:
            self.world.ledger.hit(attempt, FaultKind.SLOW, self.world.clock.now)
            seconds *= SLOW_TIMES
        if attempt.faults and (fault := leg.fault(FaultKind.SLOW_PREFILL)) is not None:
            leg.hit(fault.kind)
            seconds += fault.seconds
        self.world.clock.after(seconds, self._prefilled, attempt)

    def _prefilled(self, attempt: Attempt) -> None:
        leg, decode = attempt.legs[Role.PREFILL], attempt.legs[Role.DECODE]
        engine, reader = leg.engine, decode.engine
        if engine is None or reader is None or leg.stops_at != NEVER or decode.stops_at != NEVER:
            return
        now = self.world.clock.now
        busy = max(engine.busy_until, reader.busy_until)
        if now < busy:
            self.world.clock.at(busy, self._prefilled, attempt)
            return
        if engine.version != reader.version:
            self.world.ledger.fail(Invariant.MIXED, f"{engine.version} hands KV to {reader.version}", attempt.request)
        tracked = attempt.request
        known = tracked.delivered[: attempt.known]
        state = prefill(engine.salt, [*tracked.prompt, *known] if known else tracked.prompt)
        decode.begun = leg.begun = True
        decode.state, decode.salt, decode.left = state, reader.salt, max(1, tracked.ask.limit - attempt.known)
        garbage = None
        if attempt.faults:
            garbage = leg.fault(FaultKind.BAD_KV) or decode.fault(FaultKind.BAD_KV)
        if garbage is not None:
            (leg if garbage.role is Role.PREFILL else decode).hit(garbage.kind)
            decode.garbage = True
        # Without prefill's word garbage is kept back only for a time (`hold_s`): of that nothing is promised.
        if attempt.faults and garbage is None and (mute := leg.fault(FaultKind.MUTE)) is not None:
            leg.hit(mute.kind)
            leg.stops_at = now
        else:
            engine._end(leg)
            if garbage is not None and garbage.role is Role.PREFILL:
                leg.say(leg.fail, FailureKind.ABORTED, "prefill was aborted")
            else:
                leg.say(leg.finished, token_after(state), "length")
        if attempt.faults and decode.fault(FaultKind.EMPTY) is not None:
            decode.hit(FaultKind.EMPTY)
            reader._end(decode)
            decode.say(decode.finished, None, "stop")
        else:
            reader._produce(decode, now)

    def _produce(self, leg: SimLeg, at: float) -> None:
        """The stream's next chunk, made at `at`: computed now, and heard when it arrives, if it was made at all."""
        state, salt = leg.state, leg.salt
        ids: list[int] = []
        over = False
        for _ in range(min(leg.left, 1 + int(leg.jitter * 4))):
            token = token_after(state)
            if leg.garbage:
                token = (token + 1 + leg.room % 97) % VOCABULARY
            ids.append(token)
            if ends(token):
                over = True
                break
            state = advance(state, token, salt)
        leg.state = state
        leg.left -= len(ids)
        reason = "stop" if over else "length" if not leg.left else ""
        leg.last = max(leg.last, at + leg.lag + leg.late)
        self.world.clock.at(leg.last, self._heard, leg, ids, reason, at)

    def _heard(self, leg: SimLeg, ids: list[int], reason: str, at: float) -> None:
        if leg.stops_at <= at:
            return
        if reason:
            self._end(leg)
        elif leg.stops_at == NEVER:
            step = STEP_S * (0.5 + leg.jitter)
            if self.slow_until > at:
                self.world.ledger.hit(leg.attempt, FaultKind.SLOW, at)
                step *= SLOW_TIMES
            self._produce(leg, max(at + step, self.busy_until))
        if leg.connected and not leg.reported:
            leg.gateway.heard(leg, ids)
            if reason:
                leg.finished(None, reason)

    # How it breaks

    def kill(self, cause: FaultKind, *, loud: bool) -> None:
        """Everything on it is lost. `loud`: connections are reset; else nobody is told."""
        now = self.world.clock.now
        self.cause, self.dead, self.silent = cause, True, not loud
        legs, self.legs = list(self.legs), {}
        for leg in legs:
            leg.stops_at = min(leg.stops_at, now)
            leg.engine = None
            self.world.ledger.hit(leg.attempt, cause, now)
            if loud:
                leg.say(leg.fail, FailureKind.BROKEN, "the connection was reset")
            self._left_alone(leg)

    def hang(self, cause: FaultKind) -> None:
        """It takes what comes and answers nothing."""
        now = self.world.clock.now
        self.cause, self.silent = cause, True
        for leg in self.legs:
            leg.stops_at = min(leg.stops_at, now)
            self.world.ledger.hit(leg.attempt, cause, now)
            self._left_alone(leg)

    def pause(self, seconds: float) -> None:
        now = self.world.clock.now
        self.busy_until = max(self.busy_until, now + seconds)
        for leg in self.legs:
            self.world.ledger.hit(leg.attempt, FaultKind.PAUSES, now)
