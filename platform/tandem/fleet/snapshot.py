"""The fleet as the store has it: read once, or followed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import TypeVar

import msgspec

from tandem.core.declared import Replaced
from tandem.core.refresh import OVER, Refresh
from tandem.core.traffic import TRAFFIC, TrafficReport
from tandem.core.types import FleetSnapshot, GatewayReplica, Group, GroupSpec, PoolPlan
from tandem.fleet.refresh_store import REFRESH_KEY
from tandem.state import Entry, Store, StoreError

FLEET_KEY = "fleet"
"""Holds a `FleetRecord`, written by the controller."""
GROUPS, DESIRED, GATEWAYS = "groups/", "desired/", "gateways/"
PLANS = "planning/"
"""A `PoolPlan` for each pool whose size follows the load, by its role; the controller writes them (`autoscale.py`)."""
_RETRY_S = 0.5

_Struct = TypeVar("_Struct", bound=msgspec.Struct)


class FleetRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What the whole fleet has in common. The store holds it under `fleet`; other fields may stand beside these."""

    name: str
    model_path: str = ""
    """Folder of the weights that it has, and that a new group has which declares none."""
    model_name: str = ""
    model_version: str = ""
    """Of these weights."""
    declared_path: str = ""
    declared_version: str = ""
    """What all groups declared when they last declared the same, as in `GroupSpec`; there may be none now."""
    replaced: tuple[Replaced, ...] = ()
    """Declared weights that stand for others."""


class StateFormatError(ValueError):
    """A key in the store holds something else than this version of Tandem expects."""


async def read_snapshot(store: Store) -> FleetSnapshot:
    """Return the fleet as of one moment. Raises `StoreError` and `StateFormatError`."""
    revision = await store.revision()  # before the listing, which thereby holds at least this
    entries = await store.list("")
    record = next((_decode(entry, FleetRecord) for entry in entries if entry.key == FLEET_KEY), FleetRecord(name=""))
    refresh = next((_decode(entry, Refresh) for entry in entries if entry.key == REFRESH_KEY), None)
    return FleetSnapshot(
        name=record.name,
        model_path=record.model_path,
        model_name=record.model_name,
        model_version=record.model_version,
        groups=_under(GROUPS, entries, Group),
        desired=_under(DESIRED, entries, GroupSpec),
        gateways=_under(GATEWAYS, entries, GatewayReplica),
        revision=revision,
        plans=_under(PLANS, entries, PoolPlan),
        refreshing=refresh.target.version if refresh is not None and refresh.phase not in OVER else "",
    )


async def read_traffic(store: Store) -> tuple[TrafficReport, ...]:
    """Return what the gateway replicas have counted. Raises `StoreError` and `StateFormatError`."""
    return _under(TRAFFIC, await store.list(TRAFFIC), TrafficReport)


async def watch_snapshots(store: Store) -> AsyncGenerator[FleetSnapshot, None]:
    """Yield the fleet now and whenever it is different, with rising revisions; changes in a row may come as one.

    Outlives an outage of the store and ends when that is closed. Raises `StateFormatError`.
    """
    changed = asyncio.Event()
    listener = asyncio.create_task(_listen(store, changed), name="tandem-snapshot-listener")
    last: FleetSnapshot | None = None
    try:
        while not listener.done():
            changed.clear()
            try:
                snapshot = await read_snapshot(store)
            except StoreError:  # the store's own watch has logged it
                await asyncio.wait([listener], timeout=_RETRY_S)
                continue
            if last is None or msgspec.structs.replace(snapshot, revision=last.revision) != last:
                last = snapshot
                yield snapshot
            await changed.wait()
        listener.result()
    finally:
        listener.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listener


async def _listen(store: Store, changed: asyncio.Event) -> None:
    try:
        async for change in store.watch(""):
            if change.key in (FLEET_KEY, REFRESH_KEY) or change.key.startswith((GROUPS, DESIRED, GATEWAYS, PLANS)):
                changed.set()
    finally:
        changed.set()


def _under(prefix: str, entries: list[Entry], kind: type[_Struct]) -> tuple[_Struct, ...]:
    return tuple(_decode(entry, kind) for entry in entries if entry.key.startswith(prefix))


def _decode(entry: Entry, kind: type[_Struct]) -> _Struct:
    try:
        return msgspec.json.decode(entry.value, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = f"is not a {kind.__name__}: {error}. Was it written by another version of Tandem?"
        raise StateFormatError(f"The key {entry.key!r} in the fleet's store {reason}") from error
