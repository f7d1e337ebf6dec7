"""What a pod does before it ends, over a real control service."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from tandem.config import FleetConfig
from tandem.core.types import Group, GroupSpec, GroupState, Role
from tandem.fleet.backend import StoreBackend
from tandem.fleet.control_service import serve_control
from tandem.fleet.engines import SglangEngines
from tandem.fleet.node_leave import leave
from tandem.fleet.snapshot import DESIRED, GROUPS
from tandem.state import Store, open_store


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store("embedded", fleet="f", folder=tmp_path)
    yield store
    await store.close()


@pytest.fixture
async def control(store: Store, tmp_path: Path) -> AsyncIterator[str]:
    """Address of a control service over the store."""
    engines = SglangEngines(FleetConfig(), model=tmp_path, name="tiny")
    backend = StoreBackend(store, engines, drain_s=60)
    server, port = await serve_control(backend, "127.0.0.1", 0)
    yield f"127.0.0.1:{port}"
    await server.stop(None)
    await backend.close()


async def put(store: Store, name: str, state: GroupState = GroupState.READY) -> None:
    role = Role(name.partition("-")[0])
    await store.put(GROUPS + name, msgspec.json.encode(Group(group=name, role=role, epoch=1, state=state)))
    await store.put(DESIRED + name, msgspec.json.encode(GroupSpec(group=name, role=role, nodes=2)))


async def leaving(store: Store, control: str) -> tuple[GroupSpec, list[str]]:
    """Leave; the group goes as soon as it is told to. Returns what it was told, and what was said."""
    said: list[str] = []
    left = asyncio.create_task(leave(control, "decode-0", 20, said.append))
    async for change in store.watch(DESIRED + "decode-0"):
        assert change.value is not None
        spec = msgspec.json.decode(change.value, type=GroupSpec)
        if spec.draining:
            break
    assert not left.done()
    await store.delete(GROUPS + "decode-0")
    await left
    return spec, said


async def test_its_streams_move_at_once_and_it_waits_until_the_group_is_gone(store: Store, control: str) -> None:
    for name in ("prefill-0", "decode-0", "decode-1"):
        await put(store, name)
    spec, said = await leaving(store, control)
    assert spec.migrate_at > 0
    assert said == ["decode-0 drains; its streams move to other groups", "decode-0 is gone"]


async def test_the_last_group_of_its_role_drains_too_and_its_streams_end_there(store: Store, control: str) -> None:
    await put(store, "prefill-0")
    await put(store, "decode-0")
    spec, said = await leaving(store, control)
    assert spec.migrate_at == 0
    assert said[0].startswith("decode-0 drains, although: decode-0 is the last decode group that is ready")


@pytest.mark.parametrize("state", [None, GroupState.FAILED])
async def test_a_group_without_requests_is_not_waited_for(store: Store, control: str, state: GroupState | None) -> None:
    if state is not None:
        await put(store, "decode-0", state)
    said: list[str] = []
    await leave(control, "decode-0", 20, said.append)
    assert said == ["decode-0 is failed: no request runs there" if state else "decode-0 is gone"]


async def test_it_gives_up_in_time(store: Store, control: str) -> None:
    await put(store, "decode-0")
    said: list[str] = []
    await leave(control, "decode-0", 1, said.append)
    assert said[-1] == "decode-0 was not gone after 1 s"


async def test_without_a_control_service_it_says_so_and_ends() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    said: list[str] = []
    await leave(f"127.0.0.1:{port}", "decode-0", 5, said.append)
    assert said[0].startswith("decode-0 cannot be drained: The fleet at")
