"""The meter: takes one usage record per request, at once, and brings it to a sink in the background, exactly once.

`record` only puts it into a queue in memory; a task writes the queue's head as one batch, at most `LINGER_S` later.
That is all that a killed process can lose. An answer's end waits for its record, but not for long (`written`). While
the sink cannot write, the queue grows to its bound; what is beyond it is dropped, counted and logged, and nobody waits:
no request ever fails for its metering.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from itertools import islice
from pathlib import Path
from typing import Literal

import msgspec

from tandem.core.usage import UsageRecord
from tandem.gateway.observe.metrics import Metrics
from tandem.gateway.usage.journal import Journal
from tandem.gateway.usage.sinks import FileSink, RedisSink, SinkError, UsageSink
from tandem.gateway.usage.stream import UsageStream, UsageStreamError

log = logging.getLogger(__name__)

LINGER_S = 0.005
"""How long a record that nobody waits for waits for others to be written with."""
WRITTEN_S = 0.5
"""How long the end of an answer waits for its record to be safe."""
BATCH = 512
QUEUE = 100_000
"""Records (about 1 KB each) kept in memory while the sink cannot write."""
_KNOWN_IDS = 16_384
_FIRST_RETRY_S = 0.2
_LAST_RETRY_S = 10.0
_IDLE_S = 1.0


class Meter:
    """Belongs to the event loop that starts it."""

    def __init__(
        self,
        sink: UsageSink | None,
        metrics: Metrics,
        *,
        linger_s: float = LINGER_S,
        batch: int = BATCH,
        queue: int = QUEUE,
    ) -> None:
        """`sink` None: metering is off."""
        self._sink = sink
        self._metrics = metrics
        self._linger_s = linger_s
        self._batch = batch
        self._limit = queue
        self._queue: deque[UsageRecord] = deque()
        self._known: OrderedDict[str, None] = OrderedDict()
        self._waiting: dict[str, asyncio.Future[None]] = {}
        """Who waits for a record to be written, by its id."""
        self._encoder = msgspec.json.Encoder()
        self._wake = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._dropped = 0
        self._failing = False
        self._slow = False

    def record(self, record: UsageRecord) -> bool:
        """Take the record of a request that is over; return whether it is to be written. Never waits, never raises; a
        second one for it is ignored: of an answer that was taken for dead and over, here, there may be one."""
        if self._sink is None:
            return False
        if record.id in self._known:
            log.warning("request %s was metered twice; the second record is ignored: %r", record.id, record)
            return False
        if len(self._queue) >= self._limit:
            self._drop(1)
            return False
        self._known[record.id] = None
        if len(self._known) > _KNOWN_IDS:
            self._known.popitem(last=False)
        self._queue.append(record)
        self._metrics.usage_pending.set(len(self._queue))
        self._wake.set()
        return True

    async def written(self, record: UsageRecord, within: float = WRITTEN_S) -> None:
        """Take the record of a request that is all but over, and return when it is safe from the death of this process;
        sooner if the sink cannot write, or does not within so many seconds. Where one waited so long in vain, nobody
        waits before the sink has written again. Never raises."""
        if not self.record(record) or self._task is None or self._task.done() or self._failing or self._slow:
            return
        done = self._waiting[record.id] = asyncio.get_running_loop().create_future()
        try:
            if not (await asyncio.wait([done], timeout=within))[0] and not self._slow:
                self._slow = True
                log.warning("a usage record was not written within %g s: the ends of answers do not wait", within)
        finally:
            self._waiting.pop(record.id, None)

    async def start(self) -> None:
        """Raises SinkError when records could never be kept: better to hear of it before the first request."""
        if self._sink is not None and self._task is None:
            await self._sink.open()
            self._task = asyncio.create_task(self._work(self._sink), name="meter")

    async def close(self, within: float = 5.0) -> None:
        """Write what is in memory, in at most about `within` seconds for each step. Call it after the last `record`."""
        task, self._task = self._task, None
        if self._sink is None or task is None:
            return
        self._closing.set()
        self._wake.set()
        await asyncio.wait([task], timeout=within)
        task.cancel()
        await asyncio.wait([task], timeout=1.0)
        await self._sink.close(within)
        if self._queue:
            self._drop(len(self._queue))
            self._queue.clear()

    async def _work(self, sink: UsageSink) -> None:
        """Write until closed; the same batch again while the sink fails."""
        wait = _FIRST_RETRY_S
        while True:
            if not await self._some(sink):
                return
            batch = list(islice(self._queue, self._batch))
            lines = [self._encode(record) for record in batch]
            while True:
                try:
                    await sink.write(lines)
                    break
                except Exception as error:  # a task that ended here would lose all that follows
                    if not self._failing:
                        unforeseen = None if isinstance(error, SinkError) else error
                        log.error("%s; they are kept in memory and tried again", error, exc_info=unforeseen)
                    self._failing = True
                    for waiting in self._waiting.values():
                        _end(waiting)
                    if self._closing.is_set():
                        return
                    await self._pause(wait)
                    wait = min(2 * wait, _LAST_RETRY_S)
            if self._failing:
                log.warning("usage records can be written again")
            self._failing, self._slow, wait = False, False, _FIRST_RETRY_S
            for record in batch:
                self._queue.popleft()
                if (written := self._waiting.get(record.id)) is not None:
                    _end(written)
            self._metrics.usage_records.inc(len(batch))
            self._metrics.usage_pending.set(len(self._queue))

    async def _some(self, sink: UsageSink) -> bool:
        """Wait for records, then a little for others to go with them; False when it is over."""
        while not self._queue and not self._closing.is_set():
            self._wake.clear()
            try:
                await asyncio.wait_for(self._wake.wait(), _IDLE_S)
            except TimeoutError:
                await sink.idle()
        if len(self._queue) < self._batch and not self._waiting:
            await self._pause(self._linger_s)
        return bool(self._queue)

    def _encode(self, record: UsageRecord) -> bytes:
        try:
            return self._encoder.encode(record)
        except UnicodeEncodeError:
            # Half a surrogate pair in what a client sent: no text that can be written.
            clean = {
                name: value.encode(errors="replace").decode()
                for name in record.__struct_fields__
                if isinstance(value := getattr(record, name), str)
            }
            return self._encoder.encode(msgspec.structs.replace(record, **clean))

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closing.wait(), seconds)

    def _drop(self, records: int) -> None:
        self._metrics.usage_dropped.inc(records)
        # Once at 1, 2, 4, 8 … thousand, so that a long outage does not fill the log.
        before, self._dropped = self._dropped, self._dropped + records
        if not before or (before // 1000).bit_length() != (self._dropped // 1000).bit_length():
            log.error(
                "%d usage records are lost so far: %d wait in memory and the sink cannot write; see the log above",
                self._dropped,
                len(self._queue),
            )


def _end(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


def make_meter(
    metrics: Metrics,
    *,
    sink: Literal["auto", "file", "redis", "off"],
    folder: Path,
    replica: str,
    fleet: str,
    store_url: str,
    rotate_bytes: int = 256 * 2**20,
    retention_days: float = 0,
    fsync_s: float = 1.0,
    stream_records: int = 1_000_000,
    spool_bytes: int = 2**30,
) -> Meter:
    """The meter that the configuration asks for; "auto": Redis where the fleet's state is in Redis, files elsewhere.

    Files are in `folder`, the spool in `folder`/spool. Raises SinkError.
    """
    if sink == "auto":
        sink = "redis" if store_url.startswith(("redis://", "rediss://", "unix://")) else "file"
    if sink == "off":
        return Meter(None, metrics)
    if sink == "file":
        journal = Journal(folder, replica, rotate_bytes=rotate_bytes, retention_days=retention_days, fsync_s=fsync_s)
        return Meter(FileSink(journal), metrics)
    try:
        stream = UsageStream(store_url, fleet=fleet, keep=stream_records)
    except UsageStreamError as error:
        raise SinkError(f'metering.sink is "redis", but {error}') from None
    spool = RedisSink(
        stream, folder / "spool", replica, spool_limit=spool_bytes, fsync_s=fsync_s, on_spool=metrics.usage_spool.set
    )
    return Meter(spool, metrics)
