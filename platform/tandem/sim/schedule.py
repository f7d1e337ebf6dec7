"""What happens in one simulated run, as data: who asks what when, and what breaks when. All of it follows from a seed.

Faults are data too, so that one can be left out and the run repeated: that is how a failing run is made small
(`shrink.py`), and how what was found is kept as a test.
"""

from __future__ import annotations

import random
from enum import StrEnum

import msgspec

from tandem.core.types import Role


class FaultKind(StrEnum):
    """What can go wrong. Times below are virtual seconds."""

    # A group, at `at`
    DIES = "group_dies"
    """Its connections are reset."""
    VANISHES = "group_vanishes"
    """Its node is gone: its connections stay, and nothing comes."""
    HANGS = "group_hangs"
    """It takes connections and answers nothing."""
    PAUSES = "group_pauses"
    """It does nothing for `seconds`, then goes on."""
    SLOW = "group_slow"
    """Its steps take many times as long, for `seconds`."""
    DRAINS = "group_drains"
    """It is drained and leaves; later one of its name starts anew."""
    RENEWED = "group_new_weights"
    """It is drained and comes back with the next version of the weights."""
    CORDONED = "group_cordoned"
    """It takes nothing new for `seconds`."""
    ROLE_GONE = "capacity_gone"
    """All groups of a role die at once; they come back after `seconds`."""
    # A gateway, at `at`
    GATEWAY_DIES = "gateway_dies"
    """Its clients ask again after `seconds`, with their idempotency keys; all but the last `after` tokens were kept."""
    # The store, as one gateway sees it, at `at` for `seconds`
    NEWS_LOST = "store_news_lost"
    """Changes of groups are not told; what is then so, is told afterwards."""
    NEWS_LATE = "store_news_late"
    """Changes of groups are told a second late."""
    # One leg of one attempt
    BREAKS = "connection_breaks"
    """`seconds` after it was sent."""
    SEND_LATE = "request_late"
    """The engine gets it `seconds` late, maybe after its abort."""
    ANSWERS_LATE = "answers_late"
    """All that the engine says comes `seconds` late, maybe after what the other leg says later."""
    REFUSED = "engine_refuses"
    """Error status 503."""
    UNREACHABLE = "connection_refused"
    """No connection."""
    ABORTED = "engine_aborts"
    """The engine gives it up inside a 200, `seconds` after it was sent."""
    STALLS = "leg_stalls"
    """Nothing comes any more, `seconds` after it was sent."""
    BAD_KV = "kv_garbage"
    """Prefill: it gives up, and decode goes on with garbage. Decode: it comes as garbage though prefill is well."""
    MUTE = "prefill_mute"
    """Prefill hands its KV over and never answers."""
    EMPTY = "decode_says_nothing"
    """Decode ends well, without a token."""
    SLOW_PREFILL = "prefill_slow"
    """The prompt takes `seconds` longer."""
    ABORT_LOST = "abort_lost"
    """The engine never hears that it is to abort."""
    TWICE = "answers_twice"
    """All is said again right after the end."""
    LATE = "answers_after_end"
    """All is said again `seconds` after the end."""
    # One request
    BAD_REQUEST = "bad_request"
    """The engine says that the request is wrong."""
    CLIENT_GONE = "client_gone"
    """The client leaves after `seconds`."""
    SATISFIED = "stop_string"
    """The gateway has found all it wants after `after` tokens."""
    DEADLINE = "short_deadline"
    """The request may take only `seconds`."""
    POISON = "poison"
    """No engine can stand it: none can be reached with it (`after` is even), or each gives it up."""
    WITHDRAWN = "withdrawn"
    """The gateway gives it up after `seconds`."""


OF_FLEET = frozenset(
    {
        FaultKind.DIES, FaultKind.VANISHES, FaultKind.HANGS, FaultKind.PAUSES, FaultKind.SLOW, FaultKind.DRAINS,
        FaultKind.RENEWED, FaultKind.CORDONED, FaultKind.ROLE_GONE, FaultKind.NEWS_LOST, FaultKind.NEWS_LATE,
        FaultKind.GATEWAY_DIES,
    }
)  # fmt: skip
OF_REQUESTS = frozenset(
    {FaultKind.CLIENT_GONE, FaultKind.SATISFIED, FaultKind.DEADLINE, FaultKind.POISON, FaultKind.WITHDRAWN}
)


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """One request of a client."""

    number: int
    at: float
    gateway: int
    prompt: int
    """Seed of the prompt's tokens."""
    length: int
    limit: int


class Fault(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One thing that goes wrong. Which fields count depends on the kind."""

    kind: FaultKind
    at: float = 0.0
    seconds: float = 0.0
    role: Role = Role.DECODE
    pick: int = 0
    """Which group of the role."""
    gateway: int = 0
    request: int = -1
    attempt: int = 1
    after: int = 0


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """One run."""

    seed: int
    prefill: int
    """Groups."""
    decode: int
    dp_size: int
    gateways: int
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]


GROUPS = (1, 2, 2, 2, 3, 3, 3, 3, 4, 4)
"""Of each role."""
RATE = 60.0
"""Requests per virtual second."""
FAULTY = 0.3
"""Share of the requests that something is aimed at."""
GROUP_FAULT_EVERY_S = (0.5, 1.0, 1.5, 2.0)
"""One of these, by the seed: some fleets have a bad day."""
STORE_FAULT_EVERY_S = 2.0
_GROUP_KINDS = (
    (FaultKind.DIES, 5), (FaultKind.VANISHES, 5), (FaultKind.HANGS, 4), (FaultKind.PAUSES, 3), (FaultKind.SLOW, 2),
    (FaultKind.DRAINS, 4), (FaultKind.RENEWED, 1), (FaultKind.CORDONED, 2), (FaultKind.ROLE_GONE, 1),
)  # fmt: skip
_LEG_KINDS = (
    (FaultKind.BREAKS, 6), (FaultKind.SEND_LATE, 3), (FaultKind.ANSWERS_LATE, 5), (FaultKind.REFUSED, 2),
    (FaultKind.UNREACHABLE, 2),
    (FaultKind.ABORTED, 5), (FaultKind.STALLS, 3), (FaultKind.BAD_KV, 4), (FaultKind.SLOW_PREFILL, 3),
    (FaultKind.ABORT_LOST, 4), (FaultKind.TWICE, 4), (FaultKind.LATE, 4), (FaultKind.MUTE, 2),
    (FaultKind.EMPTY, 1),
)  # fmt: skip
_REQUEST_KINDS = (
    (FaultKind.CLIENT_GONE, 4), (FaultKind.SATISFIED, 3), (FaultKind.DEADLINE, 2), (FaultKind.BAD_REQUEST, 1),
    (FaultKind.POISON, 1), (FaultKind.WITHDRAWN, 1),
)  # fmt: skip


def draw(seed: int, requests: int) -> Schedule:
    """The schedule of a seed."""
    rng = random.Random(seed)
    gateways = rng.choice((1, 2, 2, 3))
    asks: list[Ask] = []
    now = 0.5
    for number in range(requests):
        now += rng.expovariate(RATE)
        asks.append(
            Ask(
                number=number,
                at=now,
                gateway=rng.randrange(gateways),
                prompt=rng.getrandbits(32),
                length=rng.randint(2, 12) if rng.random() < 0.95 else rng.randint(64, 200),
                limit=rng.choice((1, 2, 4, 8, 16, 24, 32)),
            )
        )
    faults = [*_of_groups(rng, now), *_of_store(rng, now, gateways), *_of_requests(rng, asks)]
    return Schedule(
        seed=seed,
        prefill=rng.choice(GROUPS),
        decode=rng.choice(GROUPS),
        dp_size=rng.choice((1, 2, 4)),
        gateways=gateways,
        asks=tuple(asks),
        faults=tuple(faults),
    )


def _pick(rng: random.Random, kinds: tuple[tuple[FaultKind, int], ...]) -> FaultKind:
    return rng.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0]


def _of_groups(rng: random.Random, end: float) -> list[Fault]:
    faults: list[Fault] = []
    every = rng.choice(GROUP_FAULT_EVERY_S)
    now = rng.expovariate(1 / every)
    while now < end:
        kind = _pick(rng, _GROUP_KINDS)
        role = rng.choice((Role.PREFILL, Role.DECODE))
        # A capacity that is gone for longer than a request may wait for it, now and then.
        seconds = rng.choice((1.0, 2.0, 4.0, 12.0)) if kind is FaultKind.ROLE_GONE else rng.uniform(0.1, 3.0)
        faults.append(Fault(kind=kind, at=now, role=role, pick=rng.randrange(12), seconds=seconds))
        now += rng.expovariate(1 / every)
    return faults


def _of_store(rng: random.Random, end: float, gateways: int) -> list[Fault]:
    faults: list[Fault] = []
    now = rng.expovariate(1 / STORE_FAULT_EVERY_S)
    while now < end:
        kind = rng.choice((FaultKind.NEWS_LOST, FaultKind.NEWS_LOST, FaultKind.NEWS_LATE, FaultKind.GATEWAY_DIES))
        seconds = rng.uniform(0.1, 1.0) if kind is FaultKind.GATEWAY_DIES else rng.uniform(0.2, 5.0)
        gateway, after = rng.randrange(gateways), rng.choice((0, 0, 1, 3, 8))
        faults.append(Fault(kind=kind, at=now, seconds=seconds, gateway=gateway, after=after))
        now += rng.expovariate(1 / STORE_FAULT_EVERY_S)
    return faults


def _of_requests(rng: random.Random, asks: list[Ask]) -> list[Fault]:
    faults: list[Fault] = []
    for ask in asks:
        if rng.random() >= FAULTY:
            continue
        if rng.random() < 0.25:
            kind = _pick(rng, _REQUEST_KINDS)
            seconds, after = rng.uniform(0.0, 1.5), rng.randint(1, 16)
            faults.append(Fault(kind=kind, request=ask.number, seconds=seconds, after=after, role=_role(rng)))
        # Often several at once: one that hits what mends another.
        for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
            kind = _pick(rng, _LEG_KINDS)
            # Prefill's word comes within the time that decode's first tokens are held for it.
            most = {FaultKind.ANSWERS_LATE: 0.8, FaultKind.SEND_LATE: 2.0, FaultKind.LATE: 3.0}.get(kind, 1.5)
            attempt = rng.choice((1, 1, 1, 1, 2, 2, 3, 4))
            faults.append(
                Fault(
                    kind=kind,
                    request=ask.number,
                    attempt=attempt,
                    role=_role(rng),
                    seconds=most * rng.random() ** 2,
                )
            )
    return faults


def _role(rng: random.Random) -> Role:
    return Role.PREFILL if rng.random() < 0.5 else Role.DECODE
