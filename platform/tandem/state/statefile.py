"""The SQLite file of the embedded store: plain calls that block, time passed in.

`entries` is what is there, `changes` the last changes of any key, one row each, with the version as its number. An
entry whose time is up is out of sight at once; the next writer, or a watch that waits for the moment, takes it out
and logs that as a change, so that it is reported once and in its place.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tandem.state.store import Change, Entry

_KEPT_CHANGES = 4096
_PREFIX_END = "\U0010ffff"  # sorts after every character that a key may hold
_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries(
    key TEXT PRIMARY KEY, value BLOB NOT NULL, version INTEGER NOT NULL, expires REAL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS entries_by_expiry ON entries(expires) WHERE expires IS NOT NULL;
CREATE TABLE IF NOT EXISTS changes(version INTEGER PRIMARY KEY AUTOINCREMENT, key TEXT NOT NULL, value BLOB);
"""


class News(NamedTuple):
    """What happened since a cursor. `changes` is None when they are no longer all kept."""

    revision: int
    changes: list[Change] | None
    next_expiry: float | None
    """Unix seconds."""


class StateFile:
    """An open state file. All calls from one thread; times are Unix seconds; raises `sqlite3.Error`."""

    def __init__(self, path: Path, *, busy_timeout: float, on_change: Callable[[], None]) -> None:
        """Open or make the file. `busy_timeout`: seconds to wait for another process's write."""
        self._on_change = on_change
        self._db = sqlite3.connect(path, timeout=busy_timeout, isolation_level=None)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.executescript(_SCHEMA)

    def get(self, key: str, *, now: float) -> Entry | None:
        """Return the entry that is there at `now`."""
        query = "SELECT key, value, version FROM entries WHERE key = ? AND (expires IS NULL OR expires > ?)"
        row = self._db.execute(query, (key, now)).fetchone()
        return Entry(*row) if row else None

    def entries(self, prefix: str, *, now: float) -> tuple[int, list[Entry]]:
        """Return the revision and all entries under `prefix`, as of one moment."""
        query = (
            "SELECT key, value, version FROM entries"
            " WHERE key >= ? AND key < ? AND (expires IS NULL OR expires > ?) ORDER BY key"
        )
        with self._reading():
            rows = self._db.execute(query, (prefix, prefix + _PREFIX_END, now)).fetchall()
            return self.revision(), [Entry(*row) for row in rows]

    def write(
        self, key: str, value: bytes | None, *, expected: int | None, expires: float | None, now: float
    ) -> int | None:
        """Put, or delete if `value` is None, provided that the key is at version `expected` (None = at any).

        Returns the new version (0 if there was nothing to delete), None on a conflict.
        """
        with self._writing(now):
            row = self._db.execute("SELECT version FROM entries WHERE key = ?", (key,)).fetchone()
            current = row[0] if row else 0
            if expected is not None and expected != current:
                return None
            if value is None and not current:
                return 0
            return self._change(key, value, expires)

    def touch(self, key: str, *, expires: float, now: float) -> bool:
        """Move the expiry of a key; return whether it is there."""
        with self._writing(now):
            return self._db.execute("UPDATE entries SET expires = ? WHERE key = ?", (expires, key)).rowcount > 0

    def since(self, prefix: str, cursor: int, *, now: float) -> News:
        """Return the changes under `prefix` after version `cursor`, expiries up to `now` among them."""
        next_expiry = self._next_expiry()
        if next_expiry is not None and next_expiry <= now:
            with self._writing(now):
                pass
        with self._reading():
            next_expiry, revision = self._next_expiry(), self.revision()
            (kept,) = self._db.execute("SELECT count(*) FROM changes WHERE version > ?", (cursor,)).fetchone()
            if kept != revision - cursor:
                return News(revision, None, next_expiry)
            query = "SELECT key, value, version FROM changes WHERE version > ? AND key >= ? AND key < ?"
            rows = self._db.execute(query + " ORDER BY version", (cursor, prefix, prefix + _PREFIX_END)).fetchall()
            return News(revision, [Change(*row) for row in rows], next_expiry)

    def revision(self) -> int:
        """Return the version of the last change."""
        row = self._db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'changes'").fetchone()
        return int(row[0]) if row else 0

    def close(self) -> None:
        """Close the file; what was written stays."""
        self._db.close()

    def _next_expiry(self) -> float | None:
        (moment,) = self._db.execute("SELECT min(expires) FROM entries WHERE expires IS NOT NULL").fetchone()
        return None if moment is None else float(moment)

    def _change(self, key: str, value: bytes | None, expires: float | None) -> int:
        version = self._db.execute("INSERT INTO changes(key, value) VALUES (?, ?)", (key, value)).lastrowid
        assert version is not None
        self._db.execute("DELETE FROM changes WHERE version <= ?", (version - _KEPT_CHANGES,))
        if value is None:
            self._db.execute("DELETE FROM entries WHERE key = ?", (key,))
        else:
            self._db.execute("REPLACE INTO entries VALUES (?, ?, ?, ?)", (key, value, version, expires))
        return version

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _writing(self, now: float) -> Iterator[None]:
        """Hold the file's one write lock; entries whose time was up before `now` are taken out first."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            query = "SELECT key FROM entries WHERE expires <= ? ORDER BY expires"
            for (key,) in self._db.execute(query, (now,)).fetchall():
                self._change(key, None, None)
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")
        self._on_change()
