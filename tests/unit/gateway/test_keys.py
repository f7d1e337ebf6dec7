"""API keys: their form, what the store has of them, and what a ring of them says."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from tandem.gateway.access.keys import KEY_PATTERN, KEYS, KeyFault, KeyRecord, KeyRing, keep, mint, read_keys, revoke
from tandem.state import Store, StoreError, open_store


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await open_store("embedded", fleet="t", folder=tmp_path)
    yield opened
    await opened.close()


@contextlib.asynccontextmanager
async def following(store: Store) -> AsyncIterator[KeyRing]:
    ring = KeyRing(store)
    task = asyncio.create_task(ring.follow())
    await ring.loaded()
    yield ring
    task.cancel()
    await asyncio.wait([task])


@pytest.fixture
async def ring(store: Store) -> AsyncIterator[KeyRing]:
    """A ring that follows the store."""
    async with following(store) as made:
        yield made


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.001)


async def new_key(store: Store, tenant: str = "acme", lives_s: float | None = None) -> tuple[KeyRecord, bytes]:
    record, key = mint(tenant, now=1000.0, lives_s=lives_s)
    assert await keep(store, record)
    return record, key.encode()


def test_a_key_has_the_form_that_scanners_look_for_and_its_id_in_it() -> None:
    record, key = mint("acme", now=0.0)
    form = KEY_PATTERN.fullmatch(key.encode())
    assert form
    assert form[1].decode() == record.id


def test_a_key_has_256_random_bits_and_no_two_are_alike() -> None:
    secrets = {mint("acme", now=0.0)[1].rpartition("-")[2] for _ in range(100)}
    assert len(secrets) == 100
    assert all(len(secret) * 5 >= 256 for secret in secrets)


def test_a_record_has_the_hash_of_the_key_and_nothing_of_its_secret() -> None:
    record, key = mint("acme", now=0.0, comment="ci")
    kept = msgspec.json.encode(record).decode() + repr(record)
    secret = key.rpartition("-")[2]
    assert record.hash == hashlib.sha256(key.encode()).hexdigest()
    assert not any(secret[start : start + 8] in kept for start in range(len(secret) - 8))


async def test_a_new_key_opens_in_a_ring_that_follows(store: Store, ring: KeyRing) -> None:
    record, key = await new_key(store)
    await until(lambda: len(ring) == 1)
    assert ring.check(key, now=2000.0) == record


async def test_a_key_made_before_the_ring_opens_as_soon_as_it_has_loaded(store: Store) -> None:
    record, key = await new_key(store)
    async with following(store) as ring:
        assert ring.check(key, now=2000.0) == record


async def test_a_ring_that_cannot_load_says_so_in_time(store: Store) -> None:
    await new_key(store)
    with pytest.raises(StoreError, match=r"within 0\.05 s"):
        await KeyRing(store).loaded(within=0.05)


async def test_a_broken_record_does_not_keep_a_ring_from_loading(store: Store) -> None:
    await store.put(f"{KEYS}aaaaaaaa", b"{}")
    async with following(store) as ring:
        assert len(ring) == 0


async def test_a_revoked_key_opens_nothing_and_its_record_says_when(store: Store, ring: KeyRing) -> None:
    record, key = await new_key(store)
    await until(lambda: len(ring) == 1)
    await revoke(store, record.id, now=3000.0)
    await until(lambda: ring.check(key, now=2000.0) is KeyFault.REVOKED)
    assert [kept.revoked for kept in await read_keys(store)] == [3000.0]


async def test_revoking_again_keeps_the_first_time(store: Store) -> None:
    record, _ = await new_key(store)
    await revoke(store, record.id, now=3000.0)
    again = await revoke(store, record.id, now=4000.0)
    assert again is not None
    assert again.revoked == 3000.0


async def test_there_is_nothing_to_revoke_under_an_unknown_id(store: Store) -> None:
    assert await revoke(store, "aaaaaaaa", now=1.0) is None


async def test_a_key_opens_until_it_expires_and_not_a_moment_longer(store: Store, ring: KeyRing) -> None:
    record, key = await new_key(store, lives_s=60.0)
    await until(lambda: len(ring) == 1)
    assert ring.check(key, now=1059.9) == record
    assert ring.check(key, now=1060.0) is KeyFault.EXPIRED


async def test_the_right_id_with_a_wrong_secret_is_an_unknown_key(store: Store, ring: KeyRing) -> None:
    record, _ = await new_key(store)
    await until(lambda: len(ring) == 1)
    forged = f"tdm-{record.id}-{'a' * 52}".encode()
    assert ring.check(forged, now=2000.0) is KeyFault.UNKNOWN


async def test_a_wrong_secret_is_not_told_that_the_key_was_revoked(store: Store, ring: KeyRing) -> None:
    record, _ = await new_key(store)
    await revoke(store, record.id, now=1500.0)
    await until(lambda: len(ring) == 1)
    assert ring.check(f"tdm-{record.id}-{'a' * 52}".encode(), now=2000.0) is KeyFault.UNKNOWN


async def test_a_deleted_record_opens_nothing(store: Store, ring: KeyRing) -> None:
    record, key = await new_key(store)
    await until(lambda: len(ring) == 1)
    await store.delete(KEYS + record.id)
    await until(lambda: ring.check(key, now=2000.0) is KeyFault.UNKNOWN)


@pytest.mark.parametrize("end", ["revoked", "expired"])
async def test_the_record_of_a_key_that_ended_is_kept_for_a_while_only(
    store: Store, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr("tandem.gateway.access.keys.KEPT_S", 0.05)
    record, _ = await new_key(store, lives_s=0.001 if end == "expired" else None)
    if end == "revoked":
        await revoke(store, record.id, now=3000.0)
    async with asyncio.timeout(10):
        while await store.get(KEYS + record.id) is not None:
            await asyncio.sleep(0.001)


async def test_an_id_that_is_taken_is_not_given_twice(store: Store) -> None:
    record, _ = await new_key(store)
    other = msgspec.structs.replace(mint("beta", now=0.0)[0], id=record.id)
    assert not await keep(store, other)
    assert [kept.tenant for kept in await read_keys(store)] == ["acme"]


@pytest.mark.parametrize("rubbish", [b"\xff\xfe", b"{}", b'{"id":"a","tenant":"acme","hash":"zz","created":0}'])
async def test_one_broken_record_locks_nobody_else_out(
    store: Store, ring: KeyRing, rubbish: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    await store.put(f"{KEYS}aaaaaaaa", rubbish)
    record, key = await new_key(store)
    await until(lambda: len(ring) == 1)
    assert ring.check(key, now=2000.0) == record
    assert "ignored the key 'keys/aaaaaaaa'" in caplog.text


async def test_a_record_copied_to_another_name_opens_nothing(store: Store, ring: KeyRing) -> None:
    record, key = await new_key(store)
    await store.put(f"{KEYS}aaaaaaaa", msgspec.json.encode(record))
    await until(lambda: len(ring) == 2)
    copied = re.sub(rb"^tdm-.{8}", b"tdm-aaaaaaaa", key)
    assert ring.check(copied, now=2000.0) is KeyFault.UNKNOWN
