"""Threads for the bodies that are too large for the event loop: a lane for each tenant, so that none waits for another.

One tenant's bodies are worked on one at a time, in order; a few threads serve all lanes.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tandem.gateway.errors import ApiError

INLINE_BYTES = 32 * 1024
"""Bodies up to this size are parsed and tokenized on the event loop, mostly in less than a millisecond: handing them to
a thread and back costs as much."""
THREADS = 4
WAITING = 64
"""Bodies of one tenant that may wait; with a further one it is told to come back."""
_TRIM_BYTES = 2**20
"""What the work on larger bodies leaves to the allocator is given back to the system (60 ms, in the thread)."""

_T = TypeVar("_T")
_libc = ctypes.CDLL(None)


class _Lane:
    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.waiting = 0

    def leave(self) -> None:
        self.waiting -= 1
        self.turn.release()

    def over(self, work: asyncio.Future[Any]) -> None:
        self.leave()
        if not work.cancelled():
            work.exception()  # nobody may be left to hear of it, and it must not be warned of then


class Lanes:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="tandem-text")
        self._lanes: dict[str, _Lane] = {}

    async def work(self, tenant: str, size: int, job: Callable[[], _T]) -> _T:
        """Do the job of a body of `size` bytes where it holds up nobody. Raises what it raises; ApiError (429) when too
        many of the tenant's wait. `tenant` is one of the configuration's: each has a lane for ever."""
        if size <= INLINE_BYTES:
            return job()
        lane = self._lanes.setdefault(tenant, _Lane())
        if lane.waiting >= WAITING:
            message = f"{lane.waiting} large requests of {tenant} wait to be read. Please try again in 1s."
            raise ApiError(429, message, type="requests", code="overloaded", retry_after=1.0)
        lane.waiting += 1
        try:
            await lane.turn.acquire()
        except BaseException:
            lane.waiting -= 1
            raise
        try:
            work = job if size < _TRIM_BYTES else _then_trim(job)
            running = asyncio.get_running_loop().run_in_executor(self._threads, work)
        except BaseException:
            lane.leave()
            raise
        # Who gives up does not end the thread's work: the lane is free when that is over, or a client that comes and
        # goes would have all the threads.
        running.add_done_callback(lane.over)
        return await asyncio.shield(running)

    def close(self) -> None:
        """Let what runs end by itself; nothing that waits is begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _then_trim(job: Callable[[], _T]) -> Callable[[], _T]:
    def run() -> _T:
        try:
            return job()
        finally:
            _libc.malloc_trim(0)

    return run
