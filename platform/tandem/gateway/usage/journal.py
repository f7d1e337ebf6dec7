"""Usage records in files: JSON lines, append-only, in segments whose names sort by time.

A segment is `usage-<UTC time>-<writer>-<position>.jsonl`; its position is how many bytes the writer wrote before it. A
writer is one run of one gateway replica: no file is ever opened again by a later one. While it lives it holds a lock
(`flock`, so that the kernel lets go of it whatever kills the process). Everything here blocks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tandem.core.usage import utc_day

log = logging.getLogger(__name__)

_SEGMENT = re.compile(r"usage-\d{8}T\d{6}Z-(?P<writer>.+)-(?P<base>\d{16})\.jsonl")
_CHUNK = 1 << 18


class Segment(NamedTuple):
    """One file of one writer."""

    path: Path
    writer: str
    base: int


class Journal:
    """What one writer appends. Use it from one thread at a time."""

    def __init__(
        self,
        folder: Path,
        writer: str,
        *,
        rotate_bytes: int = 256 * 2**20,
        retention_days: float = 0,
        fsync_s: float = 1.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """A segment ends at `rotate_bytes` and with its (UTC) day. Ones older than `retention_days` are removed, 0 =
        never. `fsync_s`: how many seconds of records a power failure may take, at most; 0 = none.
        """
        self.folder = folder
        self.writer = re.sub(r"[^A-Za-z0-9_.]", "-", writer)
        self.position = 0
        """Bytes written in all."""
        self._rotate_bytes = rotate_bytes
        self._retention_days = retention_days
        self._fsync_s = fsync_s
        self._clock = clock
        self._lock: int | None = None
        self._file: int | None = None
        self._base = 0
        self._day = ""
        self._dirty_since: float | None = None

    def open(self) -> None:
        """Make the folder, and mend what writers that died left in it. Raises OSError."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = lock(self.folder, self.writer)
        if self._lock is None:
            raise OSError(errno.EBUSY, f"another gateway replica named {self.writer} writes here", str(self.folder))
        for segment in segments(self.folder):
            _mend(segment)

    def append(self, lines: bytes) -> None:
        """Write whole lines, in one call. Raises OSError; then nothing of them counts as written."""
        file = self._current()
        try:
            written = os.write(file, lines)
            if written != len(lines):
                raise OSError(errno.ENOSPC, f"only {written} of {len(lines)} bytes could be written")
        except OSError:
            self._take_back()
            raise
        self.position += len(lines)
        if self._dirty_since is None:
            self._dirty_since = self._clock()
        try:
            self.sync_if_due()
        except OSError as error:
            # The lines are in the file: to write them again would double them.
            log.warning("usage records are written to %s but not yet safe on its disk: %s", self.folder, error)

    def sync_if_due(self) -> None:
        """Bring what was written to the disk, if it has waited for `fsync_s`. Raises OSError."""
        if self._dirty_since is not None and self._clock() - self._dirty_since >= self._fsync_s:
            self._sync()

    def close(self) -> None:
        """Bring it all to the disk and let go of it. Raises OSError."""
        try:
            self._end_segment()
        finally:
            if self._lock is not None:
                # An own lock file is of no more use: a writer's name does not come back.
                (self.folder / _lock_name(self.writer)).unlink(missing_ok=True)
                os.close(self._lock)
                self._lock = None

    def _current(self) -> int:
        now = self._clock()
        day = utc_day(now)
        if self._file is not None and day == self._day and self.position - self._base < self._rotate_bytes:
            return self._file
        self._end_segment()
        self._remove_old(now)
        # A writer that could not take back a torn line goes on in a file of its own, at the same position.
        name = f"usage-{_stamp(now)}-{self.writer}-{self.position:016}.jsonl"
        self._file = os.open(self.folder / name, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o600)
        self._base, self._day = self.position, day
        _sync_folder(self.folder)
        return self._file

    def _take_back(self) -> None:
        """Remove a line that was half written; where that fails, readers skip it by the next segment's position."""
        assert self._file is not None, "there was a write"
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, self.position - self._base)
            return
        os.close(self._file)
        self._file = None

    def _end_segment(self) -> None:
        if self._file is None:
            return
        try:
            self._sync()
        finally:
            os.close(self._file)
            self._file = None

    def _sync(self) -> None:
        if self._file is not None and self._dirty_since is not None:
            os.fdatasync(self._file)
        self._dirty_since = None

    def _remove_old(self, now: float) -> None:
        if not self._retention_days:
            return
        for segment in segments(self.folder):
            with contextlib.suppress(FileNotFoundError):  # another replica was faster
                if segment.path.stat().st_mtime < now - self._retention_days * 86400:
                    segment.path.unlink()


def segments(folder: Path, writer: str | None = None) -> list[Segment]:
    """All segments in the folder, or those of one writer, in the order in which they were written."""
    found = []
    for path in folder.glob("usage-*.jsonl"):
        match = _SEGMENT.fullmatch(path.name)
        if match is not None and writer in (None, match["writer"]):
            found.append(Segment(path, match["writer"], int(match["base"])))
    return sorted(found, key=lambda one: one.path.name if writer is None else f"{one.base:016}{one.path.name}")


def read_from(folder: Path, writer: str, position: int, *, limit: int = _CHUNK) -> tuple[list[bytes], int]:
    """Whole lines of a writer from `position` on, about `limit` bytes of them, and the position after them.

    Without a further line the position may still be a later one: torn bytes and removed segments are stepped over.
    Raises OSError.
    """
    own = segments(folder, writer)
    for place, segment in enumerate(own):
        after = own[place + 1].base if place + 1 < len(own) else None
        if after is not None and after <= position:
            continue
        position = max(position, segment.base)
        with segment.path.open("rb") as file:
            file.seek(position - segment.base)
            data = file.read(limit)
            if len(data) == limit and b"\n" not in data:
                data += file.readline()
        if after is not None:
            data = data[: after - position]
        data = data[: data.rfind(b"\n") + 1]
        if data:
            return data.splitlines(), position + len(data)
        if after is not None:
            position = after
    return [], position


def remove(folder: Path, writer: str, position: int | None) -> None:
    """Remove a writer's segments that end at or before `position`, but for its last; None = all. Raises OSError."""
    own = segments(folder, writer)
    for place, segment in enumerate(own):
        if position is None or (place + 1 < len(own) and own[place + 1].base <= position):
            segment.path.unlink(missing_ok=True)


def read_lines(path: Path) -> Iterator[bytes]:
    """Whole lines of a segment, also of one that is being written. Raises OSError."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line


def lock(folder: Path, writer: str) -> int | None:
    """Be the only owner of a writer's segments; None while it lives, or another holds them. Raises OSError."""
    file = os.open(folder / _lock_name(writer), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def unlock(folder: Path, writer: str, file: int) -> None:
    """Let go of a writer's segments; its name will not come back."""
    with contextlib.suppress(OSError):
        (folder / _lock_name(writer)).unlink(missing_ok=True)
    os.close(file)


def _mend(segment: Segment) -> None:
    """Cut off a line that a crash left half written, so that files can be put together and read by any tool."""
    owner = lock(segment.path.parent, segment.writer)
    if owner is None:
        return
    try:
        with segment.path.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            if not size or os.pread(file.fileno(), 1, size - 1) == b"\n":
                return
            end = size
            while end:
                start = max(0, end - _CHUNK)
                newline = os.pread(file.fileno(), end - start, start).rfind(b"\n")
                if newline >= 0:
                    file.truncate(start + newline + 1)
                    return
                end = start
            file.truncate(0)
    except FileNotFoundError:
        # Its retention ended, or another replica has delivered it.
        return
    finally:
        unlock(segment.path.parent, segment.writer, owner)


def _lock_name(writer: str) -> str:
    return f".usage-{writer}.lock"


def _stamp(at: float) -> str:
    return time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(at))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
