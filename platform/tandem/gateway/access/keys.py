"""API keys: how they are made, how they are kept (hashed, in the fleet's store), and who has which.

A key is `tdm-<id>-<secret>`, in small letters and digits: the id names its record in the store, `keys/<id>`, and may
be shown; the secret is 256 random bits. The fixed form lets secret scanners find a key that has leaked
(`KEY_PATTERN`).

The record has the SHA-256 of the whole key. A slow hash such as bcrypt protects what people choose, because that can
be guessed; nobody guesses 256 random bits, however fast the hash, and a slow one would cost each request more than
the rest of the gateway.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import re
import secrets
from enum import Enum

import msgspec

from tandem.state import Change, Entry, Store, StoreError
from tandem.state.watch import wait_for_event

log = logging.getLogger(__name__)

PREFIX = "tdm-"
KEYS = "keys/"
"""Folder of the records in the store."""
KEY_PATTERN = re.compile(rb"tdm-([a-z2-7]{8})-[a-z2-7]{52}")
KEY_ID = re.compile(r"[a-z2-7]{8}")
KEPT_S = 90 * 86400.0
"""A record outlives its key by so long, for who looks back; then the store forgets it."""
_ID_BYTES = 5
_SECRET_BYTES = 32
_RELIST_S = 0.25


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the store has of a key. Times are Unix seconds."""

    id: str
    tenant: str
    hash: str
    """SHA-256 of the key, in hex."""
    created: float
    expires: float | None = None
    revoked: float | None = None
    comment: str = ""


class KeyFault(Enum):
    """Why a key is not accepted. That it was revoked or has expired is told only to who has the whole key."""

    UNKNOWN = "is not known"
    REVOKED = "was revoked"
    EXPIRED = "has expired"


def mint(tenant: str, *, now: float, lives_s: float | None = None, comment: str = "") -> tuple[KeyRecord, str]:
    """Make a key: its record, and the key itself, which exists nowhere else. `lives_s`: None = for ever."""
    name, secret = _letters(_ID_BYTES), _letters(_SECRET_BYTES)
    key = f"{PREFIX}{name}-{secret}"
    expires = None if lives_s is None else now + lives_s
    record = KeyRecord(id=name, tenant=tenant, hash=_hash(key.encode()), created=now, expires=expires, comment=comment)
    return record, key


async def keep(store: Store, record: KeyRecord) -> bool:
    """Write a new record; False = its id is taken, so that another key must be made. Raises StoreError."""
    return await store.compare_and_set(KEYS + record.id, _encode(record), version=0, ttl=_life(record)) is not None


async def revoke(store: Store, name: str, *, now: float) -> KeyRecord | None:
    """End the key with the id `name` in every replica; None = there is no such key. Raises StoreError."""
    while (entry := await store.get(KEYS + name)) is not None:
        record = _decode(entry.key, entry.value)
        if record is None:
            await store.delete(entry.key)
            return None
        if record.revoked is not None:
            return record
        record = msgspec.structs.replace(record, revoked=now)
        if await store.compare_and_set(entry.key, _encode(record), version=entry.version, ttl=KEPT_S) is not None:
            return record
    return None


async def read_keys(store: Store) -> list[KeyRecord]:
    """Every record, oldest first. Raises StoreError."""
    found = [_decode(entry.key, entry.value) for entry in await store.list(KEYS)]
    return sorted((record for record in found if record is not None), key=lambda record: record.created)


class KeyRing:
    """The keys as this replica knows them: a watch of the store fills it, a request only looks.

    Run `follow`, and wait for `loaded`. When the store is away, the keys known by then keep their meaning; when it is
    back, the watch tells what changed.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._records: dict[bytes, KeyRecord] = {}
        self._hashes: dict[bytes, bytes] = {}
        self._versions: dict[str, int] = {}
        self._news = asyncio.Event()

    def __len__(self) -> int:
        return len(self._records)

    async def follow(self) -> None:
        """Follow every change until the store is closed; outages are the watch's own affair."""
        async for change in self._store.watch(KEYS):
            self._take(change)
            self._news.set()

    async def loaded(self, within: float = 10.0) -> None:
        """Return when `follow` has seen every key that there is now. Raises StoreError, after `within` seconds too.

        The watch alone fills the ring: of a key that was listed first and deleted before the watch began, no one would
        ever tell.
        """
        try:
            async with asyncio.timeout(within):
                while not self._has_seen(await self._store.list(KEYS)):
                    self._news.clear()
                    await wait_for_event(self._news, _RELIST_S)
        except TimeoutError:
            raise StoreError(f"The API keys could not be read from the store within {within:g} s.") from None

    def check(self, key: bytes, *, now: float) -> KeyRecord | KeyFault:
        """Whose key this is. `now` in Unix seconds.

        One hash and one look-up, about a microsecond: there is no cache of accepted keys that could outlive a
        revocation. The id is no secret, so that only the hashes are compared in constant time.
        """
        name = key[4:12]
        known = self._hashes.get(name)
        if known is None or not hmac.compare_digest(hashlib.sha256(key).digest(), known):
            return KeyFault.UNKNOWN
        record = self._records[name]
        if record.revoked is not None:
            return KeyFault.REVOKED
        if record.expires is not None and record.expires <= now:
            return KeyFault.EXPIRED
        return record

    def _has_seen(self, entries: list[Entry]) -> bool:
        return all(self._versions.get(entry.key, 0) >= entry.version for entry in entries)

    def _take(self, change: Change) -> None:
        name = change.key.removeprefix(KEYS).encode()
        record = None
        if change.value is None:
            self._versions.pop(change.key, None)
        else:
            self._versions[change.key] = change.version
            record = _decode(change.key, change.value)
        if record is None:
            self._records.pop(name, None)
            self._hashes.pop(name, None)
        else:
            self._records[name] = record
            self._hashes[name] = bytes.fromhex(record.hash)


def _letters(count: int) -> str:
    return base64.b32encode(secrets.token_bytes(count)).decode().rstrip("=").lower()


def _hash(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


def _life(record: KeyRecord) -> float | None:
    return None if record.expires is None else record.expires - record.created + KEPT_S


def _encode(record: KeyRecord) -> bytes:
    return msgspec.json.encode(record)


def _decode(key: str, value: bytes) -> KeyRecord | None:
    try:
        record = msgspec.json.decode(value, type=KeyRecord)
        bytes.fromhex(record.hash)
    except (msgspec.MsgspecError, ValueError) as error:
        # One bad entry must not lock everybody out; what can't be read opens nothing.
        log.error("ignored the key %r of the store, which is no record of an API key: %s", key, error)
        return None
    return record
