"""Sandboxes and containers as processes of this machine, started by `isolate.py`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kube.kubelet import isolate

_START_S = 60.0
"""Until a process of ours must have said that it runs."""


class NotStarted(RuntimeError):
    """A sandbox or a command could not be started; the message says why."""


def _launch(verb: str, order: dict[str, Any], output: int | None) -> tuple[subprocess.Popen[bytes], int]:
    """Start `isolate.py`; return it and the end of the pipe on which it reports."""
    reports, said = os.pipe()
    command = [sys.executable, "-S", "-E", isolate.__file__, verb, str(os.getpid()), str(said)]
    sink = subprocess.DEVNULL if output is None else output
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=sink, stderr=sink, pass_fds=[said], start_new_session=True
        )
    except BaseException:
        os.close(reports)
        raise
    finally:
        os.close(said)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(order).encode())
        process.stdin.close()
    return process, reports


def _reports(descriptor: int) -> list[dict[str, Any]]:
    """All that is said until the other end is closed."""
    with os.fdopen(descriptor, "rb") as pipe:
        return [json.loads(line) for line in pipe]


def _copy(reads: int, log: Path) -> None:
    """Append what comes out of a pipe to a file, until its end."""
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        os.lseek(target, 0, os.SEEK_END)
        while os.splice(reads, target, 1 << 20):
            pass
    finally:
        os.close(reads)
        os.close(target)


class Sandbox:
    """The namespaces of one pod, held by a process. Start it from a thread that lives as long as the pod."""

    def __init__(self, hostname: str, memory: dict[str, int | None], network: int | None = None) -> None:
        """`memory`: folders that become file systems in memory, with their size in bytes. `network`: whose to share.

        Raises NotStarted.
        """
        sizes = [{"path": path, "size": size} for path, size in memory.items()]
        order = {"hostname": hostname, "memory": sizes, "network": network}
        self._process, pipe = _launch("sandbox", order, None)
        said = _reports(pipe)
        if not said or "error" in said[-1]:
            self._process.wait()
            raise NotStarted(said[-1]["error"] if said else "the sandbox ended before it was ready")
        self.pid = self._process.pid

    def end(self) -> None:
        """End it; the namespaces end with the last process in them."""
        self._process.kill()
        self._process.wait()


@dataclass(frozen=True)
class Ended:
    """How a container ended."""

    code: int
    signal: int | None

    @classmethod
    def of(cls, code: int) -> Ended:
        """From a shell's exit code."""
        return cls(code, code - 128 if code > 128 else None)


class ContainerProcess:
    """A container's first process. Start it, and wait for it, from one thread that lives as long as it does."""

    def __init__(self, order: dict[str, Any], log: Path) -> None:
        """Raises NotStarted when its command could not be run."""
        self._done = threading.Event()
        reads, writes = os.pipe()
        try:
            self._outer, pipe = _launch("container", order, writes)
        finally:
            os.close(writes)
        # A pipe, as container runtimes give: a file could be emptied or written over by who opens /dev/stdout.
        self._copier = threading.Thread(target=_copy, args=(reads, log), name="output", daemon=True)
        self._copier.start()
        said = _reports(pipe)
        failed = next((one["error"] for one in said if "error" in one), None)
        if failed is not None or not said:
            self._outer.wait()
            self._copier.join()
            raise NotStarted(failed or "the container ended before it began")
        self.pid = int(said[0]["pid"])
        self._order = order
        try:
            self._handle: int | None = os.pidfd_open(self.pid)
        except ProcessLookupError:
            self._handle = None  # it has run and ended already

    def wait(self) -> Ended:
        """Wait until it has ended."""
        ended = Ended.of(self._outer.wait())
        # Nobody is left who could write: a process namespace ends with its first process.
        self._copier.join()
        self._done.set()
        return ended

    def ended_within(self, seconds: float) -> bool:
        """Wait until it has ended, from any thread; False after `seconds`."""
        return self._done.wait(max(0.0, seconds))

    def send(self, what: signal.Signals) -> None:
        """Send a signal to its first process. As in any container, only SIGKILL has an effect without a handler."""
        if self._handle is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, what)

    def close(self) -> None:
        """Let go of it, once it has ended."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def run(self, argv: list[str], within: float) -> tuple[int | None, str]:
        """Run a command inside: its exit code (None: killed after `within` seconds), and the end of its output."""
        order = {key: self._order[key] for key in ("env", "directory")} | {"argv": argv, "pid": self.pid}
        reads, writes = os.pipe()
        try:
            process, pipe = _launch("exec", order, writes)
        finally:
            os.close(writes)
        os.close(pipe)
        output = bytearray()

        def collect() -> None:
            with os.fdopen(reads, "rb") as stream:
                for line in stream:
                    output.extend(line[:2000])
                    del output[:-4000]

        collector = threading.Thread(target=collect, daemon=True)
        collector.start()
        try:
            code: int | None = process.wait(max(0.0, within))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
        # What it left running in the background may hold the pipe open.
        collector.join(0.5)
        return code, output.decode(errors="replace").strip()
