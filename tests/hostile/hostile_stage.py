"""A gateway and its stand-in workers, each in a process of its own, and what can be seen of them from outside."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from bench.gateway.processes import Process

HERE = Path(__file__).parent
MODEL = "tiny"
SCALE = float(os.environ.get("TANDEM_HOSTILE_SECONDS", "20")) / 20
"""The tests are made for about 20 s of fuzzing; `TANDEM_HOSTILE_SECONDS=600` looks thirty times as long."""

_FAULTS = ("Traceback", "ERROR", "CRITICAL", "Exception", "never awaited", "Task was destroyed")
"""What the log of a gateway that nothing is wrong with does not have."""
_LOADS = {"rooms", "tokens"}
_FAULTY = ("unlike", "reused")
"""Totals of the workers that never fall, and that nothing right adds to."""


def examples(number: int) -> int:
    """How many examples to try, where a short run tries `number`."""
    return max(1, int(number * SCALE))


_NOT_TEXT = re.compile(
    r"ERROR:grpc\._cython\.cygrpc:Invalid encoding on .*\nTraceback .*\n(?:  .*\n)*UnicodeDecodeError: .*\n"
)
"""So grpcio tells of a method's name or a header that is no text, and goes on."""


class Stage:
    """The processes; `quiet` says that nothing of what was asked is left, `check` that nothing went wrong."""

    def __init__(self, gateway: Process, workers: Process, log: Path, urls: dict[str, list[str]]) -> None:
        told = json.loads(gateway.line(30))
        self.url: str = told["url"]
        self.grpc: str = told["grpc"]
        self.address = _address(self.url)
        self.grpc_address = _address(f"http://{self.grpc}")
        self.process = psutil.Process(gateway.pid)
        self._gateway = gateway
        self._workers = workers
        self._worker = _address(urls["prefill"][0])
        self._log = log
        self._read = 0
        self._before: dict[str, int] = dict.fromkeys(_FAULTY, 0)

    def begin(self) -> None:
        """A test begins: what was wrong before it is not its fault."""
        self.faults()
        totals = self.totals()
        self._before = {name: totals[name] for name in _FAULTY}

    def ask(self, method: str, path: str, body: bytes | None = None, within: float = 10.0) -> tuple[int, bytes]:
        """(status, body) of one request on a connection of its own. The deadline is for each wait."""
        return ask(self.address, method, path, body, within)

    def complete(self, **fields: Any) -> tuple[int, bytes]:
        """A short completion."""
        body = {"model": MODEL, "prompt": "hi", "max_tokens": 4, **fields}
        return self.ask("POST", "/v1/completions", json.dumps(body).encode())

    def totals(self) -> dict[str, int]:
        """What the workers saw."""
        found: dict[str, int] = json.loads(ask(self._worker, "GET", "/standin/totals", None, 10)[1])
        return found

    def left(self) -> dict[str, Any]:
        """What is still open, by name; empty when nothing is."""
        fleet = json.loads(self.ask("GET", "/fleet")[1])["gateway"]
        totals = self.totals()
        found = {name: fleet[name] for name in ("open_requests", "open_rooms")}
        found |= {name: totals[name] for name in ("running", "waiting")}
        found |= {name: totals[name] - before for name, before in self._before.items()}
        for load in fleet["loads"]:
            found |= {f"{load['group']} {name}": load[name] for name in _LOADS}
        return {name: value for name, value in found.items() if value}

    def quiet(self, within: float = 10.0) -> None:
        """Wait until no request, room, leg or load is left, here or in a worker."""
        end = time.monotonic() + within
        while left := self.left():
            assert time.monotonic() < end, f"after {within:g} s there still was {left}"
            time.sleep(0.05)

    def check(self) -> None:
        """It lives, answers, has nothing left over, and its log tells of no fault since the last look."""
        self._gateway.check()
        self._workers.check()
        assert self.complete()[0] == 200
        self.quiet()
        assert not (faults := self.faults()), "\n".join(faults[:40])

    def faults(self) -> list[str]:
        """New lines of the log, from the first that tells of a fault."""
        with self._log.open("rb") as file:
            file.seek(self._read)
            news = file.read()
        self._read += len(news)
        lines = _NOT_TEXT.sub("", news.decode(errors="replace")).splitlines()
        first = next((n for n, line in enumerate(lines) if any(word in line for word in _FAULTS)), None)
        return [] if first is None else lines[max(0, first - 2) :]

    def memory(self) -> float:
        """Resident MiB."""
        return float(self.process.memory_info().rss) / 2**20

    def files(self) -> int:
        """Open file descriptors."""
        return int(self.process.num_fds())


def ask(address: tuple[str, int], method: str, path: str, body: bytes | None, within: float) -> tuple[int, bytes]:
    """(status, body) of one request on a connection of its own."""
    connection = http.client.HTTPConnection(*address, timeout=within)
    try:
        connection.request(method, path, body, {"content-type": "application/json"} if body is not None else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


@contextlib.contextmanager
def stage(folder: Path, *workers: str) -> Iterator[Stage]:
    """A running gateway; `workers` are arguments of its stand-ins."""
    path = [str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {"PYTHONPATH": os.pathsep.join(path)}
    with contextlib.ExitStack() as stack:
        standins = Process(
            "the stand-ins", [sys.executable, "-m", "hostile_standin", *workers],
            log=folder / "standins.log", env=env, lines=True,
        )  # fmt: skip
        stack.callback(standins.stop)
        urls = json.loads(standins.line(30))
        gateway = Process(
            "the gateway",
            [sys.executable, "-m", "hostile_gateway", "--folder", str(folder), "--urls", json.dumps(urls)],
            log=folder / "gateway.log", env=env, lines=True,
        )  # fmt: skip
        stack.callback(gateway.stop)
        yield Stage(gateway, standins, folder / "gateway.log", urls)


def _address(url: str) -> tuple[str, int]:
    host, _, port = url.partition("://")[2].rpartition(":")
    return host, int(port)
