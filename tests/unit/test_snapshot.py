"""The fleet as read from a store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from tandem.core.traffic import TrafficReport
from tandem.core.types import FleetSnapshot, GatewayReplica, Group, GroupSpec, GroupState, PoolPlan, Role
from tandem.fleet import snapshot
from tandem.fleet.snapshot import FleetRecord, StateFormatError, read_snapshot, read_traffic, watch_snapshots
from tandem.state import Store, StoreError, open_store

GROUP = Group(group="prefill-0", role=Role.PREFILL, epoch=1, state=GroupState.STARTING)
SPEC = GroupSpec(group="prefill-0", role=Role.PREFILL, nodes=2)
REPLICA = GatewayReplica(replica="r1", url="http://127.0.0.1:8000", pid=1)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store("embedded", fleet="f", folder=tmp_path)
    yield store
    await store.close()


async def following(snapshots: AsyncIterator[FleetSnapshot]) -> FleetSnapshot:
    return await asyncio.wait_for(anext(snapshots), 5)


async def test_an_empty_store_is_a_fleet_without_anything(store: Store) -> None:
    assert await read_snapshot(store) == FleetSnapshot()


async def test_a_snapshot_holds_what_the_keys_hold(store: Store) -> None:
    record = FleetRecord(name="laptop", model_path="/m", model_name="tiny", model_version="1")
    await store.put("fleet", msgspec.json.encode({**msgspec.structs.asdict(record), "controller": "later"}))
    await store.put("groups/prefill-0", msgspec.json.encode(GROUP))
    await store.put("desired/prefill-0", msgspec.json.encode(SPEC))
    await store.put("gateways/r1", msgspec.json.encode(REPLICA), ttl=60)
    await store.put("control", b"not ours to read")
    assert await read_snapshot(store) == FleetSnapshot(
        name="laptop",
        model_path="/m",
        model_name="tiny",
        model_version="1",
        groups=(GROUP,),
        desired=(SPEC,),
        gateways=(REPLICA,),
        revision=5,
    )


async def test_what_autoscaling_wants_is_part_of_a_snapshot_and_of_its_changes(store: Store) -> None:
    plan = PoolPlan(role=Role.DECODE, wanted=2, reason="time between tokens")
    snapshots = watch_snapshots(store)
    assert (await following(snapshots)).plans == ()
    await store.put("planner", b"not ours to read")
    await store.put("planning/decode", msgspec.json.encode(plan))
    assert (await following(snapshots)).plans == (plan,)
    await snapshots.aclose()


async def test_what_gateways_have_counted_is_no_part_of_a_snapshot(store: Store) -> None:
    reports = tuple(TrafficReport(replica=name, incarnation=f"{name}1", arrived=3) for name in ("a", "b"))
    for report in reports:
        await store.put(f"traffic/{report.replica}", msgspec.json.encode(report), ttl=60)
    assert await read_traffic(store) == reports
    assert await read_snapshot(store) == FleetSnapshot(revision=2)


async def test_a_value_of_another_version_is_named(store: Store) -> None:
    await store.put("groups/prefill-0", b'{"group": 1}')
    with pytest.raises(StateFormatError, match="'groups/prefill-0' in the fleet's store is not a Group"):
        await read_snapshot(store)


async def test_the_fleet_is_followed_with_rising_revisions(store: Store) -> None:
    await store.put("groups/prefill-0", msgspec.json.encode(GROUP))
    snapshots = watch_snapshots(store)
    first = await following(snapshots)
    assert first.groups == (GROUP,)
    await store.put("gateways/r1", msgspec.json.encode(REPLICA), ttl=0.1)
    second = await following(snapshots)
    assert second.gateways == (REPLICA,)
    third = await following(snapshots)
    assert third.gateways == ()
    assert first.revision < second.revision < third.revision


async def test_what_changes_nothing_is_not_told(store: Store) -> None:
    snapshots = watch_snapshots(store)
    await following(snapshots)
    await store.put("control", b"elsewhere")
    await store.put("groups/prefill-0", msgspec.json.encode(GROUP))
    assert (await following(snapshots)).groups == (GROUP,)
    await store.put("groups/prefill-0", msgspec.json.encode(GROUP))
    await store.delete("groups/prefill-0")
    assert (await following(snapshots)).groups == ()


async def test_the_fleet_is_no_longer_followed_when_the_store_is_closed(store: Store) -> None:
    snapshots = watch_snapshots(store)
    await following(snapshots)
    waiting = asyncio.ensure_future(following(snapshots))
    await asyncio.sleep(0)
    await store.close()
    with pytest.raises(StopAsyncIteration):
        await waiting


async def test_following_goes_on_after_an_outage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_RETRY_S", 0.01)
    snapshots = watch_snapshots(store)
    await following(snapshots)
    working, failures = store.revision, 1

    async def revision() -> int:
        nonlocal failures
        if failures:
            failures -= 1
            raise StoreError("away")
        return await working()

    monkeypatch.setattr(store, "revision", revision)
    await store.put("groups/prefill-0", msgspec.json.encode(GROUP))
    assert (await following(snapshots)).groups == (GROUP,)
    assert failures == 0


def test_what_was_stored_before_groups_had_revisions_is_read() -> None:
    group = msgspec.json.decode(
        b'{"group": "decode-0", "role": "decode", "epoch": 2, "state": "ready", "ranks": [{"rank": 0}]}', type=Group
    )
    spec = msgspec.json.decode(b'{"group": "decode-0", "role": "decode", "nodes": 2}', type=GroupSpec)
    assert (group.revision, group.kv_format, group.ranks[0].pod) == ("", "", "")
    assert (spec.revision, spec.kv_format, spec.engine) == ("", "", None)
