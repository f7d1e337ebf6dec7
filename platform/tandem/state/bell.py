"""A file that wakes other processes: whoever changed something writes a byte to it, inotify tells who listens.

The database's own files do not serve: SQLite writes the log before the change becomes visible, so a reader woken by
that write may look too early and then sleep on.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

_IN_MODIFY = 0x2  # inotify(7)
_DEAF_PERIOD_S = 0.2
_log = logging.getLogger(__name__)


class Bell:
    """One process's hold on the bell file."""

    def __init__(self, path: Path, *, period: float) -> None:
        """Open or make the file. `period`: seconds after which a listener looks again without having been woken."""
        self._path = path
        self._period = period
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._inotify = -1
        self._deaf = False
        self._listeners: set[asyncio.Event] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def period(self) -> float:
        """Seconds a listener may sleep; short on a machine without (free) inotify instances."""
        return min(self._period, _DEAF_PERIOD_S) if self._deaf else self._period

    def ring(self) -> None:
        """Wake every listener in every process. May be called from any thread."""
        os.pwrite(self._file, b"\0", 0)

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """Keep other processes out of the same block; the lock ends with its holder."""
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    @contextlib.contextmanager
    def listening(self) -> Iterator[asyncio.Event]:
        """Give an event that is set whenever the bell rings; the listener clears it."""
        event = asyncio.Event()
        self._listeners.add(event)
        try:
            if self._loop is None:
                self._start()
            yield event
        finally:
            self._listeners.discard(event)

    def wake(self) -> None:
        """Wake the listeners of this process. To be called in the event loop."""
        for event in self._listeners:
            event.set()

    def close(self) -> None:
        """Let go of the file; the listeners are woken a last time."""
        if self._loop is not None and self._inotify >= 0:
            self._loop.remove_reader(self._inotify)
            os.close(self._inotify)
        os.close(self._file)
        self.wake()

    def _start(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            self._inotify = _watch_writes(self._path)
        except OSError as error:
            self._deaf = True
            _log.warning("No inotify (%s): the embedded store looks for changes every %s s.", error, self.period)
            return
        self._loop.add_reader(self._inotify, self._heard)

    def _heard(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._inotify, 65536)
        self.wake()


def _watch_writes(path: Path) -> int:
    """Return an inotify descriptor that becomes readable when `path` is written to."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "inotify_init1"):
        raise OSError(errno.ENOSYS, "this system has none")
    descriptor = int(libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
    if descriptor >= 0 and libc.inotify_add_watch(descriptor, os.fsencode(path), _IN_MODIFY) >= 0:
        return descriptor
    error = ctypes.get_errno()
    if descriptor >= 0:
        os.close(descriptor)
    raise OSError(error, os.strerror(error))
