"""The pair table's behaviour as a table: what each event does to a request in each state. `python pairing_states.py`
prints what `docs/pairing.md` has to show."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tandem.core.pair_events import (
    AbortLeg,
    Action,
    ClientGone,
    Deliver,
    Event,
    Fail,
    Failure,
    FailureKind,
    Finish,
    GroupLost,
    GroupUp,
    LegFailed,
    LegFinished,
    LegTokens,
    Move,
    NeedPair,
    Opened,
    Refused,
    RoomClosed,
    Satisfied,
    SendLeg,
    Submit,
    Tick,
)
from tandem.core.pairing import PairTable
from tandem.core.routing import Pair, Target
from tandem.core.types import Role

PREFILL, DECODE = Role.PREFILL, Role.DECODE
LATER = {"held": 2.0, "complete": 2.0}
"""When what a state waits for is over; 50 s, when every patience but the deadline is, for all others."""


def _pair() -> Pair:
    def target(role: Role, group: str) -> Target:
        return Target(role=role, group=group, epoch=1, dp_rank=0, dp_size=1, url="")

    return Pair(prefill=target(PREFILL, "p0"), decode=target(DECODE, "d0"), bootstrap_host="", bootstrap_port=0)


def _failure(kind: FailureKind) -> Failure:
    return Failure(kind=kind, message="it failed")


def _opened(room: int) -> Opened:
    return Opened(request="r", room=room, pair=_pair(), version="v1")


def _broken(room: int) -> LegFailed:
    return LegFailed(room=room, role=DECODE, failure=_failure(FailureKind.BROKEN))


NONE = _failure(FailureKind.NO_CAPACITY)
SUBMIT = Submit(request="r", deadline=100, first_token_s=10, stall_s=5, capacity_s=20, hold_s=1)
OPENED = _opened(7)
TOKENS = LegTokens(room=7, ids=[1])
PREFILLED = LegFinished(room=7, role=PREFILL, reason="length", first=1)

STATES: dict[str, Sequence[Event]] = {
    "asking": [SUBMIT],
    "waiting": [SUBMIT, Refused(request="r", failure=NONE, coming=True)],
    "resting": [SUBMIT, _opened(5), _broken(5), _opened(6), _broken(6)],
    "open": [SUBMIT, OPENED],
    "held": [SUBMIT, OPENED, TOKENS],
    "complete": [SUBMIT, OPENED, TOKENS, LegFinished(room=7, role=DECODE, reason="stop")],
    "shown": [SUBMIT, OPENED, PREFILLED, TOKENS],
    "doubted": [SUBMIT, OPENED, TOKENS, Tick(), LegFailed(room=7, role=PREFILL, failure=_failure(FailureKind.ABORTED))],
    "ended": [SUBMIT, OPENED, PREFILLED, TOKENS, LegFinished(room=7, role=DECODE, reason="stop")],
}
EVENTS: dict[str, Event] = {
    "a pair is found": _opened(9),
    "no pair, one is coming": Refused(request="r", failure=NONE, coming=True),
    "no pair, none is coming": Refused(request="r", failure=NONE),
    "a group comes up": GroupUp(group="x0", epoch=1),
    "prefill ends well": PREFILLED,
    "prefill ends, another first token": LegFinished(room=7, role=PREFILL, reason="length", first=9),
    "prefill aborts": LegFailed(room=7, role=PREFILL, failure=_failure(FailureKind.ABORTED)),
    "prefill breaks": LegFailed(room=7, role=PREFILL, failure=_failure(FailureKind.BROKEN)),
    "prefill's group is lost": GroupLost(group="p0", epoch=1),
    "tokens": LegTokens(room=7, ids=[1]),
    "decode ends well": LegFinished(room=7, role=DECODE, reason="stop"),
    "decode breaks": _broken(7),
    "the engine says: bad request": LegFailed(room=7, role=DECODE, failure=_failure(FailureKind.BAD_REQUEST)),
    "decode's group is lost": GroupLost(group="d0", epoch=1),
    "decode's group leaves": Move(request="r", group="d0", epoch=1),
    "nothing comes for too long": Tick(),
    "the stop string is found": Satisfied(request="r"),
    "the client goes": ClientGone(request="r"),
}


def reach(state: str) -> PairTable:
    """A table whose one request is in this state."""
    table = PairTable()
    for event in STATES[state]:
        # What is held is shown when its time is over.
        table.handle(event, 1 if isinstance(event, Tick) or event is STATES[state][-1] else 0)
    return table


def _words(actions: Sequence[Action]) -> list[str]:
    """What a list of actions does, without what only keeps the books."""
    aborted = [action.role.value for action in actions if isinstance(action, AbortLeg)]
    words = [f"abort {' and '.join(aborted)}"] if aborted else []
    names: dict[type[Action], Callable[[Action], str]] = {
        NeedPair: lambda _: "ask for a pair",
        SendLeg: lambda _: "send both legs",
        Deliver: lambda _: "deliver",
        Finish: lambda _: "finish",
        Fail: lambda action: f"fail ({action.failure.kind.value})" if isinstance(action, Fail) else "",
        RoomClosed: lambda _: "",
    }
    for action in actions:
        word = names.get(type(action), lambda _: "")(action)
        if word and word not in words:
            words.append(word)
    return words


def cell(state: str, event: Event) -> str:
    """What the event does in this state; a dash = nothing."""
    table = reach(state)
    before = table.parked
    words = _words(table.handle(event, LATER.get(state, 50) if isinstance(event, Tick) else 1))
    if table.parked > before:
        words.append("wait")
    if isinstance(event, LegTokens) and state in ("open", "held", "doubted"):
        words.append("hold")
    return ", ".join(words) or "–"


def table() -> str:
    """The whole table in Markdown."""
    lines = ["| event | " + " | ".join(STATES) + " |", "|---" * (len(STATES) + 1) + "|"]
    for name, event in EVENTS.items():
        lines.append(f"| {name} | " + " | ".join(cell(state, event) for state in STATES) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
