"""The guard: a small process between an engine and whoever owns it.

It makes three promises that the owner cannot make alone:

- the engine dies with its owner, even when the owner is killed with SIGKILL (the guard reads end-of-file on the
  socket that the owner holds);
- nothing of the engine's process tree outlives it (the guard is the tree's subreaper, so orphans come to it);
- the engine dies with the guard (parent-death signal), and its own children with it (SGLang's parent-death signals).

Protocol on the socket, JSON lines. Guard → owner: `{"pid": …}` when the engine runs, `{"status": …}` (a `waitpid`
status) when it and all its descendants are gone. Owner → guard: `{"stop": seconds}`: SIGTERM, then SIGKILL after that
many seconds. End-of-file: SIGKILL at once.

Only the standard library is imported: it runs as `python -S guard.py`, or forked from the nursery.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
KILL_DEADLINE_S = 10.0
"""How long to wait for killed processes to vanish; one that stays longer is stuck in the kernel."""

libc = ctypes.CDLL(None, use_errno=True)
"""The C library, for the system calls that Python has no name for."""


def _prctl(option: int, value: int) -> None:
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option})")


def descendants(pid: int) -> list[int]:
    """PIDs of all processes below `pid`, read from /proc; a process that vanishes meanwhile is left out."""
    found: list[int] = []
    pending = [pid]
    while pending:
        parent = pending.pop()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for task in os.listdir(f"/proc/{parent}/task"):
                with (
                    contextlib.suppress(FileNotFoundError, ProcessLookupError),
                    open(f"/proc/{parent}/task/{task}/children") as file,
                ):
                    children = [int(word) for word in file.read().split()]
                    found += children
                    pending += children
    return found


def _kill_all() -> None:
    """SIGKILL and reap every descendant of this process."""
    deadline = time.monotonic() + KILL_DEADLINE_S
    while time.monotonic() < deadline:
        for pid in descendants(os.getpid()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            # Orphans arrive as parents die, so this goes on until there is no child at all.
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        select.select([], [], [], 0.005)


def run_guarded(owner: socket.socket, engine: Callable[[], None], scratch: str = "") -> None:
    """Fork `engine`, guard it, and return when nothing of it is left.

    Args:
        owner: connected stream socket; see the module's protocol.
        engine: runs in the child as the leader of its own session; the child exits when it returns.
        scratch: folder of the engine's temporary files, made here and removed at the end; empty = none.
    """
    if scratch:
        os.makedirs(scratch, mode=0o700, exist_ok=True)
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    guard = os.getpid()
    pid = os.fork()
    if pid == 0:
        owner.close()
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != guard:
            os._exit(1)
        engine()
        os._exit(0)
    exited = os.pidfd_open(pid)
    _tell(owner, {"pid": pid})
    poll = select.poll()
    poll.register(owner, select.POLLIN)
    poll.register(exited, select.POLLIN)
    kill_at: float | None = None
    while True:
        patience = None if kill_at is None else max(0.0, kill_at - time.monotonic()) * 1000
        ready = {fd for fd, _ in poll.poll(patience)}
        if exited in ready:
            break
        if owner.fileno() in ready:
            message = _read(owner)
            if message is None:
                break
            kill_at = time.monotonic() + float(message)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGTERM)
        if kill_at is not None and time.monotonic() >= kill_at:
            break
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(exited, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    _kill_all()
    if scratch:
        shutil.rmtree(scratch, ignore_errors=True)
    _tell(owner, {"status": status})


def _tell(owner: socket.socket, message: dict[str, int]) -> None:
    with contextlib.suppress(OSError):  # the owner may be gone; the engine's end is what matters
        owner.sendall(json.dumps(message).encode() + b"\n")


def _read(owner: socket.socket) -> float | None:
    """Seconds of grace asked for by the owner; None when it is gone."""
    try:
        data = owner.recv(4096)
    except ConnectionError:
        return None
    return float(json.loads(data.split(b"\n")[0])["stop"]) if data else None


def redirect(log: str) -> None:
    """Append this process's output to `log`, and read nothing."""
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(null)
    os.close(out)


def main() -> None:
    """`guard.py FD LOG SCRATCH COMMAND…`: guard a command; its owner holds the other end of socket FD."""
    owner = socket.socket(fileno=int(sys.argv[1]))
    log, scratch, command = sys.argv[2], sys.argv[3], sys.argv[4:]

    def engine() -> None:
        redirect(log)
        try:
            os.execvp(command[0], command)
        except OSError as error:
            os.write(2, f"tandem: cannot run {command[0]}: {error}\n".encode())
            os._exit(127)

    os.set_inheritable(owner.fileno(), False)
    run_guarded(owner, engine, scratch)


if __name__ == "__main__":
    main()
