"""The store: the only thing that gateway, controller and CLI share.

A small key-value store with versions, expiry and watches. Each fleet has its own: the same key in two fleets is two
keys. Versions come from one counter per store, so they rise with every change and never come back, also not when a
key is deleted and made again.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

_FLEET = re.compile(r"[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?")
_KEY_LIMIT = 512


class StoreError(Exception):
    """The store cannot be reached, did not answer in time or cannot be used; the message says what to do.

    A write that ends so may have been made or not.
    """


class StoreLostError(StoreError):
    """The store answers, but it has lost what it held; whoever keeps it (`Store.keep`) is about to put it back."""


KEPT = ("control", "desired/", "epochs/", "fleet", "groups/", "keys/", "refresh")
"""What a fleet must not lose with its store, as prefixes. Leases, and what they are for, are made again by their
owners: put back without them, a living gateway would be taken for dead."""


class Entry(NamedTuple):
    """A key that is there."""

    key: str
    value: bytes
    version: int


class Change(NamedTuple):
    """What happened to a key. `value` is None when it was deleted or has expired."""

    key: str
    value: bytes | None
    version: int


class Store(Protocol):
    """State that several processes share. Keys are 1 to 512 printable characters, by custom `folder/name`.

    Every call has the deadline given to `open_store` and raises `StoreError` when it passes. A store belongs to the
    event loop that opened it: another loop or thread opens its own.

    Emptiness is not believed at once: a store that comes back without what it held raises `StoreLostError`, for its
    watches is an outage, and takes no writes, until someone has put it back, or until half a minute has passed in which
    it answered and nobody did. Who keeps something himself (`keep`) waits until it is put back, however long.
    """

    async def get(self, key: str) -> Entry | None:
        """Return what is there now, None if nothing is."""

    async def put(self, key: str, value: bytes, *, ttl: float | None = None) -> int:
        """Write whatever was there before; return the new version. `ttl`: seconds to live, None = for ever."""

    async def compare_and_set(
        self, key: str, value: bytes | None, *, version: int, ttl: float | None = None
    ) -> int | None:
        """Write if the key is still at `version` (0 = is not there); `value` None deletes.

        Returns the new version (0 after a deletion), None on a conflict, which changes nothing.
        """

    async def delete(self, key: str) -> bool:
        """Delete; return whether there was something."""

    async def list(self, prefix: str) -> builtins.list[Entry]:
        """Return all entries whose key starts with `prefix`, as of one moment, in the order of their keys."""

    async def touch(self, key: str, ttl: float) -> bool:
        """Let the key live for `ttl` seconds from now; return False if it is not there. This is not a change.

        Readers honour a shorter life at once; a watch may report its end up to two seconds late.
        """

    def watch(self, prefix: str) -> AsyncIterator[Change]:
        """Iterate over every entry under `prefix`, then over every change, in the order of their versions.

        It outlives an outage of the store: it logs it, keeps trying, and then reports what differs, so nothing that
        counts is lost. A key that changed twice meanwhile is reported once, and a deletion bears the store's revision
        at the time it was noticed. The same goes for one that fell a thousand changes behind. It ends when the store
        is closed.
        """

    async def keep(self, prefixes: Sequence[str] = KEPT) -> None:
        """Remember what is under the prefixes, and put it back when the store has lost it. Returns when it is closed.

        Any number of processes may do this at once, all with the same prefixes; who has seen more puts right what
        another one put back. What is put back lives for ever, whatever its `ttl` was.
        """

    async def revision(self) -> int:
        """Return the version of the latest change of any key; 0 in an empty store."""

    async def close(self) -> None:
        """End the watches and let go of file or connection. No call may follow."""


async def open_store(url: str, *, fleet: str, folder: Path, deadline: float = 5.0) -> Store:
    """Open the store that `url` (as in `config.StateConfig`) names.

    `folder` is where the embedded store's file lives; `embedded:/some/folder` names another one. `deadline` (seconds)
    holds for this call and for each later one. Raises `StoreError`.
    """
    if not _FLEET.fullmatch(fleet):
        raise StoreError(f"{fleet!r} cannot name a fleet: use up to 32 small letters, digits and inner hyphens.")
    if url == "embedded" or url.startswith("embedded:"):
        from tandem.state.embedded import EmbeddedStore

        named = url.removeprefix("embedded").removeprefix(":")
        return await EmbeddedStore.open((Path(named) if named else folder) / f"{fleet}.state.db", deadline=deadline)
    if url.startswith(("redis://", "rediss://", "unix://")):
        from tandem.state.redis import RedisStore

        return await RedisStore.open(url, fleet=fleet, deadline=deadline)
    # The URL may hold a password, so it is not repeated.
    raise StoreError('state.url is neither "embedded" nor a redis://, rediss:// or unix:// URL.')


def check_key(key: str) -> str:
    """Return `key`; raise ValueError if no store can hold it."""
    if 0 < len(key) <= _KEY_LIMIT and key.isprintable():
        return key
    raise ValueError(f"a key has 1 to {_KEY_LIMIT} printable characters, this one is {key[:80]!r}")


def check_ttl(ttl: float | None) -> float | None:
    """Return `ttl`; raise ValueError if nothing could live that long (or short)."""
    if ttl is None or 0 < ttl < 1e9:
        return ttl
    raise ValueError(f"a ttl is more than 0 and less than 1e9 seconds, this one is {ttl!r}")
