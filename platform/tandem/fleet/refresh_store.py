"""The refresh in the store: what is asked for and how far it is, under one key."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from tandem.core.refresh import Refresh
from tandem.state import Store, StoreError

REFRESH_KEY = "refresh"
_TRIES = 20


async def read_refresh(store: Store) -> Refresh | None:
    """The last refresh; None if there was none. Raises StoreError."""
    entry = await store.get(REFRESH_KEY)
    return msgspec.json.decode(entry.value, type=Refresh) if entry else None


async def change_refresh(store: Store, change: Callable[[Refresh], Refresh]) -> Refresh:
    """Replace the refresh by what `change` makes of it, however many others write it too; return what is there then.

    Raises StoreError, also when there is none.
    """
    for _ in range(_TRIES):
        entry = await store.get(REFRESH_KEY)
        if entry is None:
            break
        now = msgspec.json.decode(entry.value, type=Refresh)
        wanted = change(now)
        if wanted == now:
            return now
        if await store.compare_and_set(REFRESH_KEY, msgspec.json.encode(wanted), version=entry.version) is not None:
            return wanted
    raise StoreError("the refresh in the store is gone, or changed by others all the time")
