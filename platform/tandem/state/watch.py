"""The life of a watch, the same for every store: list, follow, and after a gap or an outage list again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

from tandem.state.store import Change, Entry, StoreError, StoreLostError

RECHECK_S = 2.0
"""A watch that nothing woke looks again after this: the safety net under file and stream events."""
_RETRY_S = 0.25

_log = logging.getLogger(__name__)


class HistoryGone(Exception):
    """The changes after a cursor are no longer kept, so only a new listing tells what happened."""


class Feed(Protocol):
    """What one watch reads from. A cursor is the version of the last change seen."""

    async def snapshot(self) -> tuple[int, list[Entry]]:
        """Return the store's revision and every watched entry, as of one moment."""

    async def after(self, cursor: int) -> tuple[int, list[Change]]:
        """Wait for changes, for `RECHECK_S` at most; return the new cursor and what was watched of them.

        Raises `HistoryGone`.
        """


async def follow(
    feed: Feed, closed: asyncio.Event, *, lost: Callable[[], Awaitable[None]] | None = None
) -> AsyncIterator[Change]:
    """Yield what `Store.watch` promises until `closed` is set. `lost` is called again and again while the store has
    lost what it held; it may raise StoreError."""
    known: dict[str, int] = {}
    cursor: int | None = None
    outage = False
    while not closed.is_set():
        try:
            if cursor is None:
                cursor, entries = await feed.snapshot()
                changes = _difference(known, entries, cursor)
            else:
                cursor, changes = await feed.after(cursor)
        except HistoryGone:
            cursor = None
            continue
        except StoreError as error:
            if not outage and not closed.is_set():
                _log.warning("A watch waits for its store: %s", error)
            outage, cursor = True, None
            if lost is not None and isinstance(error, StoreLostError):
                with contextlib.suppress(StoreError):  # it is tried again
                    await lost()
            await wait_for_event(closed, _RETRY_S)
            continue
        if outage:
            _log.info("A watch has its store back.")
            outage = False
        for change in changes:
            if change.value is not None:
                known[change.key] = change.version
            elif known.pop(change.key, None) is None:
                continue  # it came and went before this watch could see it
            yield change


async def wait_for_event(event: asyncio.Event, seconds: float) -> None:
    """Return when `event` is set or the time is over."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _difference(known: dict[str, int], entries: list[Entry], revision: int) -> list[Change]:
    """Return what a new listing tells to one who knew the versions `known`: deletions first."""
    present = {entry.key for entry in entries}
    gone = [Change(key, None, max(revision, version)) for key, version in known.items() if key not in present]
    return gone + [Change(*entry) for entry in entries if known.get(entry.key) != entry.version]
