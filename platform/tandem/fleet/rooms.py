"""How many requests an engine still has, whatever queue they are in: a group may leave when there is none.

From SGLang's `/v1/loads` (0.5.23, `managers/scheduler_components/load_inquirer.py`). Its `num_waiting_reqs` holds the
waiting queue and, by role, bootstrap, or prealloc, transfer and retracted requests. It leaves out

- prompts that are computed and not yet pulled by decode (`prefill_inflight_queue_reqs`): for a prefill group these are
  the rooms that matter most;
- a prompt between two of its chunks, which is in no queue: only its tokens show, in `num_waiting_uncached_tokens`;
- requests whose grammar is being compiled (`queues.grammar`).

And it is a report that each scheduler writes now and then, not while it computes: a request that came since is not in
it. So before an engine counts as empty it is told to flush its cache, which only an idle one does and which wakes every
scheduler, and each must have reported once more after that.
"""

from __future__ import annotations

import asyncio
import logging
from typing import NamedTuple

import msgspec

from tandem.engine.http1 import HttpFailure, Pool

_WITHIN_S = 5.0
_FLUSH_S = 30.0
_log = logging.getLogger(__name__)


class Rooms(NamedTuple):
    """What the DP ranks of a group report."""

    requests: int
    """That they have, together."""
    reported: tuple[float, ...]
    """When each wrote its report, by its own clock."""

    def later_than(self, other: Rooms) -> bool:
        """Whether every DP rank has reported again since."""
        same = len(self.reported) == len(other.reported)
        return same and all(now > then for now, then in zip(self.reported, other.reported, strict=True))


class _Disaggregation(msgspec.Struct):
    prefill_inflight_queue_reqs: int = 0


class _Queues(msgspec.Struct):
    grammar: int = 0


class _Load(msgspec.Struct):
    timestamp: float = 0.0
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_waiting_uncached_tokens: int = 0
    disaggregation: _Disaggregation | None = None
    queues: _Queues | None = None

    @property
    def requests(self) -> int:
        found = self.num_running_reqs + self.num_waiting_reqs
        found += self.disaggregation.prefill_inflight_queue_reqs if self.disaggregation else 0
        found += self.queues.grammar if self.queues else 0
        return found or int(self.num_waiting_uncached_tokens > 0)


class _Loads(msgspec.Struct):
    loads: list[_Load]


class RoomCounter:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._pool = Pool()
        self._decoder = msgspec.json.Decoder(_Loads)

    async def until_empty(self, url: str, *, quiet: float, every: float = 0.25) -> None:
        """Wait until the group at `url` has had no request for `quiet` seconds, and its engine agrees that it is idle.

        It looks so often (`every`, in seconds), for however long it takes: the caller has the deadline.
        """
        loop = asyncio.get_running_loop()
        since: float | None = None
        flushed: Rooms | None = None
        while True:
            try:
                rooms = await self.look(url)
                if rooms.requests:
                    since = flushed = None
                elif since is None:
                    since = loop.time()
                elif flushed is not None and rooms.later_than(flushed):
                    return
                elif loop.time() - since >= quiet:
                    flushed = rooms if await self.flush(url) else None
            except HttpFailure as error:  # if the engine has died, its rank will tell
                since = flushed = None
                _log.info("the rooms of %s cannot be counted: %s", url, error)
            await asyncio.sleep(every)

    async def look(self, url: str) -> Rooms:
        """What the DP ranks of the group at `url` report. Raises HttpFailure."""
        status, body = await self._pool.fetch("GET", f"{url}/v1/loads?include=core,disagg,queues", within=_WITHIN_S)
        if status != 200:
            raise HttpFailure(f"{url}/v1/loads answered {status}")
        try:
            loads = self._decoder.decode(body).loads
        except msgspec.MsgspecError as error:
            raise HttpFailure(f"{url}/v1/loads makes no sense: {error}") from error
        if not loads:
            raise HttpFailure(f"{url}/v1/loads tells of no DP rank")
        return Rooms(sum(load.requests for load in loads), tuple(load.timestamp for load in loads))

    async def flush(self, url: str) -> bool:
        """Have the group forget its cached prefixes; False = it is not idle. Raises HttpFailure.

        SGLang answers for its first DP rank only, yet tells them all.
        """
        status, _ = await self._pool.fetch("POST", f"{url}/flush_cache", within=_FLUSH_S)
        if status not in (200, 400):
            raise HttpFailure(f"{url}/flush_cache answered {status}")
        return status == 200

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.close()
