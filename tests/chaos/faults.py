"""What can be done to a fleet, as values. Times are in seconds."""

from __future__ import annotations

from typing import Literal

import msgspec

from tandem.core.types import Role

Process = Literal["main", "scheduler", "detokenizer"]
Place = Literal["leader", "follower"]
Signal = Literal["kill", "freeze", "pause"]
Part = Literal["rank actor", "guard", "raylet", "GCS", "nursery", "Serve controller"]
WireHow = Literal["cut", "cut_after", "refuse", "stall", "delay"]


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that goes wrong. `kind` is what measurements are grouped by."""

    @property
    def kind(self) -> str:
        raise NotImplementedError

    @property
    def harms(self) -> bool:
        """Whether something goes wrong by it. What is only asked for is played among the faults, and is none."""
        return True

    @property
    def takes(self) -> frozenset[Role]:
        """Roles of which it takes a group away: all their groups must be ready before, so that a spare is left."""
        return frozenset()

    @property
    def side(self) -> bool:
        """Whether it needs the gateway that stands behind the fault proxies."""
        return False


class HitEngine(Fault, frozen=True, kw_only=True):
    """A signal to one process of one rank. `pause` ends by itself, `freeze` does not."""

    role: Role
    rank: Place = "leader"
    process: Process = "main"
    how: Signal = "kill"
    seconds: float = 0.7
    """Of a pause: too short to be taken for a hang."""

    @property
    def kind(self) -> str:
        return f"{self.how} {self.role} {self.rank} {self.process}"

    @property
    def takes(self) -> frozenset[Role]:
        return frozenset({self.role})


class HitPlatform(Fault, frozen=True, kw_only=True):
    """A signal to a process around the engines. Rank actor, guard and raylet are those of a group of `role`; the others
    are nobody's in particular, and no group may restart for them.
    """

    which: Part
    role: Role | None = None
    how: Literal["kill", "freeze"] = "kill"

    @property
    def kind(self) -> str:
        return f"{self.how} {self.which}" + (f" of {self.role}" if self.role else "")

    @property
    def takes(self) -> frozenset[Role]:
        return frozenset({self.role} if self.role else ())


class HitGateway(Fault, frozen=True, kw_only=True):
    """A signal to the process of one gateway replica. `pause` ends by itself, `freeze` does not."""

    how: Signal = "kill"
    seconds: float = 2.0

    @property
    def kind(self) -> str:
        return f"{self.how} gateway replica"


class HitController(Fault, frozen=True, kw_only=True):
    """A signal to the controller's process. `pause` ends by itself, `freeze` does not."""

    how: Signal = "kill"
    seconds: float = 5.0

    @property
    def kind(self) -> str:
        return f"{self.how} controller"


class HitRedis(Fault, frozen=True, kw_only=True):
    """Redis is away for some seconds: hangs, or dies and comes back with its data or `empty`. Or it is `slow`: stands
    still again and again, each time for so long that a reply is late.
    """

    how: Literal["hang", "kill", "empty", "slow"]
    seconds: float = 3.0

    @property
    def kind(self) -> str:
        return "kill Redis, back empty" if self.how == "empty" else f"{self.how} Redis"


class HitWire(Fault, frozen=True, kw_only=True):
    """Something happens to the connections between a gateway and one group, of which at least one carries a leg.

    `cut`: all are reset now. `cut_after`: each is reset after so many bytes of answers. `refuse`: new ones are reset,
    for some seconds and until a leg was. `stall`: nothing passes, for some seconds. `delay`: all comes later.
    """

    role: Role
    how: WireHow
    seconds: float = 3.0
    bytes: int = 0

    @property
    def kind(self) -> str:
        return f"{self.how.replace('_', ' ')} {self.role} leg"

    @property
    def side(self) -> bool:
        return True


class HitNetwork(Fault, frozen=True, kw_only=True):
    """Between the machine of a prefill group and that of a decode group: all is dropped, or passes slowly."""

    how: Literal["drop", "slow"]
    seconds: float = 5.0
    kbit: int = 64
    """Of `slow`: what passes in a second."""

    @property
    def kind(self) -> str:
        return f"{self.how} KV between machines"


class FillDisk(Fault, frozen=True, kw_only=True):
    """The disk of the engines' logs, or of the usage records, is full for some seconds."""

    what: Literal["logs", "usage"]
    seconds: float = 3.0

    @property
    def kind(self) -> str:
        return f"disk full of {self.what}"

    @property
    def side(self) -> bool:
        return self.what == "usage"


class JumpClock(Fault, frozen=True, kw_only=True):
    """The wall clock of a gateway jumps, and back again after some seconds."""

    by: float
    seconds: float = 3.0

    @property
    def kind(self) -> str:
        return "clock jumps ahead" if self.by > 0 else "clock jumps back"

    @property
    def side(self) -> bool:
        return True


class Drain(Fault, frozen=True, kw_only=True):
    """A group is drained under traffic, with its streams moved, and brought back."""

    role: Role

    @property
    def kind(self) -> str:
        return f"drain {self.role}"

    @property
    def harms(self) -> bool:
        return False

    @property
    def takes(self) -> frozenset[Role]:
        return frozenset({self.role})


class ScaleDown(Fault, frozen=True, kw_only=True):
    """A pool is given one group less under traffic, then as many as before."""

    role: Role

    @property
    def kind(self) -> str:
        return f"scale down {self.role}"

    @property
    def harms(self) -> bool:
        return False

    @property
    def takes(self) -> frozenset[Role]:
        return frozenset({self.role})


class Leave(Fault, frozen=True, kw_only=True):
    """Clients go away in the middle of their streams; the other traffic is held meanwhile."""

    clients: int = 4
    within: float = 5.0
    """Engines must be idle so soon: 1 s is the promise, on a machine that has nothing else to do."""

    @property
    def kind(self) -> str:
        return "clients leave"


class Orphan(Fault, frozen=True, kw_only=True):
    """Every gateway of the fleet is killed, and nobody asks again: what the engines still do is for nobody."""

    streams: int = 4
    tokens: int = 1500
    """That each would have: far more than it gets."""

    @property
    def kind(self) -> str:
        return "all gateways die, clients too"
