"""What may be asked of a fleet, and what is noted of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from tandem.core.group_check import CheckVerdict, GroupCheck
from tandem.core.group_events import Service
from tandem.core.refresh import Refresh, RefreshPhase
from tandem.core.types import FleetSnapshot, Group, GroupSpec, GroupState, Role
from tandem.engine.launch import RankEndpoints
from tandem.fleet import clock
from tandem.fleet.backend import StoreBackend, why_needed
from tandem.fleet.control_service import NoRefresh, Refused, UnknownGroup
from tandem.fleet.engines import Command, NoEngineError
from tandem.fleet.refresh_ask import RefreshAsk
from tandem.fleet.snapshot import FLEET_KEY, FleetRecord
from tandem.state import Store, open_store

SPEC = GroupSpec(group="decode-0", role=Role.DECODE, nodes=2)
ASK = RefreshAsk(path="/second", version="2")


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

    def folder(self, path: str) -> str:
        raise NotImplementedError

    def check_weights(self, path: str) -> None:
        if path == "/none":
            raise NoEngineError("the checkpoint in /none cannot be read")

    def encode(self, path: str, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, path: str, ids: Sequence[int]) -> str:
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
    before = clock.now()
    assert before + 60 <= (await backend.drain("decode-0", None)).drain_deadline <= clock.now() + 60
    assert before + 5 <= (await backend.drain("decode-0", 5)).drain_deadline <= clock.now() + 5


async def test_a_drain_does_not_end_early_although_the_machines_clock_is_an_hour_ahead(
    backend: StoreBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    await backend.put_group(SPEC)
    wall = time.time
    monkeypatch.setattr(time, "time", lambda: wall() + 3600)
    assert (await backend.drain("decode-0", 5)).drain_deadline <= clock.now() + 5


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


async def put_fleet(store: Store, prefill: int = 2, decode: int = 2) -> None:
    """A fleet that serves version 1, every group of it ready."""
    await store.put(FLEET_KEY, msgspec.json.encode(FleetRecord(name="test", model_path="/first", model_version="1")))
    for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
        for number in range(count):
            name = f"{role}-{number}"
            group = Group(group=name, role=role, epoch=1, state=GroupState.READY, weight_version="1")
            await store.put(f"groups/{name}", msgspec.json.encode(group))
            await store.put(f"desired/{name}", msgspec.json.encode(GroupSpec(group=name, role=role, nodes=1)))


async def test_the_last_ready_group_of_a_role_is_drained_only_by_force(backend: StoreBackend, store: Store) -> None:
    await put_fleet(store, decode=2)
    await backend.drain("decode-1", 5)
    with pytest.raises(Refused, match="decode-0 is the last decode group that is ready: "):
        await backend.drain("decode-0", 5)
    assert (await backend.drain("decode-0", 5, force=True)).draining


async def test_two_drains_at_once_leave_one_group(backend: StoreBackend, store: Store) -> None:
    await put_fleet(store, decode=2)
    drains = (backend.drain(f"decode-{number}", 5) for number in range(2))
    done = await asyncio.gather(*drains, return_exceptions=True)
    assert [isinstance(one, Refused) for one in done] == [False, True]


async def test_a_drain_may_be_repeated_although_it_leaves_one_group(backend: StoreBackend, store: Store) -> None:
    await put_fleet(store, decode=2)
    await backend.drain("decode-1", 5)
    assert (await backend.drain("decode-1", 50)).draining


def refreshing(**states: GroupState) -> FleetSnapshot:
    """In the middle of a refresh: prefill-0 and decode-0 have version 1, prefill-1 and decode-1 version 2."""
    groups, specs = [], []
    for role in Role:
        for number in range(2):
            name = f"{role}-{number}"
            state = states.get(f"{role}_{number}", GroupState.READY)
            groups.append(Group(group=name, role=role, epoch=1, state=state, weight_version=str(number + 1)))
            specs.append(GroupSpec(group=name, role=role, nodes=1))
    return FleetSnapshot(groups=tuple(groups), desired=tuple(specs))


def test_in_a_refresh_a_group_of_the_last_complete_pair_is_needed_although_another_is_ready() -> None:
    fleet = refreshing(prefill_1=GroupState.DRAINING)
    assert why_needed(fleet, "decode-0").startswith("decode-0 is the last ready decode group whose weight version (1)")
    assert why_needed(fleet, "decode-1") == ""
    assert why_needed(refreshing(), "decode-0") == ""


def test_a_group_that_leaves_makes_no_pair() -> None:
    fleet = refreshing()
    draining = tuple(replace(spec, draining=spec.group == "prefill-1") for spec in fleet.desired)
    removed = tuple(spec for spec in fleet.desired if spec.group != "prefill-1")
    assert "whose weight version (1)" in why_needed(replace(fleet, desired=draining), "decode-0")
    assert "whose weight version (1)" in why_needed(replace(fleet, desired=removed), "decode-0")


async def test_in_a_refresh_a_drain_of_the_last_complete_pair_is_refused_unless_it_is_forced(
    backend: StoreBackend, store: Store
) -> None:
    fleet = refreshing(prefill_1=GroupState.DRAINING)
    for group, spec in zip(fleet.groups, fleet.desired, strict=True):
        await store.put(f"groups/{group.group}", msgspec.json.encode(group))
        await store.put(f"desired/{group.group}", msgspec.json.encode(spec))
    with pytest.raises(Refused, match="wait until the refresh has gone on, or force it"):
        await backend.drain("decode-0", 5)
    assert (await backend.drain("decode-0", 5, force=True)).draining


async def test_a_drain_that_moves_streams_at_once_says_since_when(backend: StoreBackend) -> None:
    await backend.put_group(SPEC)
    assert (await backend.drain("decode-0", 5)).migrate_at == 0
    assert clock.now() - 5 < (await backend.drain("decode-0", 5, migrate=True)).migrate_at <= clock.now()


async def test_a_new_group_gets_the_weights_that_the_fleet_has_and_an_old_one_keeps_its_own(
    backend: StoreBackend, store: Store
) -> None:
    await put_fleet(store)
    await store.put("desired/decode-0", msgspec.json.encode(replace(SPEC, weights_path="/x", weight_version="9")))
    assert (await backend.put_group(replace(SPEC, nodes=3))).weight_version == "9"
    new = await backend.put_group(replace(SPEC, group="decode-7"))
    assert (new.weights_path, new.weight_version) == ("/first", "1")


async def test_a_refresh_is_noted_with_all_that_it_needs(backend: StoreBackend, store: Store) -> None:
    await put_fleet(store)
    with pytest.raises(NoRefresh):
        await backend.refresh_state()
    refresh = await backend.refresh(replace(ASK, canary="ab"))
    assert (refresh.old_path, refresh.old_version, refresh.prompt) == ("/first", "1", (97, 98))
    assert await backend.refresh_state() == refresh
    with pytest.raises(Refused, match="A refresh to version 2 goes on"):
        await backend.refresh(ASK)
    assert (await backend.stop_refresh()).stop


async def test_a_refresh_that_goes_back_may_be_stopped_too(backend: StoreBackend, store: Store) -> None:
    back = Refresh(path="/x", version="0", phase=RefreshPhase.ROLLING_BACK)
    await store.put("refresh", msgspec.json.encode(back))
    assert await backend.stop_refresh() == replace(back, stop=True)


async def test_another_refresh_may_follow_one_that_is_over(backend: StoreBackend, store: Store) -> None:
    await put_fleet(store)
    over = Refresh(path="/x", version="0", phase=RefreshPhase.DONE)
    await store.put("refresh", msgspec.json.encode(over))
    with pytest.raises(Refused, match="to version 0 is not running: it is done"):
        await backend.stop_refresh()
    assert (await backend.refresh(ASK)).version == "2"


@pytest.mark.parametrize(
    ("ask", "decode", "sentence"),
    [
        (replace(ASK, version="1"), 2, "Version 1 is what the fleet has already"),
        (replace(ASK, path="/none"), 2, "The weights cannot be taken: the checkpoint in /none cannot be read"),
        (ASK, 1, "Service would pause: only one decode group is ready"),
        (replace(ASK, canary="x" * 3000), 2, "The canary has 3000 tokens"),
    ],
)
async def test_a_refresh_that_could_not_work_is_refused_before_anything_drains(
    backend: StoreBackend, store: Store, ask: RefreshAsk, decode: int, sentence: str
) -> None:
    await put_fleet(store, decode=decode)
    with pytest.raises(Refused, match=sentence):
        await backend.refresh(ask)
    with pytest.raises(NoRefresh):
        await backend.refresh_state()


async def test_a_pause_may_be_allowed(backend: StoreBackend, store: Store) -> None:
    await put_fleet(store, decode=1)
    assert (await backend.refresh(replace(ASK, allow_pause=True))).allow_pause


async def test_only_a_group_that_is_there_can_be_checked(backend: StoreBackend, store: Store) -> None:
    with pytest.raises(UnknownGroup):
        await backend.check("decode-0")
    starting = Group(group="decode-0", role=Role.DECODE, epoch=1, state=GroupState.STARTING)
    await store.put("groups/decode-0", msgspec.json.encode(starting))
    assert await backend.check("decode-0") == GroupCheck(verdict=CheckVerdict.UNKNOWN, message="is starting")
