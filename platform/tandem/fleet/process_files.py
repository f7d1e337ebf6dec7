"""What the kernel tells about an engine's processes (proc(5)).

Each function raises OSError if the kernel cannot be asked, for want of file handles, say: that does not mean that the
process has gone.
"""

from __future__ import annotations

import os
from pathlib import Path

PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_WORKER = b"sglang::"
"""How the titles begin of the processes that SGLang cannot do without (scheduler, detokenizer, DP controller)."""
_PARENT, _UTIME, _STIME, _CUTIME, _CSTIME = 1, 11, 12, 13, 14
"""Where in `_stat`."""


def worker_title(pid: int) -> bytes:
    """The title of one of SGLang's own processes; empty for any other.

    What such a process has forked bears its title too, until it begins a program: that is another.
    """
    title = _title(pid)
    columns = _stat(pid)
    if not columns or not title.startswith(_WORKER) or title == _title(int(columns[_PARENT])):
        return b""
    return title


def state(pid: int) -> str:
    """The kernel's one-letter state of a process; empty if it is not there."""
    columns = _stat(pid)
    return columns[0].decode() if columns else ""


def cpu_ticks(pid: int) -> int | None:
    """CPU time that all threads of a process have used; None if it is not there."""
    columns = _stat(pid)
    return int(columns[_UTIME]) + int(columns[_STIME]) if columns else None


def helpers_s(pid: int) -> float:
    """CPU seconds of all that a process has started, dead or alive, without SGLang's own processes and theirs."""
    return _helper_ticks(pid) / _TICKS_PER_S


def _helper_ticks(pid: int) -> int:
    columns = _stat(pid)
    ticks = int(columns[_CUTIME]) + int(columns[_CSTIME]) if columns else 0
    for child in _children(pid):
        if not worker_title(child):
            ticks += (cpu_ticks(child) or 0) + _helper_ticks(child)
    return ticks


def _children(pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in os.listdir(PROC / f"{pid}/task"):
            found += [int(word) for word in _read(PROC / f"{pid}/task/{task}/children").split()]
    except (FileNotFoundError, ProcessLookupError):
        pass  # it has gone meanwhile, and its children are not its any more
    return found


def _title(pid: int) -> bytes:
    return _read(PROC / f"{pid}/cmdline")


def _stat(pid: int) -> list[bytes]:
    """What follows a process's name in `/proc/<pid>/stat`, from its state on; empty if it is not there."""
    return _read(PROC / f"{pid}/stat").rpartition(b")")[2].split()


def _read(path: Path) -> bytes:
    """Empty if the process or thread is not there."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
