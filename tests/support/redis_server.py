"""A real Redis server of a test's own: on a unix socket, in memory, gone with the test run."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path


class RedisServer:
    """`setpriv --pdeathsig` lets the server die with the test run, also when that is killed."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tandem-redis-"))
        self._socket = self._folder / "redis.sock"
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    def start(self) -> None:
        """Return when the server accepts connections."""
        options = ["--port", "0", "--unixsocket", str(self._socket), "--save", "", "--dir", str(self._folder)]
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "redis-server", *options], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "ready to accept connections" in line.lower():
                threading.Thread(target=self._process.stdout.read, daemon=True).start()  # never blocks on its log
                return
        raise RuntimeError(f"redis-server ended with {self._process.wait(5)} instead of starting")

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Let it hang for a while, connections open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Kill it as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._socket.unlink(missing_ok=True)
            self._process = None

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)


class Silence:
    """A TCP port that takes connections and never says a word."""

    def __enter__(self) -> int:
        self._listener = socket.create_server(("127.0.0.1", 0))
        return int(self._listener.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self._listener.close()
