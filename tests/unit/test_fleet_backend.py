"""What may be asked of a fleet, and what is noted of it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from tandem.core.group_events import Service
from tandem.core.types import Group, GroupSpec, GroupState, Role
from tandem.engine.launch import RankEndpoints
from tandem.fleet.backend import StoreBackend
from tandem.fleet.control_service import Refused, UnknownGroup
from tandem.fleet.engines import Command, NoEngineError
from tandem.state import Store, open_store

SPEC = GroupSpec(group="decode-0", role=Role.DECODE, nodes=2)


class SmallEngines:
    """`Engines` that know groups of up to four nodes."""

    def bundle(self, spec: GroupSpec) -> Mapping[str, float]:
        return {}

    def check(self, spec: GroupSpec) -> None:
        if spec.nodes > 4:
            raise NoEngineError("4 nodes are the most")

    def command(self, spec: GroupSpec, rank: int, endpoints: RankEndpoints) -> Command:
        raise NotImplementedError

    def service(self, spec: GroupSpec, leader: RankEndpoints) -> Service:
        raise NotImplementedError


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store("embedded", fleet="test", folder=tmp_path)
    yield store
    await store.close()


@pytest.fixture
def backend(store: Store) -> StoreBackend:
    return StoreBackend(store, SmallEngines(), drain_s=60)


async def wish(store: Store) -> GroupSpec | None:
    entry = await store.get("desired/decode-0")
    return msgspec.json.decode(entry.value, type=GroupSpec) if entry else None


async def test_a_wish_is_noted_and_repeating_it_changes_nothing(backend: StoreBackend, store: Store) -> None:
    assert await backend.put_group(SPEC) == await wish(store) == SPEC
    revision = await store.revision()
    await backend.put_group(SPEC)
    assert await store.revision() == revision


async def test_a_group_that_no_engine_can_run_is_refused(backend: StoreBackend, store: Store) -> None:
    with pytest.raises(Refused, match="4 nodes are the most"):
        await backend.put_group(replace(SPEC, nodes=8))
    assert await wish(store) is None


async def test_a_groups_role_is_fixed(backend: StoreBackend) -> None:
    await backend.put_group(SPEC)
    with pytest.raises(Refused, match="decode-0 is a decode group"):
        await backend.put_group(replace(SPEC, role=Role.PREFILL))


async def test_a_cordon_changes_nothing_else(backend: StoreBackend) -> None:
    await backend.put_group(SPEC)
    assert await backend.cordon("decode-0", True) == replace(SPEC, cordoned=True)
    assert await backend.cordon("decode-0", False) == SPEC


async def test_a_drain_has_a_deadline_the_fleets_own_if_none_is_given(backend: StoreBackend) -> None:
    await backend.put_group(SPEC)
    before = time.time()
    assert before + 60 <= (await backend.drain("decode-0", None)).drain_deadline <= time.time() + 60
    assert before + 5 <= (await backend.drain("decode-0", 5)).drain_deadline <= time.time() + 5


async def test_a_draining_group_is_not_changed(backend: StoreBackend) -> None:
    await backend.put_group(SPEC)
    await backend.drain("decode-0", 5)
    with pytest.raises(Refused, match="is draining"):
        await backend.put_group(SPEC)
    with pytest.raises(Refused, match="is draining"):
        await backend.cordon("decode-0", False)


async def test_a_removed_wish_is_gone(backend: StoreBackend, store: Store) -> None:
    await backend.put_group(SPEC)
    await backend.remove("decode-0")
    assert await wish(store) is None


@pytest.mark.parametrize("ask", ["cordon", "drain", "remove", "load"])
async def test_an_unknown_group_is_named(backend: StoreBackend, ask: str) -> None:
    asked = {
        "cordon": backend.cordon("decode-9", True),
        "drain": backend.drain("decode-9", None),
        "remove": backend.remove("decode-9"),
        "load": backend.load("decode-9"),
    }
    for name, call in asked.items():
        if name != ask:
            call.close()
    with pytest.raises(UnknownGroup, match="no group 'decode-9'"):
        await asked[ask]


async def test_a_group_that_cannot_be_reached_has_no_load(backend: StoreBackend, store: Store) -> None:
    group = Group(group="decode-0", role=Role.DECODE, epoch=1, state=GroupState.STARTING)
    await store.put("groups/decode-0", msgspec.json.encode(group))
    with pytest.raises(Refused, match="decode-0 is starting and has no load to tell"):
        await backend.load("decode-0")
    assert await backend.load(None) == {}
