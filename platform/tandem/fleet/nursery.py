"""Starts and ends this machine's nursery (`tandem.engine.nursery`)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

AGAIN_S = (1.0, 5.0, 30.0)
"""Between its end and the next start; longer each time that it has not lived for as long as the longest of these."""
log = logging.getLogger(__name__)


@dataclass(eq=False)
class NurseryProcess:
    """The running nursery. It ends with this process, also when that is killed: its standard input ends then."""

    path: Path
    """Its socket."""
    log: Path
    process: asyncio.subprocess.Process

    @classmethod
    async def start(cls, folder: Path, log: Path) -> NurseryProcess:
        """Start it with its socket in `folder`, of a short path. Clients may connect at once; it answers when it has
        imported the engine, some seconds later."""
        return cls(folder / "nursery", log, await cls._spawn(folder, log))

    @staticmethod
    async def _spawn(folder: Path, log: Path) -> asyncio.subprocess.Process:
        path, metrics = folder / "nursery", folder / "nursery-metrics"
        path.unlink(missing_ok=True)  # of one that was here before
        metrics.mkdir(exist_ok=True)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener, os.fdopen(output, "ab"):
            listener.bind(str(path))
            listener.listen(64)
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tandem.engine.nursery", str(listener.fileno()), str(metrics)),
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[listener.fileno()],
            )

    async def keep(self) -> None:
        """Start it again whenever it ends, for ever: without it an engine starts as slowly as on any machine, or, where
        that is forbidden to it, not at all. Engines that were forked from it live on."""
        short = 0
        while True:
            began = time.monotonic()
            code = await self.process.wait()
            short = min(short + 1, len(AGAIN_S) - 1) if time.monotonic() - began < AGAIN_S[-1] else 0
            log.error("the nursery ended with code %d; another one is started in %.0f s", code, AGAIN_S[short])
            await asyncio.sleep(AGAIN_S[short])
            self.process = await self._spawn(self.path.parent, self.log)

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
