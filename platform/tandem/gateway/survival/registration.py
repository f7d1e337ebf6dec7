"""A replica's entries in the store: that it lives, and what its engine requests are called.

- `gateways/<replica>` expires unless it is renewed: that is the replica's lease on all of its rooms. One that stops
  takes no new requests and is no gateway any more; until its last request has ended its lease is
  `leaving/<incarnation>`.
- `incarnations/<incarnation>` stays until somebody has seen to it that nothing of this run is left on any engine: the
  replica itself when it has stopped, another one when it is dead (`reaper.py`).
- `reaped/<incarnation>` says that another one took it for dead.

The lease is written before the incarnation: an incarnation without a lease is that of a dead one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import msgspec

from tandem.core.types import GatewayReplica
from tandem.state import Store, StoreError

log = logging.getLogger(__name__)

REGISTRATION_S = 10.0
"""A replica that does not renew its entry in the store for so long is taken for dead."""


class Registration:
    """Belongs to the event loop of its store."""

    def __init__(self, store: Store, record: GatewayReplica, *, lease_s: float = REGISTRATION_S) -> None:
        self._store = store
        self._record = record
        self._lease_s = lease_s
        self._loop = asyncio.get_running_loop()
        self._steady_at = 0.0
        self._known = False
        self._whole = False
        """Both entries are written. One without the other is renewed in vain: the replica would never be reaped."""
        self._leaving = False

    @property
    def steady_at(self) -> float:
        """Before this time, on the loop's clock, entries may be missing because the store was away, and not their
        replicas."""
        return self._steady_at

    async def keep(self, registered: Callable[[], object]) -> None:
        """Renew the entry for ever; `registered` is called when that was tried for the first time."""
        while True:
            try:
                await self._renew()
            except StoreError as error:
                # Requests go on without the store; the entry is made again when it is back.
                log.warning("could not renew the gateway's registration: %s", error)
                # The others could not either, and need as long as this one to be there again.
                self._steady_at = self._loop.time() + 1.5 * self._lease_s
            registered()
            await asyncio.sleep(self._lease_s / 3)

    async def retire(self) -> None:
        """It takes no new requests; those that it has go on, and so does its lease."""
        self._leaving = True
        try:
            await self._store.put(self._lease, b"", ttl=self._lease_s)
            await self._store.delete(f"gateways/{self._record.replica}")
        except StoreError as error:
            log.warning("could not remove the gateway's registration, it expires by itself: %s", error)

    async def leave(self) -> None:
        """It has stopped, and left nothing behind."""
        try:
            await self._store.delete(f"incarnations/{self._record.incarnation}")
            await self._store.delete(f"leaving/{self._record.incarnation}")
            await self._store.delete(f"gateways/{self._record.replica}")
        except StoreError as error:
            log.warning("could not remove the gateway's registration, it expires by itself: %s", error)

    @property
    def _lease(self) -> str:
        return f"leaving/{self._record.incarnation}" if self._leaving else f"gateways/{self._record.replica}"

    async def _renew(self) -> None:
        record = self._record
        there = await self._store.touch(self._lease, self._lease_s)
        if there and self._whole:
            return
        self._whole = False
        lease = b"" if self._leaving else msgspec.json.encode(record)
        await self._store.put(self._lease, lease, ttl=self._lease_s)
        await self._store.put(f"incarnations/{record.incarnation}", record.replica.encode())
        self._whole = True
        if self._known and not there:
            # The store came back empty, or this process stood still for longer than its lease.
            log.warning("the gateway's registration had expired; it is there again")
        if await self._store.delete(f"reaped/{record.incarnation}"):
            log.warning(
                "another gateway took this one for dead and had its engine requests aborted; they go on by "
                "migration. Was the process stopped, or cut off from the store?"
            )
        self._known = True
