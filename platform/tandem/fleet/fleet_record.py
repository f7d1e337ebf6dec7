"""The fleet's record in the store, read and changed by several, whatever else stands beside its fields."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from tandem.fleet.snapshot import FLEET_KEY, FleetRecord
from tandem.state import Store, StoreError

_TRIES = 20


async def read_record(store: Store) -> FleetRecord:
    """The record; one without a name if there is none. Raises StoreError."""
    entry = await store.get(FLEET_KEY)
    return msgspec.json.decode(entry.value, type=FleetRecord) if entry else FleetRecord(name="")


async def change_record(store: Store, change: Callable[[FleetRecord], FleetRecord]) -> FleetRecord:
    """Replace the record by what `change` makes of it, however many others write it too; return what is there then.

    Raises StoreError.
    """
    for _ in range(_TRIES):
        entry = await store.get(FLEET_KEY)
        beside: dict[str, Any] = msgspec.json.decode(entry.value) if entry else {}
        now = msgspec.convert(beside, FleetRecord) if entry else FleetRecord(name="")
        wanted = change(now)
        if wanted == now:
            return now
        value = msgspec.json.encode({**beside, **msgspec.structs.asdict(wanted)})
        if await store.compare_and_set(FLEET_KEY, value, version=entry.version if entry else 0) is not None:
            return wanted
    raise StoreError("the fleet's record in the store is changed by others all the time")
