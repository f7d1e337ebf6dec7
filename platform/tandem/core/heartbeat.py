"""When an engine's process hangs: what it wrote about its progress goes in, a verdict comes out.

Time is the watcher's own, and only what it was awake for counts: a machine that stood still as a whole (a paused
container, a starved laptop) does not make its engines look dead. A process that waits for work is never hung; one that
waits for other ranks may be. While one of an engine's processes stands still for something that may take minutes (a
compiler that it has started is busy, weights are loaded), the others may be waiting for it, so all have minutes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import IntEnum
from typing import NamedTuple

import msgspec

LONGEST_STEP_S = 2.0
"""The most that counts between two looks, in seconds; twice what the watcher sleeps."""

HANG_S: Mapping[str, float] = {"cpu": 10.0, "cuda": 60.0}
"""Usual `Limits.hang_s`, in seconds, by device. On GPUs a kernel may be compiled, within the process itself (NVRTC,
Triton), whenever a batch of a new shape comes: that takes seconds, and of another machine's compilers nothing shows."""

_BUSY = 0.1
"""Share of one core that what a process has started must use to count as a compiler at work."""


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
    helpers_s: float | None = None
    """CPU time of all that it has started (compilers, say; not other processes that write), in seconds: of the living,
    and of the dead that were waited for. None = nobody looked."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How long a process may show no progress, in seconds."""

    hang_s: float = 10.0
    blocked_s: float = 6.0
    """The same while it uses no CPU time. Longer than the 5 s for which SGLang 0.5.23 lets a scheduler, and so its
    whole group, wait for the bootstrap server of a prefill group (`disaggregation/common/conn.py`)."""
    patient_s: float = 1800.0
    """The same while it, or another process of the engine that also stands still, does what takes minutes."""
    mute_s: float = 30.0
    """How long a process that has to write may have written nothing at all, counted from when the engine is ready."""

    @classmethod
    def within(cls, hang_s: float | None, device: str) -> Limits:
        """The usual proportions; `hang_s`: None = the usual one of the device."""
        chosen = HANG_S[device] if hang_s is None else hang_s
        return cls(hang_s=chosen, blocked_s=0.6 * chosen)


class _Quiet:
    """How long a process has been without progress."""

    def __init__(self, seen: Seen) -> None:
        self.last = seen
        self.total_s = 0.0
        self.plain_s = 0.0
        """The same, since there was last a reason for patience."""
        self.idle_cpu_s = 0.0
        self.slow = False
        """It stands still, for something that may take minutes."""

    def look(self, seen: Seen, step_s: float) -> None:
        last, self.last = self.last, seen
        if seen.beat.moves != last.beat.moves or seen.beat.doing is Doing.WAITING:
            self.total_s = self.plain_s = self.idle_cpu_s = 0.0
            self.slow = False
            return
        used_s = _used(last.helpers_s, seen.helpers_s)
        self.total_s += step_s
        self.plain_s += step_s
        self.idle_cpu_s = self.idle_cpu_s + step_s if seen.cpu == last.cpu and not used_s else 0.0
        self.slow = seen.beat.patient or used_s > _BUSY * step_s


class ProgressWatch:
    """Remembers what it saw, look by look."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._quiet: dict[int, _Quiet] = {}
        self._mute_s: dict[int, float] = {}
        self._last: float | None = None

    def look(self, now: float, seen: Mapping[int, Seen], expected: Collection[int] = ()) -> str:
        """How the engine hangs, in one sentence without a subject; empty = it does not.

        Args:
            now: seconds of any clock that only grows.
            seen: all processes that write, by PID. One that is not there any more is somebody else's matter.
            expected: PIDs of processes that are there and have to write.
        """
        step_s = 0.0 if self._last is None else max(0.0, min(now - self._last, LONGEST_STEP_S))
        self._last = now
        self._quiet = {pid: self._quiet.get(pid) or _Quiet(one) for pid, one in seen.items()}
        for pid, one in seen.items():
            self._quiet[pid].look(one, step_s)
        if any(quiet.slow for quiet in self._quiet.values()):
            for quiet in self._quiet.values():
                quiet.plain_s = 0.0
        hung = [(quiet.total_s, pid) for pid, quiet in self._quiet.items() if self._hangs(quiet)]
        if not hung:
            return self._mute(step_s, [pid for pid in expected if pid not in seen])
        # The one that stood still first, for the others may only be waiting for it.
        pid = max(hung)[1]
        quiet, beat = self._quiet[pid], seen[pid].beat
        how = "blocked " if quiet.idle_cpu_s >= quiet.total_s / 2 else ""
        return f"hangs: its {beat.who} has made no progress for {quiet.total_s:.0f} s ({how}{WHERE[beat.doing]})"

    def _hangs(self, quiet: _Quiet) -> bool:
        limits = self._limits
        return (
            quiet.total_s >= limits.patient_s
            or quiet.plain_s >= limits.hang_s
            or min(quiet.plain_s, quiet.idle_cpu_s) >= limits.blocked_s
        )

    def _mute(self, step_s: float, pids: Collection[int]) -> str:
        self._mute_s = {pid: self._mute_s.get(pid, 0.0) + step_s for pid in pids}
        pid = max(self._mute_s, key=self._mute_s.__getitem__, default=None)
        if pid is None or self._mute_s[pid] < self._limits.mute_s:
            return ""
        return (
            f"is not watched: its scheduler process {pid} has shown no progress at all for {self._mute_s[pid]:.0f} s; "
            "it hangs before its first turn, or could not write its heartbeat file"
        )


def _used(before_s: float | None, after_s: float | None) -> float:
    """CPU seconds used between two looks. A helper that died unseen takes its own along, hence no less than 0."""
    return 0.0 if before_s is None or after_s is None else max(0.0, after_s - before_s)
