"""Copies what engines log on this node to standard output, where Kubernetes keeps it (`kubectl logs`)."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import BinaryIO

from watchfiles import Change, awatch

_PIECE = 2**16
_POLL_MS = 500
"""Not by inotify: a machine has few watches for all that run on it."""
_log = logging.getLogger(__name__)


class LogCopier:
    """Follows every `*.log` in a folder from its beginning. A line that is not finished yet waits until it is."""

    def __init__(self, folder: Path, output: BinaryIO | None = None) -> None:
        """`output`: None = standard output."""
        self._folder = folder
        self._output = output or sys.stdout.buffer
        self._read: dict[Path, int] = {}

    async def follow(self) -> None:
        """Copy until cancelled. A failure is logged: no engine ends for it."""
        try:
            await self._follow()
        except (OSError, RuntimeError) as error:
            _log.error("the engines' logs are not copied any more: %s; they are in %s", error, self._folder)

    async def _follow(self) -> None:
        for path in sorted(self._folder.glob("*.log")):
            await asyncio.to_thread(self.copy, path)
        async for changes in awatch(self._folder, force_polling=True, poll_delay_ms=_POLL_MS):
            for change, path in sorted((change, Path(name)) for change, name in changes):
                if change is Change.deleted:
                    self._read.pop(path, None)
                elif path.suffix == ".log":
                    await asyncio.to_thread(self.copy, path)

    def copy(self, path: Path) -> None:
        """Copy what is new in one file, whole lines only, each with the file's name in front."""
        name = path.stem.encode()
        try:
            with open(path, "rb") as file:
                while True:
                    at = file.seek(self._read.get(path, 0))
                    piece = file.read(_PIECE)
                    whole = piece.rfind(b"\n") + 1 or (len(piece) if len(piece) == _PIECE else 0)
                    if whole == 0:
                        break
                    for line in piece[:whole].splitlines():
                        self._output.write(b"[%s] %s\n" % (name, line))
                    self._read[path] = at + whole
        except FileNotFoundError:
            self._read.pop(path, None)
        self._output.flush()
