"""How many requests an engine still has, whatever queue they are in: a group may leave when there is none.

From SGLang's `/v1/loads`. Its `num_waiting_reqs` leaves out prompts that are computed and not yet pulled by decode
(`prefill_inflight_queue_reqs`): for a prefill group these are the rooms that matter most.
"""

from __future__ import annotations

import msgspec

from tandem.engine.http1 import HttpFailure, Pool

_WITHIN_S = 5.0


class _Disaggregation(msgspec.Struct):
    prefill_inflight_queue_reqs: int = 0


class _Load(msgspec.Struct):
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    disaggregation: _Disaggregation | None = None


class _Loads(msgspec.Struct):
    loads: list[_Load]


class RoomCounter:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._pool = Pool()
        self._decoder = msgspec.json.Decoder(_Loads)

    async def count(self, url: str) -> int:
        """Requests that the group at `url` has, over all its DP ranks. Raises HttpFailure."""
        status, body = await self._pool.fetch("GET", f"{url}/v1/loads?include=core,disagg", within=_WITHIN_S)
        if status != 200:
            raise HttpFailure(f"{url}/v1/loads answered {status}")
        try:
            loads = self._decoder.decode(body).loads
        except msgspec.MsgspecError as error:
            raise HttpFailure(f"{url}/v1/loads makes no sense: {error}") from error
        return sum(
            load.num_running_reqs
            + load.num_waiting_reqs
            + (load.disaggregation.prefill_inflight_queue_reqs if load.disaggregation else 0)
            for load in loads
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.close()
