"""What a rank's actor can tell about its engine from outside: its processes, their progress, its log, its counters."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Protocol

from tandem.core.heartbeat import Beat, Doing, Limits, ProgressWatch, Seen
from tandem.engine.heartbeat import read_beats
from tandem.fleet import process_files

_SCHEDULER = b"sglang::scheduler"
"""How the titles of those begin that have to show their progress."""
_BLIND_LOOKS = 5
"""Looks in a row that must fail until an engine counts as unwatched; one may, for want of a file handle."""
_TAIL_LINES, _LINE_CHARS, _TAIL_BYTES = 2, 160, 8192

_log = logging.getLogger(__name__)


class Tree(Protocol):
    """Of processes, as `EngineProcess` has it."""

    def tree(self) -> list[int]:
        """PIDs, the main process first."""


class EngineWatch:
    """Everything that is looked at from when an engine is ready: every second, and when one of its processes ends."""

    def __init__(self, engine: Tree, folder: Path, limits: Limits) -> None:
        """`folder`: where the engine's processes write their progress. Nothing is read before the first look."""
        self._engine = engine
        self._processes: HealthCheck | None = None
        self._progress = ProgressCheck(folder, limits)
        self._blind = 0

    def ailment(self, now: float) -> str:
        """What is wrong at `now` (seconds), in one sentence without a subject; empty = nothing."""
        try:
            if self._processes is None:
                self._processes = HealthCheck(self._engine)
            found = self._processes.ailment() or self._progress.ailment(now, self._processes.schedulers)
        except OSError as error:
            self._blind += 1
            if self._blind < _BLIND_LOOKS:
                _log.warning("the processes of an engine cannot be looked at just now: %s", error)
                return ""
            return f"is not watched any more: {self._blind} looks at its processes in a row failed: {error}"
        self._blind = 0
        return found

    async def pause(self, seconds: float) -> None:
        """Wait until the next look is due: after `seconds`, or as soon as one of the engine's workers ends."""
        handles: list[int] = []
        for pid in [] if self._processes is None else self._processes.workers:
            # One that has gone meanwhile is found by the next look, as is the end of one that gets no handle.
            with contextlib.suppress(OSError):
                handles.append(os.pidfd_open(pid))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await _any_ended(handles)


class HealthCheck:
    """Looks whether the processes that an engine had when it became ready are still there and run.

    SGLang looks after its own children, but a follower does not see all of them, and none sees one that was stopped.
    """

    def __init__(self, engine: Tree) -> None:
        """Raises OSError."""
        main, *children = engine.tree()
        workers = {pid: title for pid in children if (title := process_files.worker_title(pid))}
        self._pids = [main, *workers]
        self.workers = list(workers)
        """PIDs of all but the main process, of whose end the guard tells."""
        self.schedulers = [pid for pid, title in workers.items() if title.startswith(_SCHEDULER)]
        """PIDs of those that have to show progress."""
        self._stopped: set[int] = set()

    def ailment(self) -> str:
        """What is wrong, in one sentence without a subject; empty = nothing. Raises OSError."""
        stopped = set()
        for pid in self._pids:
            state = process_files.state(pid)
            if state in ("", "Z", "X"):
                return f"lost its process {pid}"
            if state in ("T", "t"):
                stopped.add(pid)
        # A profiler stops a process for a moment, so only one that is found so twice counts.
        ill, self._stopped = stopped & self._stopped, stopped
        return f"hangs: its process {min(ill)} was stopped by a signal or a debugger" if ill else ""


class ProgressCheck:
    """Looks whether an engine's processes get on with their work.

    A scheduler that is stuck in a collective or a kernel is there and was not stopped: only what it writes itself
    tells. SGLang's own watchdog would need minutes, and is set to come last (`engine/launch.py`).
    """

    def __init__(self, folder: Path, limits: Limits) -> None:
        """`folder`: where the engine's processes write."""
        self._folder = folder
        self._watch = ProgressWatch(limits)
        self._moves: dict[int, int] = {}

    def ailment(self, now: float, expected: Collection[int] = ()) -> str:
        """What is wrong at `now` (seconds), in one sentence without a subject; empty = nothing. Raises OSError.

        `expected`: PIDs of the processes that have to write.
        """
        beats = read_beats(self._folder)
        times = {pid: process_files.cpu_ticks(pid) for pid in beats}
        seen = {
            pid: Seen(beat, ticks, self._helpers_s(pid, beat))
            for pid, beat in beats.items()
            if (ticks := times[pid]) is not None
        }
        self._moves = {pid: beat.moves for pid, beat in beats.items()}
        return self._watch.look(now, seen, expected)

    def _helpers_s(self, pid: int, beat: Beat) -> float | None:
        """As in `Seen`; only for a process that stands still, for it takes a file per thread."""
        if beat.doing is Doing.WAITING or self._moves.get(pid) != beat.moves:
            return None
        try:
            return process_files.helpers_s(pid)
        except OSError:  # it can only be a reason for patience
            return None


async def gone(pids: Iterable[int], deadline: float) -> None:
    """Wait until none of these processes is there. Raises TimeoutError after `deadline` seconds."""
    async with asyncio.timeout(deadline):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                await _any_ended([os.pidfd_open(pid)])


def log_tail(path: Path) -> str:
    """The last lines of a log file as one line; empty if there are none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError as error:
        return f"(cannot be read: {error})"
    return " | ".join([line[:_LINE_CHARS] for line in lines if line][-_TAIL_LINES:])


def read_counters(folder: Path) -> dict[str, float]:
    """Tandem's counters in a folder of prometheus_client's multi-process files: `name{label="value"}` → value."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.multiprocess import MultiProcessCollector

    if not folder.is_dir():
        return {}
    found = {}
    for metric in MultiProcessCollector(CollectorRegistry(), path=str(folder)).collect():
        for sample in metric.samples:
            if sample.name.startswith("tandem_"):
                labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
                found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def serve_counters(folder: Path, host: str, port: int) -> Callable[[], None]:
    """Serve `http://host:port/metrics`, an engine's counters for Prometheus, from a thread; return what ends it.

    Raises OSError if the port is taken.
    """
    from prometheus_client import CollectorRegistry, start_http_server
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(folder))
    server, thread = start_http_server(port, addr=host, registry=registry)

    def end() -> None:
        server.shutdown()
        server.server_close()
        thread.join(1)

    return end


async def _any_ended(handles: Collection[int]) -> None:
    """Wait until the process of one of these pidfds has ended, and close them all."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for handle in handles:
        loop.add_reader(handle, ended.set)
    try:
        await ended.wait()
    finally:
        for handle in handles:
            loop.remove_reader(handle)
            os.close(handle)
