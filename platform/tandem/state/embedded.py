"""The embedded store: a SQLite file that any number of processes of one machine use at once, no server needed.

The file is in WAL mode, so readers never wait. Its calls run in one thread of the store's own. Beside it lies a bell
file (`bell.py`) that wakes the watches of all processes within milliseconds. Both must be on a local disk.
"""

from __future__ import annotations

import asyncio
import builtins
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tandem.state.bell import Bell
from tandem.state.statefile import StateFile
from tandem.state.store import KEPT, Change, Entry, StoreError, check_key, check_ttl
from tandem.state.watch import RECHECK_S, HistoryGone, follow, wait_for_event

_T = TypeVar("_T")


class EmbeddedStore:
    """See `Store`."""

    def __init__(self, path: Path, *, deadline: float) -> None:
        """Use `open`."""
        self._path = path
        self._deadline = deadline
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tandem-state")
        self._closed = asyncio.Event()

    @classmethod
    async def open(cls, path: Path, *, deadline: float) -> EmbeddedStore:
        """Open or make the store in the file `path`; its folder is made too. Raises `StoreError`."""
        store = cls(path, deadline=deadline)
        try:
            await store._run(store._open)
        except StoreError:
            store._thread.shutdown(wait=False)
            raise
        return store

    async def get(self, key: str) -> Entry | None:
        check_key(key)
        return await self._run(lambda: self._file.get(key, now=time.time()))

    async def put(self, key: str, value: bytes, *, ttl: float | None = None) -> int:
        version = await self._write(key, value, None, ttl)
        assert version is not None
        return version

    async def compare_and_set(
        self, key: str, value: bytes | None, *, version: int, ttl: float | None = None
    ) -> int | None:
        new = await self._write(key, value, version, ttl)
        return 0 if new is not None and value is None else new

    async def delete(self, key: str) -> bool:
        return bool(await self._write(key, None, None, None))

    async def list(self, prefix: str) -> builtins.list[Entry]:
        return (await self._snapshot(prefix))[1]

    async def touch(self, key: str, ttl: float) -> bool:
        check_key(key)
        check_ttl(ttl)

        def call() -> bool:
            now = time.time()
            return self._file.touch(key, expires=now + ttl, now=now)

        return await self._run(call)

    async def watch(self, prefix: str) -> AsyncIterator[Change]:
        # Listening starts before the listing, so nothing can fall between the two.
        with self._bell.listening() as rung:
            async for change in follow(_Feed(self, prefix, rung), self._closed):
                yield change

    async def keep(self, prefixes: Sequence[str] = KEPT) -> None:
        # A file is not lost while the machine lives, and nobody else can have what was in it.
        await self._closed.wait()

    async def revision(self) -> int:
        return await self._run(lambda: self._file.revision())

    async def close(self) -> None:
        if self._closed.is_set():
            return
        self._closed.set()
        loop = asyncio.get_running_loop()
        with contextlib.suppress(sqlite3.Error):
            await loop.run_in_executor(self._thread, self._file.close)
        self._thread.shutdown(wait=False)
        self._bell.close()

    async def _write(self, key: str, value: bytes | None, expected: int | None, ttl: float | None) -> int | None:
        check_key(key)
        check_ttl(ttl)

        def call() -> int | None:
            now = time.time()
            expires = None if ttl is None else now + ttl
            return self._file.write(key, value, expected=expected, expires=expires, now=now)

        return await self._run(call)

    async def _snapshot(self, prefix: str) -> tuple[int, builtins.list[Entry]]:
        return await self._run(lambda: self._file.entries(prefix, now=time.time()))

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._bell = Bell(self._path.with_suffix(".bell"), period=RECHECK_S)
        try:
            # SQLite does not wait for its turn while the file is switched to WAL, so the first openers queue up here.
            with self._bell.exclusively():
                # A little less than the deadline, so that a call that waits in vain ends before it is given up.
                self._file = StateFile(self._path, busy_timeout=0.8 * self._deadline, on_change=self._bell.ring)
        except sqlite3.Error:
            self._bell.close()
            raise

    async def _run(self, call: Callable[[], _T]) -> _T:
        if self._closed.is_set():
            raise StoreError("This store was closed.")
        try:
            async with asyncio.timeout(self._deadline):
                return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except TimeoutError:
            reason = f"no answer within {self._deadline:g} s; another process holds it, or the disk does not answer"
            raise StoreError(f"The state file {self._path} cannot be used: {reason}.") from None
        except (sqlite3.Error, OSError) as error:
            hint = "See that the folder can be written to; if the file is damaged, stop the fleet and remove it."
            raise StoreError(f"The state file {self._path} cannot be used: {error}. {hint}") from error


class _Feed:
    """What a watch of the embedded store reads from."""

    def __init__(self, store: EmbeddedStore, prefix: str, rung: asyncio.Event) -> None:
        self._store = store
        self._prefix = prefix
        self._rung = rung

    async def snapshot(self) -> tuple[int, list[Entry]]:
        return await self._store._snapshot(self._prefix)

    async def after(self, cursor: int) -> tuple[int, list[Change]]:
        self._rung.clear()
        file, prefix = self._store._file, self._prefix
        news = await self._store._run(lambda: file.since(prefix, cursor, now=time.time()))
        if news.changes is None:
            raise HistoryGone
        if news.revision == cursor:
            wait = self._store._bell.period
            if news.next_expiry is not None:
                wait = max(0.001, min(wait, news.next_expiry - time.time()))
            await wait_for_event(self._rung, wait)
        return news.revision, news.changes
