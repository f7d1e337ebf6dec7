"""Machines for `tandem node`: network namespaces that know the head by a name, as pods do. Needs root."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from tandem.fleet.control_client import ControlClient, ControlError

HEAD = "head.test"
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
"""Two files of tests may run at a time, each with machines of its own."""
NETWORK, BRIDGE = f"10.213.{11 + _WORKER}", f"tdnbr{_WORKER}"
HERE = Path(__file__).parent


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True, timeout=10)


def address(number: int) -> str:
    """Of machine `number`, from 1."""
    return f"{NETWORK}.{number}"


def _machine(number: int) -> str:
    """What its network namespace is called."""
    return f"tandem-node-{_WORKER}-{number}"


class World:
    """The machines, and what runs on them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.folder = Path(tempfile.mkdtemp(prefix="tandem-"))
        self.running: list[subprocess.Popen[bytes]] = []
        self._alone: list[subprocess.Popen[bytes]] = []
        for number in range(1, count + 1):
            self._etc(number).mkdir(parents=True, exist_ok=True)
        self.place_head(None)

    @staticmethod
    def _etc(number: int) -> Path:
        """`ip netns exec` shows what is in here in place of the files in /etc."""
        return Path("/etc/netns") / _machine(number)

    def place_head(self, number: int | None) -> None:
        """Say on all machines which one is the head; written in place, as a kubelet does it."""
        for each in range(1, self.count + 1):
            known = f"{address(number)} {HEAD}\n" if number else ""
            (self._etc(each) / "hosts").write_text(f"127.0.0.1 localhost\n{known}")

    def start(self, number: int, *command: str, log: str, alone: bool = False, **env: str) -> subprocess.Popen[bytes]:
        """Run a command on a machine. `alone`: it sees no processes but its own, and all of these die with it."""
        apart = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc") if alone else ()
        with open(self.folder / log, "ab") as output:
            process = subprocess.Popen(
                [*apart, "ip", "netns", "exec", _machine(number), *command],
                env={**os.environ, **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.running.append(process)
        if alone:
            self._alone.append(process)
        return process

    def head(self, number: int, config: Path, **env: str) -> subprocess.Popen[bytes]:
        """The head, with the scripted engine."""
        run, data = self.folder / "run", self.folder / "data"
        script = (sys.executable, str(HERE / "script_head.py"), str(config), address(number), str(data), str(run))
        return self.start(number, *script, log="head.log", **env)

    def join(self, number: int, *what: str, **env: str) -> subprocess.Popen[bytes]:
        """A node for a group or a gateway."""
        known = {
            "TANDEM_HOST": address(number),
            "TANDEM_GCS": f"{HEAD}:6380",
            "TANDEM_RUN_FOLDER": str(self.folder / "run"),
            "TANDEM_POD_NAME": f"pod-{number}",
            "TANDEM_NODE_NAME": f"machine-{number}",
        }
        return self.start(number, *TANDEM, "node", "join", *what, log=f"join-{number}.log", **{**known, **env})

    def close(self) -> None:
        for process in reversed(self.running):
            process.send_signal(signal.SIGKILL if process in self._alone else signal.SIGTERM)
        for process in self.running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
            process.kill()
            process.wait(10)
        left = [process for number in range(1, self.count + 1) for process in _on_machine(number)]
        for process in left:  # Ray's agents outlive a raylet that is killed
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=10)
        for number in range(1, self.count + 1):
            shutil.rmtree(self._etc(number), ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def _on_machine(number: int) -> Iterator[psutil.Process]:
    found = subprocess.run(["ip", "netns", "pids", _machine(number)], capture_output=True, text=True, timeout=10)
    for pid in found.stdout.split():
        with contextlib.suppress(psutil.NoSuchProcess):
            yield psutil.Process(int(pid))


TANDEM = (sys.executable, "-c", "from tandem.cli.main import app; app()")


@contextlib.contextmanager
def world(count: int) -> Iterator[World]:
    """`count` machines on one bridge that this process is on too."""
    _remove(count)
    made = World(count)
    try:
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for number in range(1, count + 1):
            name, link = _machine(number), f"tdn{_WORKER}-{number}"
            _ip("netns", "add", name)
            _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("link", "set", link, "master", BRIDGE, "up")
            _ip("-n", name, "addr", "add", f"{address(number)}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield made
    finally:
        made.close()
        _remove(count)


def _remove(count: int) -> None:
    for number in range(1, count + 1):
        _ip("netns", "del", _machine(number), check=False)
    _ip("link", "del", BRIDGE, check=False)


def ask(url: str) -> tuple[int, str]:
    """Status and body; 0 while nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=3) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


@contextlib.asynccontextmanager
async def control(target: str, within: float) -> AsyncIterator[ControlClient]:
    """The control service at host:port, as soon as it answers."""
    async with asyncio.timeout(within):
        while True:
            client = ControlClient(target, deadline=5)
            try:
                await client.fleet()
                break
            except ControlError:
                await client.close()
                await asyncio.sleep(0.2)
    try:
        yield client
    finally:
        await client.close()


def until(holds: Callable[[], Any], within: float = 30.0, *, what: str = "") -> Any:
    """The first true value; asks ten times a second."""
    ends = time.monotonic() + within
    while not (value := holds()):
        assert time.monotonic() < ends, f"{what or 'it'} did not come within {within:.0f} s"
        time.sleep(0.1)
    return value
