"""Whether engines have anything to do. The product's own count is used (`tandem.fleet.rooms`): `/v1/loads` alone leaves
out grammars that are compiled and prompts between two chunks, and may be older than what is asked about.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from chaos.watch import NotInTime
from tandem.engine.http1 import HttpFailure, Pool
from tandem.fleet.rooms import RoomCounter

_LOOK_S = 0.02
_COUNTS = ("num_running_reqs", "num_waiting_reqs", "num_waiting_uncached_tokens")
_QUEUES = (
    "prefill_bootstrap_queue_reqs",
    "prefill_inflight_queue_reqs",
    "decode_prealloc_queue_reqs",
    "decode_transfer_queue_reqs",
    "decode_retracted_queue_reqs",
)


async def loads(pool: Pool, url: str) -> list[dict[str, Any]]:
    """What `/v1/loads` of the group at `url` tells of each DP rank. Raises HttpFailure."""
    status, body = await pool.fetch("GET", f"{url}/v1/loads?include=all", within=5)
    if status != 200:
        raise HttpFailure(f"{url}/v1/loads answered {status}")
    return list(orjson.loads(body)["loads"])


def busy(load: Mapping[str, Any]) -> list[str]:
    """What of a load is not zero."""
    found = {name: load.get(name, 0) for name in _COUNTS}
    found |= {name: (load.get("disaggregation") or {}).get(name, 0) for name in _QUEUES}
    found["grammar"] = (load.get("queues") or {}).get("grammar", 0)
    return [f"{name}={value}" for name, value in found.items() if value]


async def busy_lines(pool: Pool, name: str, url: str) -> list[str]:
    """What a group has to do, by its last report, or why it does not tell."""
    try:
        found = await loads(pool, url)
    except HttpFailure as error:
        return [f"{name}: {error}"]
    return [f"{name} DP {load.get('dp_rank', 0)}: {what}" for load in found for what in busy(load)]


async def all_idle(groups: Callable[[], Mapping[str, str]], within: float, *, since: float) -> str:
    """Wait until no engine has a request in any queue, and every DP rank has said so after `since` (Unix seconds);
    return what was last there. Raises NotInTime.

    `groups`: URLs by name, of those that are ready now.
    """
    last = ""
    pool, counter = Pool(), RoomCounter()
    ends = time.monotonic() + within
    try:
        while lines := [
            line for name, url in groups().items() for line in await _left(pool, counter, name, url, since)
        ]:
            last = "; ".join(lines)
            if time.monotonic() > ends:
                raise NotInTime(f"engines are not idle after {within:g} s: {last}")
            await asyncio.sleep(_LOOK_S)
    finally:
        await pool.close()
        await counter.close()
    return last


async def _left(pool: Pool, counter: RoomCounter, name: str, url: str, since: float) -> list[str]:
    try:
        rooms = await counter.look(url)
        if min(rooms.reported) <= since:
            # A scheduler reports now and then, and an idle one not at all by itself; told to flush it does.
            await counter.flush(url)
            return [f"{name} has not reported since (then: {', '.join(await busy_lines(pool, name, url)) or 'idle'})"]
        if rooms.requests:
            return await busy_lines(pool, name, url) or [f"{name} has {rooms.requests} requests"]
        return []
    except HttpFailure as error:
        return [f"{name}: {error}"]
