"""Starts and ends this machine's nursery (`tandem.engine.nursery`)."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(eq=False)
class NurseryProcess:
    """The running nursery. It ends with this process, also when that is killed: its standard input ends then."""

    socket: Path
    process: asyncio.subprocess.Process

    @classmethod
    async def start(cls, socket: Path, log: Path) -> NurseryProcess:
        """Start it; it answers when `socket` exists, some seconds later. Ranks do without it until then."""
        with open(log, "ab") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tandem.engine.nursery", str(socket)),
                stdin=asyncio.subprocess.PIPE,
                stdout=output,
                stderr=output,
            )
        return cls(socket, process)

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
