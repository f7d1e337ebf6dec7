"""Where usage records go: files on this node, or the fleet's Redis stream by way of files on this node.

With Redis, a record is in a local file first, and from there it is delivered: so nothing is lost while Redis is away,
or when the process dies. What a process that died has left is delivered by the next replica on the node that looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

from tandem.gateway.usage import journal as files
from tandem.gateway.usage.journal import Journal
from tandem.gateway.usage.stream import UsageStream, UsageStreamError

log = logging.getLogger(__name__)

_T = TypeVar("_T")

ADOPT_S = 30.0
"""How often a replica looks for what dead ones have left to be delivered."""
SHIP_S = 0.05
"""How long what is in the spool waits for more to be delivered with."""
_FIRST_RETRY_S = 0.2
_LAST_RETRY_S = 10.0


class SinkError(Exception):
    """The records could not be written; the same ones are to be written again later. The message says why."""


class UsageSink(Protocol):
    """Takes batches of records, one batch at a time."""

    async def open(self) -> None:
        """Get ready. Raises SinkError if it never can."""

    async def write(self, lines: Sequence[bytes]) -> None:
        """Keep the records (JSON, no newline). Raises SinkError; then call again with the same ones."""

    async def idle(self) -> None:
        """Called now and then while there is nothing to write."""

    async def close(self, within: float) -> None:
        """Finish what can be finished in `within` seconds; keep the rest for later."""


class FileSink:
    """JSONL files in a folder, for good."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tandem-usage")

    async def open(self) -> None:
        try:
            await _in(self._thread, self._journal.open)
        except OSError as error:
            raise SinkError(
                f"usage records cannot be kept in {self._journal.folder}: {error.strerror}; "
                'choose another metering.folder, or set metering.sink to "off"'
            ) from error

    async def write(self, lines: Sequence[bytes]) -> None:
        try:
            await _in(self._thread, self._journal.append, _joined(lines))
        except OSError as error:
            raise SinkError(f"usage records cannot be written to {self._journal.folder}: {error}") from error

    async def idle(self) -> None:
        with contextlib.suppress(OSError):  # said when it was written; it is tried again
            await _in(self._thread, self._journal.sync_if_due)

    async def close(self, within: float) -> None:
        await _close_journal(self._thread, self._journal, within)


class RedisSink:
    """The fleet's stream in Redis, fed from a folder of this node (the spool)."""

    def __init__(
        self,
        stream: UsageStream,
        folder: Path,
        writer: str,
        *,
        spool_limit: int = 2**30,
        segment_bytes: int = 8 * 2**20,
        fsync_s: float = 1.0,
        adopt_s: float = ADOPT_S,
        on_spool: Callable[[int], None] = lambda size: None,
    ) -> None:
        """The spool takes `spool_limit` bytes; beyond it the sink raises SinkError. `on_spool` hears of its size."""
        self._stream = stream
        # A name of this run alone: a later one may find what this one left, and must not go on in its place.
        self._journal = Journal(
            folder, f"{writer}-{uuid.uuid4().hex[:12]}", rotate_bytes=segment_bytes, fsync_s=fsync_s
        )
        self._spool_limit = spool_limit
        self._adopt_s = adopt_s
        self._on_spool = on_spool
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tandem-usage")
        self._spooling = False
        self._delivered = 0
        self._news = asyncio.Event()
        self._closing = asyncio.Event()
        self._work: list[asyncio.Task[None]] = []
        self._direct = 0
        self._unsure = False
        self._failing = False

    async def open(self) -> None:
        try:
            await _in(self._thread, self._journal.open)
            self._spooling = True
        except OSError as error:
            log.warning(
                "usage records cannot be kept in %s (%s): they go to Redis from memory, and what Redis cannot take "
                "before this gateway ends is lost",
                self._journal.folder,
                error,
            )
            return
        self._work = [asyncio.create_task(self._ship()), asyncio.create_task(self._adopt())]

    async def write(self, lines: Sequence[bytes]) -> None:
        if not self._unsure and self._spooling:
            waiting = self._journal.position - self._delivered
            try:
                if waiting >= self._spool_limit:
                    raise OSError(f"the spool is full: {waiting} bytes wait for Redis")
                await _in(self._thread, self._journal.append, _joined(lines))
            except OSError as error:
                log.debug("the spool %s cannot be used: %s", self._journal.folder, error)
            else:
                self._tell_size()
                self._news.set()
                return
        await self._write_directly(lines)

    async def idle(self) -> None:
        if self._spooling:
            with contextlib.suppress(OSError):  # said when it was written; it is tried again
                await _in(self._thread, self._journal.sync_if_due)

    async def close(self, within: float) -> None:
        self._closing.set()
        self._news.set()
        if self._work:
            await asyncio.wait(self._work, timeout=within)
            for task in self._work:
                task.cancel()
            await asyncio.wait(self._work, timeout=1.0)
        if self._spooling:
            await _close_journal(self._thread, self._journal, within)
        await self._stream.close()

    async def _write_directly(self, lines: Sequence[bytes]) -> None:
        """Without the spool: straight to Redis, where the position counts records."""
        # What may have been delivered already is only ever tried again in this way, never put into the spool.
        self._unsure = True
        start, end = self._direct, self._direct + len(lines)
        try:
            await self._stream.deliver(f"{self._journal.writer}-direct", start, end, lines)
        except UsageStreamError as error:
            raise SinkError(f"usage records can be neither spooled nor delivered: {error}") from error
        self._direct = end
        self._unsure = False

    # Delivery

    async def _ship(self) -> None:
        """Deliver what this writer spools, until it is closed and all is delivered."""
        wait = _FIRST_RETRY_S
        while True:
            await self._news.wait()
            await self._pause(SHIP_S)  # what comes meanwhile goes together
            self._news.clear()
            try:
                await self._deliver()
            except (UsageStreamError, OSError) as error:
                if not self._failing:
                    log.warning("usage records wait in %s until they can be delivered: %s", self._journal.folder, error)
                self._failing = True
                if self._closing.is_set():
                    return
                await self._pause(wait)
                wait = min(2 * wait, _LAST_RETRY_S)
                self._news.set()
                continue
            if self._failing:
                log.warning("usage records are delivered again")
            self._failing, wait = False, _FIRST_RETRY_S
            if self._closing.is_set() and self._delivered >= self._journal.position:
                return

    async def _adopt(self) -> None:
        """Deliver what writers that died have left here, now and from time to time."""
        while not self._closing.is_set():
            try:
                for writer in await _in(self._thread, self._abandoned):
                    await self._take_over(writer)
            except (UsageStreamError, OSError) as error:
                log.debug("what other gateways left in %s waits: %s", self._journal.folder, error)
            await self._pause(self._adopt_s)

    def _abandoned(self) -> list[str]:
        found = {segment.writer for segment in files.segments(self._journal.folder)}
        return sorted(found - {self._journal.writer})

    async def _take_over(self, writer: str) -> None:
        folder = self._journal.folder
        owner = files.lock(folder, writer)
        if owner is None:
            return
        try:
            have = await self._stream.position(writer)
            while not self._closing.is_set():
                lines, end = await _in(self._thread, files.read_from, folder, writer, have)
                if not lines:
                    await _in(self._thread, files.remove, folder, writer, None)
                    log.info("delivered the usage records that the gateway %s had left", writer)
                    return
                have = await self._stream.deliver(writer, have, end, lines)
        finally:
            files.unlock(folder, writer, owner)

    async def _deliver(self) -> None:
        """Bring the stream to the end of what this writer has spooled; delivered segments go. Raises
        UsageStreamError, OSError.
        """
        folder, writer = self._journal.folder, self._journal.writer
        have = self._delivered
        while True:
            lines, end = await _in(self._thread, files.read_from, folder, writer, have)
            if not lines:
                await _in(self._thread, files.remove, folder, writer, have)
                return
            # A Redis that lost its data answers with 0: what is still here is delivered again.
            have = await self._stream.deliver(writer, have, end, lines)
            self._delivered = have
            self._tell_size()

    def _tell_size(self) -> None:
        self._on_spool(max(0, self._journal.position - self._delivered))

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)


async def _in(thread: ThreadPoolExecutor, call: Callable[..., _T], *arguments: object) -> _T:
    return await asyncio.get_running_loop().run_in_executor(thread, call, *arguments)


async def _close_journal(thread: ThreadPoolExecutor, journal: Journal, within: float) -> None:
    try:
        async with asyncio.timeout(within):
            await _in(thread, journal.close)
    except TimeoutError:
        log.warning(
            "the disk with %s did not take the last usage records within %g s: they may not be safe on it",
            journal.folder,
            within,
        )
    except OSError as error:
        log.warning("the last usage records in %s may not be safe on its disk: %s", journal.folder, error)
    thread.shutdown(wait=False)


def _joined(lines: Sequence[bytes]) -> bytes:
    return b"\n".join(lines) + b"\n"
