"""Starts one engine process, tells when it ends and why, and stops it whole.

The engine is a child of a guard (see `guard.py`), either freshly executed or forked from the machine's nursery; the
owner holds one socket to the guard. Everything here waits on that socket: nothing polls.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal as signals
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tandem.engine import guard

LISTEN = "0A"
"""State column of a listening socket in /proc/net/tcp."""


class StartError(RuntimeError):
    """The engine process could not be started; the message says why."""


@dataclass(frozen=True)
class EngineCommand:
    """What to run: a command line, what to add to the environment, and where its output goes."""

    argv: tuple[str, ...]
    env: dict[str, str]
    log: Path
    scratch: Path | None = None
    """The engine's folder for temporary files (`TMPDIR`): made for it, and removed when it has ended. Unix sockets lie
    in it, so its path must be short."""

    @property
    def environment(self) -> dict[str, str]:
        """`env`, and where temporary files go."""
        return {**self.env, "TMPDIR": str(self.scratch)} if self.scratch else self.env


@dataclass(frozen=True)
class Exit:
    """How a process ended."""

    code: int | None = None
    signal: int | None = None

    def __str__(self) -> str:
        if self.signal is not None:
            return f"killed by {signals.Signals(self.signal).name}"
        return "ended without a known status" if self.code is None else f"exited with code {self.code}"

    @classmethod
    def from_status(cls, status: int) -> Exit:
        """From a `waitpid` status."""
        if os.WIFSIGNALED(status):
            return cls(signal=os.WTERMSIG(status))
        return cls(code=os.WEXITSTATUS(status))


NURSERY_MODULE = ("-m", "tandem.engine.cpu.launch_server")


@dataclass(eq=False)
class EngineProcess:
    """A running engine. It dies with the process that holds this object."""

    pid: int
    _reader: asyncio.StreamReader
    _writer: asyncio.StreamWriter
    _ended: asyncio.Future[Exit] = field(init=False)
    _watch: asyncio.Task[None] = field(init=False)

    def __post_init__(self) -> None:
        self._ended = asyncio.get_running_loop().create_future()
        self._watch = asyncio.create_task(self._read_end(), name=f"engine {self.pid}")

    @classmethod
    async def start(
        cls, command: EngineCommand, *, nursery: Path | None = None, deadline: float = 60.0
    ) -> EngineProcess:
        """Start `command` under a guard.

        Args:
            nursery: socket of the machine's nursery. It is used for `python -m tandem.engine.cpu.launch_server …`
                while something listens there, though it may still be importing; otherwise, and when it dies, the
                command is executed, which takes longer.
            deadline: seconds until the process must be running (not yet serving).

        Raises:
            StartError: it did not start in time, or the guard died.
        """
        command.log.parent.mkdir(parents=True, exist_ok=True)
        if nursery is not None and command.argv[1:3] == NURSERY_MODULE:
            ours = await _ask_nursery(nursery, command, deadline)
            if ours and (forked := await cls._greet(command, ours, deadline)):
                return forked
        executed = await cls._greet(command, await _execute(command), deadline)
        if executed is None:
            raise StartError(f"the guard of {command.argv[0]} died at once; see {command.log}")
        return executed

    @classmethod
    async def _greet(cls, command: EngineCommand, ours: socket.socket, deadline: float) -> EngineProcess | None:
        """Wait for the guard's first word; None if it dies before that. Raises `StartError`."""
        reader, writer = await asyncio.open_connection(sock=ours)
        try:
            line = await asyncio.wait_for(reader.readline(), deadline)
        except ConnectionError:
            line = b""
        except TimeoutError as error:
            writer.close()
            raise StartError(f"no engine process after {deadline:.0f} s: {' '.join(command.argv[:4])} …") from error
        if not line:
            writer.close()
            return None
        return cls(int(json.loads(line)["pid"]), reader, writer)

    @property
    def exit(self) -> Exit | None:
        """How it ended, or None while it runs."""
        return self._ended.result() if self._ended.done() else None

    async def wait(self) -> Exit:
        """Wait until it and all its descendants are gone."""
        return await asyncio.shield(self._ended)

    async def stop(self, *, grace: float) -> Exit:
        """End it: SIGTERM to its process group, SIGKILL to its whole tree after `grace` seconds."""
        if not self._ended.done():
            try:
                self._writer.write(json.dumps({"stop": grace}).encode() + b"\n")
                await asyncio.wait_for(self._writer.drain(), grace + 1)
                return await asyncio.wait_for(self.wait(), grace + guard.KILL_DEADLINE_S + 5)
            except (TimeoutError, ConnectionError):
                self._writer.close()  # end-of-file makes the guard kill at once
        return await asyncio.wait_for(self.wait(), guard.KILL_DEADLINE_S + 5)

    def tree(self) -> list[int]:
        """PIDs of the engine's processes, its main process first."""
        return [self.pid, *guard.descendants(self.pid)]

    def owns_listener(self, port: int) -> bool:
        """Whether the process that listens on TCP `port`, in the engine's own network, belongs to this engine."""
        inodes = _listening_inodes(self.pid, port)
        return any(inode in inodes for pid in self.tree() for inode in _socket_inodes(pid))

    async def _read_end(self) -> None:
        ended = Exit(signal=signals.SIGKILL)  # the guard itself was killed, and the engine with it
        try:
            while line := await self._reader.readline():
                message = json.loads(line)
                if "status" in message:
                    ended = Exit.from_status(int(message["status"]))
                    break
        except ConnectionError:
            pass
        finally:
            self._writer.close()
            self._ended.set_result(ended)


async def _execute(command: EngineCommand) -> socket.socket:
    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *(
                "-E",
                "-S",
                guard.__file__,
                str(theirs.fileno()),
                str(command.log),
                str(command.scratch or ""),
                *command.argv,
            ),
            env={**os.environ, **command.environment},
            pass_fds=[theirs.fileno()],
            stdin=asyncio.subprocess.DEVNULL,
        )
    task = asyncio.create_task(process.wait(), name=f"guard {process.pid}")
    _guards.add(task)
    task.add_done_callback(_guards.discard)
    ours.setblocking(False)
    return ours


_guards: set[asyncio.Task[int]] = set()
"""Keeps the tasks that reap guards alive."""


async def _ask_nursery(nursery: Path, command: EngineCommand, deadline: float) -> socket.socket | None:
    """Connect and send the request; None if nobody listens."""
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    request = {
        "argv": list(command.argv[3:]),
        "env": command.environment,
        "log": str(command.log),
        "scratch": str(command.scratch or ""),
    }
    loop = asyncio.get_running_loop()
    try:
        await asyncio.wait_for(loop.sock_connect(ours, str(nursery)), deadline)
        await asyncio.wait_for(loop.sock_sendall(ours, json.dumps(request).encode() + b"\n"), deadline)
    except (OSError, TimeoutError):
        ours.close()
        return None
    return ours


def _listening_inodes(pid: int, port: int) -> set[str]:
    inodes = set()
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            columns = line.split()
            if columns[3] == LISTEN and int(columns[1].rpartition(":")[2], 16) == port:
                inodes.add(columns[9])
    return inodes


def _socket_inodes(pid: int) -> list[str]:
    inodes = []
    try:
        for fd in os.scandir(f"/proc/{pid}/fd"):
            target = os.readlink(fd.path)
            if target.startswith("socket:["):
                inodes.append(target[8:-1])
    except OSError:
        return inodes
    return inodes
