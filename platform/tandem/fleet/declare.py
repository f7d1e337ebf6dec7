"""Which weights a group is given that declares some: itself, or what was put in their place (`core/declared.py`)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from msgspec.structs import replace

from tandem.core.declared import (
    declarations,
    known_weights,
    stands_for,
    taken_version,
    version_of,
    with_replaced,
)
from tandem.core.group_record import Weights
from tandem.core.refresh import OVER, Refresh
from tandem.core.types import FleetSnapshot
from tandem.fleet.control_service import Refused
from tandem.fleet.engines import Engines, NoEngineError
from tandem.fleet.fleet_record import change_record, read_record
from tandem.fleet.refresh_store import read_refresh
from tandem.fleet.snapshot import FleetRecord, read_snapshot
from tandem.fleet.weights import PROMPT
from tandem.state import Store


class Declarations:
    """What is declared in a fleet, and what it stands for."""

    def __init__(self, store: Store, engines: Engines) -> None:
        self._store = store
        self._engines = engines

    async def admit(self, declared: Weights) -> Weights:
        """The weights that a new group which declares these is given. Raises StoreError, and Refused where there cannot
        be one."""
        fleet, record = await read_snapshot(self._store), await read_record(self._store)
        own = Weights(record.model_path, record.model_version)
        weights = stands_for(declared, record.replaced)
        if weights == declared and declared != own and _is_first(declared, own, fleet, record):
            weights = own
        refresh = await read_refresh(self._store)
        if refresh is not None and refresh.phase not in OVER and weights not in _of(refresh):
            raise Refused(
                f"A refresh to version {refresh.version} goes on: groups that have other weights wait for its end."
            )
        if weights != declared:
            await self._note([declared], weights)
            return weights
        known = known_weights(own, record.replaced, fleet.desired, fleet.groups)
        if weights not in known:
            await self._check(weights, known)
        return weights

    async def learn(self, declared: Weights, weights: Weights) -> None:
        """A group that has `weights` and declared none does so now; further groups that do get the same. Raises
        StoreError."""
        refresh, record = await read_refresh(self._store), await read_record(self._store)
        own = Weights(record.model_path, record.model_version)
        # While a refresh goes on it may not keep what it was told to take; after one that failed, others have others.
        if weights == own and (refresh is None or refresh.phase in OVER):
            await self._note([declared], weights)

    async def settle(self) -> None:
        """Where all groups that stay declare the same, that is what the fleet has from now on. Raises StoreError."""
        refresh = await read_refresh(self._store)
        found = declarations((await read_snapshot(self._store)).desired)
        if len(found) != 1 or (refresh is not None and refresh.phase not in OVER):
            return
        (declared,) = found

        def change(record: FleetRecord) -> FleetRecord:
            path, version = stands_for(declared, record.replaced)
            return replace(
                record,
                model_path=path or record.model_path,
                model_version=version,
                declared_path=declared.path,
                declared_version=declared.version,
            )

        await change_record(self._store, change)

    async def _note(self, declared: Iterable[Weights], weights: Weights) -> None:
        await change_record(
            self._store,
            lambda record: replace(record, replaced=with_replaced(record.replaced, declared, weights)),
        )

    async def _check(self, weights: Weights, known: Iterable[Weights]) -> None:
        if not weights.path:
            raise Refused("No path is named, and the fleet began with another model than that of no path: name a path.")
        if taken := taken_version(weights, known):
            other = f"give those in {weights.path} another one"
            raise Refused(f"Version {weights.version} is that of the weights in {taken}; {other}.")
        try:
            await asyncio.to_thread(self._engines.check_weights, weights.path)
            await asyncio.to_thread(self._engines.encode, weights.path, PROMPT)
        except NoEngineError as error:
            raise Refused(f"The weights in {weights.path} cannot be taken: {error}.") from error


def _is_first(declared: Weights, own: Weights, fleet: FleetSnapshot, record: FleetRecord) -> bool:
    """Whether it is but another name of the weights that the fleet has: what it began with has no path; and one that
    began before versions were made of paths has another version of the same."""
    if declared.path:
        return declared.path == own.path and declared.version == version_of(own.path)
    return not declarations(fleet.desired) and not record.declared_version and not record.replaced


def _of(refresh: Refresh) -> tuple[Weights, Weights]:
    return Weights(refresh.path, refresh.version), Weights(refresh.old_path, refresh.old_version)
