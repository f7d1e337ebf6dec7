"""Processes of the benchmark: started so that they die with it, stopped by their own ids, and read from `/proc`."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import msgspec

_PR_SET_PDEATHSIG = 1
_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_libc = ctypes.CDLL(None, use_errno=True)


class BenchError(RuntimeError):
    """The benchmark cannot go on; the message says why."""


def _die_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Process:
    """One process of ours. Its standard input stays open as long as it is wanted; the log is kept for a failure."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        lines: bool = False,
        grace_s: float = 1.5,
    ) -> None:
        """`lines`: its standard output is read with `line`; else it goes to the log as well. `grace_s`: see `stop`."""
        self.name = name
        self._grace_s = grace_s
        self._log_path = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if lines else file,
                stderr=file,
                env={**os.environ, **(env or {})},
                preexec_fn=_die_with_parent,
            )
        self.pid = self._process.pid

    def line(self, within: float) -> bytes:
        """The next line that it prints."""
        out: IO[bytes] | None = self._process.stdout
        assert out is not None, "started with lines=True"
        ready, _, _ = select.select([out], [], [], within)
        line = out.readline() if ready else b""
        if not line:
            raise self.failure(f"said nothing within {within:g} s")
        return line

    def feed(self, data: bytes) -> None:
        """All of its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.close()

    def tell(self, line: bytes) -> None:
        """One line of its standard input, which stays open."""
        assert self._process.stdin is not None
        self._process.stdin.write(line + b"\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self, within: float) -> int:
        try:
            return self._process.wait(within)
        except subprocess.TimeoutExpired:
            raise self.failure(f"did not end within {within:g} s") from None

    def check(self) -> None:
        """Raises BenchError when it has ended."""
        if self._process.poll() is not None:
            raise self.failure(f"ended with {self._process.returncode}")

    def failure(self, what: str) -> BenchError:
        tail = self._log_path.read_text(errors="replace")[-2000:].strip()
        return BenchError(f"{self.name} {what}; its log ends:\n{tail}")

    def stop(self) -> None:
        """Close its input, then ask it, then kill it, each time after its grace. Idempotent."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        for act in (lambda: None, self._process.terminate, self._process.kill):
            act()
            try:
                self._process.wait(self._grace_s)
                return
            except subprocess.TimeoutExpired:
                continue


def free_port() -> int:
    """A port that was free just now; for programs that cannot take any."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for(url: str, process: Process, within: float) -> None:
    """Until a GET is answered with 200."""
    host, _, path = url.removeprefix("http://").partition("/")
    name, _, port = host.partition(":")
    end = time.monotonic() + within
    while time.monotonic() < end:
        process.check()
        try:
            with socket.create_connection((name, int(port)), 1) as connection:
                connection.settimeout(2)
                connection.sendall(f"GET /{path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n".encode())
                if b" 200 " in connection.recv(64):
                    return
        except OSError:
            pass
        time.sleep(0.1)
    raise process.failure(f"did not answer {url} with 200 within {within:g} s")


class Spent(msgspec.Struct, frozen=True):
    """CPU seconds so far."""

    user: float
    system: float

    @property
    def total(self) -> float:
        return self.user + self.system

    def since(self, before: Spent) -> Spent:
        return Spent(self.user - before.user, self.system - before.system)


def cpu(pids: Sequence[int]) -> Spent:
    """What these processes have spent, ended threads included."""
    user = system = 0.0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        user += int(fields[11]) / _TICK
        system += int(fields[12]) / _TICK
    return Spent(user, system)


def resident(pids: Sequence[int]) -> float:
    """Resident memory in MiB."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * _PAGE / 2**20


def machine() -> tuple[float, float]:
    """(busy, all) CPU seconds of the whole machine since it started."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]
    return (sum(fields) - idle) / _TICK, sum(fields) / _TICK


def descendants(pid: int) -> list[int]:
    """The process and all that came from it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
    return found
