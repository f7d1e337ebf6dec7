"""When an engine's process hangs: what it wrote about its progress goes in, a verdict comes out.

Time is the watcher's own, and only what it was awake for counts: a machine that stood still as a whole (a paused
container, a starved laptop) does not make its engines look dead. A process that waits for work is never hung; one that
waits for other ranks may be.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

import msgspec

LONGEST_STEP_S = 2.0
"""The most that counts between two looks, in seconds; twice what the watcher sleeps."""


class Doing(IntEnum):
    """What a process was about when it last wrote."""

    SCHEDULING = 0
    """Between two forward passes: takes requests, makes batches, waits for the group's other ranks."""
    FORWARD = 1
    IDLE = 2
    """Found nothing to do, and comes back by itself within a second."""
    CONTROL = 3
    """Loads weights, flushes caches and the like."""
    WORKING = 4
    """Has been given work."""
    WAITING = 5
    """Waits for work, as long as it takes."""


WHERE: Mapping[Doing, str] = {
    Doing.SCHEDULING: "between two forward passes",
    Doing.FORWARD: "in a forward pass",
    Doing.IDLE: "in its idle loop",
    Doing.CONTROL: "in a control request",
    Doing.WORKING: "in its work",
    Doing.WAITING: "waiting for work",
}


class Beat(msgspec.Struct, frozen=True, kw_only=True):
    """What one process last wrote."""

    who: str
    """For a person, such as "scheduler DP 0"."""
    moves: int
    """Grows with every step of progress."""
    doing: Doing
    patient: bool = False
    """What it does may take minutes: it loads weights, or compiles kernels in its first forward pass."""
    turns: int = 0
    """Turns of its event loop."""
    forwards: int = 0
    """Forward passes that it has begun."""


class Seen(NamedTuple):
    """One process at one look."""

    beat: Beat
    cpu: int
    """CPU time that all its threads have used, in any unit that only grows."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How long a process may show no progress, in seconds."""

    hang_s: float = 10.0
    blocked_s: float = 6.0
    """The same while it uses no CPU time. Longer than the 5 s for which SGLang 0.5.23 lets a scheduler, and so its
    whole group, wait for the bootstrap server of a prefill group (`disaggregation/common/conn.py`)."""
    patient_s: float = 1800.0

    @classmethod
    def within(cls, hang_s: float) -> Limits:
        """The usual proportions."""
        return cls(hang_s=hang_s, blocked_s=0.6 * hang_s)


class _Quiet:
    """How long a process has been without progress."""

    def __init__(self, seen: Seen) -> None:
        self.moves = seen.beat.moves
        self.cpu = seen.cpu
        self.total_s = 0.0
        self.idle_cpu_s = 0.0

    def look(self, seen: Seen, step_s: float) -> None:
        if seen.beat.moves != self.moves or seen.beat.doing is Doing.WAITING:
            self.total_s = self.idle_cpu_s = 0.0
        else:
            self.total_s += step_s
            self.idle_cpu_s = self.idle_cpu_s + step_s if seen.cpu == self.cpu else 0.0
        self.moves, self.cpu = seen.beat.moves, seen.cpu


class ProgressWatch:
    """Remembers what it saw, look by look."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._quiet: dict[int, _Quiet] = {}
        self._last: float | None = None

    def look(self, now: float, seen: Mapping[int, Seen]) -> str:
        """How the engine hangs, in one sentence without a subject; empty = it does not.

        Args:
            now: seconds of any clock that only grows.
            seen: all processes that write, by PID. One that is not there any more is somebody else's matter.
        """
        step_s = 0.0 if self._last is None else max(0.0, min(now - self._last, LONGEST_STEP_S))
        self._last = now
        self._quiet = {pid: self._quiet.get(pid) or _Quiet(one) for pid, one in seen.items()}
        for pid, one in seen.items():
            self._quiet[pid].look(one, step_s)
        hung = [(self._quiet[pid].total_s, pid) for pid, one in seen.items() if self._hangs(one, self._quiet[pid])]
        if not hung:
            return ""
        # The one that stood still first, for the others may only be waiting for it.
        pid = max(hung)[1]
        quiet, beat = self._quiet[pid], seen[pid].beat
        how = "blocked " if quiet.idle_cpu_s >= quiet.total_s / 2 else ""
        return f"hangs: its {beat.who} has made no progress for {quiet.total_s:.0f} s ({how}{WHERE[beat.doing]})"

    def _hangs(self, seen: Seen, quiet: _Quiet) -> bool:
        limits = self._limits
        if seen.beat.patient:
            return quiet.total_s >= limits.patient_s
        return quiet.total_s >= limits.hang_s or quiet.idle_cpu_s >= limits.blocked_s
