"""Which weights a fleet gives a group that declares some."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from tandem.core.declared import version_of
from tandem.core.group_record import Weights
from tandem.core.refresh import Refresh, RefreshPhase
from tandem.core.types import Group, GroupSpec, GroupState, Role
from tandem.fleet.backend import StoreBackend
from tandem.fleet.control_service import Refused
from tandem.fleet.fleet_record import read_record
from tandem.fleet.refresh import RefreshDriver
from tandem.fleet.refresh_ask import RefreshAsk
from tandem.fleet.snapshot import FLEET_KEY, read_snapshot
from tandem.state import Store, open_store
from unit.test_fleet_backend import SmallEngines

A, B, C = Weights("/a", "1"), Weights("/b", "2"), Weights("/c", "3")
OLD_RECORD = {"name": "test", "model_path": "/a", "model_name": "m", "model_version": "1", "beside": 7}
"""As the version before wrote it, and with something that it does not know."""


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await open_store("embedded", fleet="test", folder=tmp_path)
    await store.put(FLEET_KEY, msgspec.json.encode(OLD_RECORD))
    yield store
    await store.close()


@pytest.fixture
def backend(store: Store) -> StoreBackend:
    return StoreBackend(store, SmallEngines(), drain_s=60)


def declares(weights: Weights, group: str = "decode-0") -> GroupSpec:
    role = Role(group.partition("-")[0])
    return GroupSpec(group=group, role=role, nodes=1, declared_path=weights.path, declared_version=weights.version)


async def served(backend: StoreBackend, weights: Weights, group: str = "decode-9") -> Weights:
    """What a new group is given that declares these."""
    noted = await backend.put_group(declares(weights, group))
    await backend.remove(group)
    return Weights(noted.weights_path, noted.weight_version)


async def refreshed(store: Store, backend: StoreBackend, to: Weights) -> None:
    """A refresh that every group has taken."""
    running = Refresh(path=to.path, version=to.version)
    await store.put("refresh", msgspec.json.encode(running))
    await RefreshDriver(store)._serve(running, (await read_snapshot(store)).desired)
    for spec in (await read_snapshot(store)).desired:
        told = replace(spec, weights_path=to.path, weight_version=to.version)
        await store.put(f"desired/{spec.group}", msgspec.json.encode(told))
    over = replace(running, phase=RefreshPhase.DONE)
    await store.put("refresh", msgspec.json.encode(over))


async def test_a_new_group_is_given_the_weights_that_it_declares(backend: StoreBackend) -> None:
    assert [await served(backend, one) for one in (A, B)] == [A, B]


async def test_what_declares_refreshed_weights_is_given_those_that_took_their_place(
    backend: StoreBackend, store: Store
) -> None:
    await backend.put_group(declares(A))
    await refreshed(store, backend, B)
    assert await served(backend, A) == B
    assert await served(backend, C) == C
    assert await served(backend, A) == B  # also when the fleet goes back to what was declared before


async def test_what_all_groups_declared_that_have_gone_is_replaced_too(backend: StoreBackend, store: Store) -> None:
    await backend.put_group(declares(A))
    await backend.remove("decode-0")
    await refreshed(store, backend, B)
    assert await served(backend, A) == B


async def test_a_refresh_follows_a_refresh(backend: StoreBackend, store: Store) -> None:
    await backend.put_group(declares(A))
    for to, is_given in ((B, B), (C, C), (A, A)):
        await refreshed(store, backend, to)
        assert await served(backend, A) == is_given


async def test_a_group_that_exists_keeps_its_weights_whatever_was_put_in_their_place(
    backend: StoreBackend, store: Store
) -> None:
    await backend.put_group(declares(A))
    await refreshed(store, backend, B)
    assert (await backend.put_group(replace(declares(A), cordoned=True))).weight_version == "2"


async def test_what_a_group_declares_cannot_be_changed(backend: StoreBackend) -> None:
    await backend.put_group(declares(A))
    with pytest.raises(Refused, match="decode-0 was made with the weights in /a, version 1"):
        await backend.put_group(declares(B))


async def test_the_fleet_has_what_all_groups_declare_that_stay(backend: StoreBackend, store: Store) -> None:
    await backend.put_group(declares(A))
    await backend.put_group(declares(C, "decode-1"))
    assert (await read_snapshot(store)).model_version == "1"
    await backend.drain("decode-0", 5)
    record = await read_record(store)
    assert (record.model_path, record.model_version, record.model_name) == ("/c", "3", "m")
    entry = await store.get(FLEET_KEY)
    assert entry is not None
    assert msgspec.json.decode(entry.value)["beside"] == 7


async def test_a_group_of_an_older_fleet_declares_what_it_has_already(backend: StoreBackend, store: Store) -> None:
    """Before, nothing was declared, and the weights may have been refreshed twice since."""
    await store.put(FLEET_KEY, msgspec.json.encode({**OLD_RECORD, "model_path": "/b", "model_version": "2"}))
    old = GroupSpec(group="decode-0", role=Role.DECODE, nodes=1, weights_path="/b", weight_version="2")
    await store.put("desired/decode-0", msgspec.json.encode(old))
    assert (await backend.put_group(declares(A))).weight_version == "2"
    assert await served(backend, A) == B


async def test_weights_that_got_their_version_from_an_older_fleet_keep_it(backend: StoreBackend, store: Store) -> None:
    named = Weights("/a", version_of("/a"))
    assert await served(backend, named) == A
    await backend.put_group(declares(C))
    await backend.put_group(declares(C, "prefill-0"))
    assert (await read_snapshot(store)).model_version == "3"
    assert await served(backend, named) == A


async def test_what_has_no_path_is_what_the_fleet_began_with(backend: StoreBackend, store: Store) -> None:
    own = Weights("", "1")
    assert await served(backend, own) == A
    await backend.put_group(declares(C))
    assert await served(backend, own) == A


async def test_a_fleet_that_began_with_a_path_has_nothing_without_one(backend: StoreBackend) -> None:
    await backend.put_group(declares(C))
    with pytest.raises(Refused, match="the fleet began with another model than that of no path"):
        await backend.put_group(declares(Weights("", "1"), "decode-1"))


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        (Weights("/none", "2"), "The weights in /none cannot be taken: the checkpoint in /none cannot be read"),
        (Weights("/b", "1"), "Version 1 is that of the weights in /a; give those in /b another one"),
    ],
)
async def test_weights_that_cannot_be_taken_are_refused_before_there_is_a_group(
    backend: StoreBackend, store: Store, weights: Weights, why: str
) -> None:
    await backend.put_group(declares(A))
    with pytest.raises(Refused, match=why):
        await backend.check_weights(*weights)
    with pytest.raises(Refused, match=why):
        await backend.put_group(declares(weights, "decode-1"))
    assert [spec.group for spec in (await read_snapshot(store)).desired] == ["decode-0"]


async def test_weights_that_groups_have_are_not_looked_at_again(backend: StoreBackend, store: Store) -> None:
    bad = GroupSpec(
        group="decode-0", role=Role.DECODE, nodes=1, weights_path="/none", weight_version="2", declared_path="/none",
        declared_version="2",
    )  # fmt: skip
    await store.put("desired/decode-0", msgspec.json.encode(bad))
    assert await served(backend, Weights("/none", "2")) == Weights("/none", "2")


async def test_while_a_refresh_goes_on_no_group_declares_further_weights(backend: StoreBackend, store: Store) -> None:
    await backend.put_group(declares(A))
    running = Refresh(path="/b", version="2", old_path="/a", old_version="1")
    await store.put("refresh", msgspec.json.encode(running))
    assert (await read_snapshot(store)).refreshing == "2"
    with pytest.raises(Refused, match="A refresh to version 2 goes on"):
        await backend.check_weights(*C)
    assert await served(backend, A) == A
    await store.put("refresh", msgspec.json.encode(replace(running, phase=RefreshPhase.ROLLED_BACK)))
    assert (await read_snapshot(store)).refreshing == ""
    await backend.check_weights(*C)


async def put_ready(store: Store, backend: StoreBackend, *weights: Weights) -> None:
    """Two groups of each role for each of these."""
    for number, one in enumerate((*weights, *weights)):
        for role in Role:
            name = f"{role}-{number}"
            spec = await backend.put_group(declares(one, name))
            group = Group(
                group=name, role=role, epoch=1, state=GroupState.READY, weights_path=spec.weights_path,
                weight_version=spec.weight_version,
            )  # fmt: skip
            await store.put(f"groups/{name}", msgspec.json.encode(group))


async def test_while_groups_declare_different_weights_no_refresh_begins(backend: StoreBackend, store: Store) -> None:
    await put_ready(store, backend, A, C)
    with pytest.raises(Refused, match="A change of the weights goes on"):
        await backend.refresh(RefreshAsk(path="/d", version="4"))


async def test_a_refresh_goes_back_to_what_the_groups_have_by_now(backend: StoreBackend, store: Store) -> None:
    await put_ready(store, backend, C)
    refresh = await backend.refresh(RefreshAsk(path="/d", version="4"))
    assert (refresh.old_path, refresh.old_version) == C


async def test_a_refresh_cannot_have_the_version_of_another_folder(backend: StoreBackend, store: Store) -> None:
    await put_ready(store, backend, A)
    await refreshed(store, backend, B)
    for group in (await read_snapshot(store)).groups:
        has = replace(group, weights_path="/b", weight_version="2")
        await store.put(f"groups/{group.group}", msgspec.json.encode(has))
    with pytest.raises(Refused, match="Version 1 is that of the weights in /a"):
        await backend.refresh(RefreshAsk(path="/x", version="1"))
    assert (await backend.refresh(RefreshAsk(path="/a", version="1"))).old_version == "2"
