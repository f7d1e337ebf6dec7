"""A fleet of real engines for tests: started as `tandem up` starts it, looked at from outside."""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from tandem.bench.client import stream
from tandem.cli.status import full_status
from tandem.cli.up import start_host
from tandem.config import ControlConfig, FleetConfig, GatewayConfig, ModelConfig
from tandem.engine.http1 import Pool
from tandem.fleet.counters import Counters, total
from tandem.fleet.progress import Failed, Message, Ready, read_message
from tandem.fleet.run_folder import RunFolder, processes_of

START_S = 150.0


def ephemeral(name: str, model: Path) -> FleetConfig:
    """The default fleet on free ports."""
    return FleetConfig(
        name=name,
        model=ModelConfig(path=model),
        gateway=GatewayConfig(port=0, grpc_port=0),
        control=ControlConfig(port=0),
    )


class Fleet:
    """A running fleet and the process that hosts it."""

    def __init__(self, config: FleetConfig) -> None:
        self.config = config
        self.folder = RunFolder(config.name)
        self.host: subprocess.Popen[bytes] = start_host(config)
        self._messages: queue.Queue[Message | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.ready = self._await_ready()
        self.base = self.ready.http
        record = self.folder.record()
        assert record is not None
        self.record = record

    def _listen(self) -> None:
        assert self.host.stdout is not None
        for line in self.host.stdout:
            self._messages.put(read_message(line))
        self._messages.put(None)

    def _await_ready(self) -> Ready:
        deadline = time.monotonic() + START_S
        try:
            while (message := self._messages.get(timeout=max(0.1, deadline - time.monotonic()))) is not None:
                if isinstance(message, Ready):
                    return message
                if isinstance(message, Failed):
                    raise AssertionError(f"the fleet did not start: {message.why}")
        except queue.Empty:
            self.stop()
            raise AssertionError(f"the fleet was not ready after {START_S} s; logs: {self.folder.logs}") from None
        raise AssertionError(f"the host ended with code {self.host.wait()}; log: {self.folder.logs / 'host.log'}")

    def status(self) -> dict[str, Any]:
        """What `tandem status --json` prints."""
        return asyncio.run(full_status(self.config.name))

    def group(self, name: str) -> dict[str, Any]:
        """One group of the status."""
        return next(group for group in self.status()["groups"] if group["group"] == name)

    def counted(self, group: str, name: str, **labels: str) -> float:
        """Sum of an engine counter over the ranks of a group."""
        return sum(total(counters, name, **labels) for counters in self.counters(group))

    def counters(self, group: str) -> list[Counters]:
        """The counters of each rank of a group."""
        status = self.status()
        ranks = next(one for one in status["groups"] if one["group"] == group)["ranks"]
        return [status["counters"][rank["metrics"]] for rank in ranks]

    def complete(self, prompt: Sequence[int], tokens: int, **extra: Any) -> list[int]:
        """Token ids of one greedy stream."""
        return self.complete_all([prompt], tokens, **extra)[0]

    def complete_all(self, prompts: Sequence[Sequence[int]], tokens: int, **extra: Any) -> list[list[int]]:
        """Token ids of greedy streams that run all at once."""

        async def one(pool: Pool, prompt: Sequence[int]) -> list[int]:
            body = {
                "model": self.status_model,
                "prompt": list(prompt),
                "max_tokens": tokens,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
                **extra,
            }
            ids: list[int] = []
            async for piece in stream(pool, self.base, "/v1/completions", body, within=60):
                ids += piece.token_ids
            return ids

        async def every() -> list[list[int]]:
            pool = Pool()
            try:
                return await asyncio.gather(*(one(pool, prompt) for prompt in prompts))
            finally:
                await pool.close()

        return asyncio.run(every())

    @property
    def status_model(self) -> str:
        """The model's name in the API."""
        return self.config.model.name or (self.config.model.path or Path("tiny")).name

    def processes(self) -> list[psutil.Process]:
        """Every process of the run, the host included."""
        host = [psutil.Process(self.host.pid)] if self.host.poll() is None else []
        return host + processes_of(self.record.run)

    def listening(self) -> set[int]:
        """TCP ports on which a process of the run listens."""
        ports = set()
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                ports |= {
                    connection.laddr.port
                    for connection in process.net_connections("tcp")
                    if connection.status == psutil.CONN_LISTEN
                }
        return ports

    def until(self, what: str, true: Callable[[], bool], within: float) -> None:
        """Look until `true`; the fleet has no event for a test process to wait on."""
        deadline = time.monotonic() + within
        while not true():
            assert time.monotonic() < deadline, f"not within {within} s: {what}"
            time.sleep(0.1)

    def stop(self) -> int:
        """Stop as Ctrl-C does; return the host's exit code."""
        if self.host.poll() is None:
            self.host.send_signal(signal.SIGTERM)
            try:
                self.host.wait(60)
            except subprocess.TimeoutExpired:
                self.host.kill()
        code = self.host.wait()
        with self.folder.hold():
            self.folder.clear()
        return code


def shared_memory() -> set[str]:
    """Names in /dev/shm."""
    return set(os.listdir("/dev/shm"))


def temporary_files() -> set[str]:
    """Names in the folder of temporary files, other than pytest's own."""
    return {name for name in os.listdir(tempfile.gettempdir()) if name.startswith(("sglang", "tandem", "tmp", "ray"))}


@contextlib.contextmanager
def running(config: FleetConfig) -> Iterator[Fleet]:
    """A fleet for the length of a `with` block."""
    fleet = Fleet(config)
    try:
        yield fleet
    finally:
        fleet.stop()
