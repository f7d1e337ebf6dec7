"""Starts and ends this machine's nursery (`tandem.engine.nursery`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(eq=False)
class NurseryProcess:
    """The running nursery. It ends with this process, also when that is killed: its standard input ends then."""

    path: Path
    """Its socket."""
    process: asyncio.subprocess.Process

    @classmethod
    async def start(cls, folder: Path, log: Path) -> NurseryProcess:
        """Start it with its socket in `folder`, of a short path. Clients may connect at once; it answers when it has
        imported the engine, some seconds later."""
        path, metrics = folder / "nursery", folder / "nursery-metrics"
        path.unlink(missing_ok=True)  # of one that was here before
        metrics.mkdir(exist_ok=True)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, os.fdopen(output, "ab"):
            listener.bind(str(path))
            listener.listen(64)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tandem.engine.nursery", str(listener.fileno()), str(metrics)),
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[listener.fileno()],
            )
        return cls(path, process)

    async def stop(self, deadline: float = 5.0) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), deadline)
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
            await self.process.wait()
