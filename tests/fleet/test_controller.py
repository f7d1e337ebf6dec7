"""A real Ray cluster, a real controller, and ranks whose engine is a small script."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
import pytest
import ray
import script_engine
from ray import cloudpickle
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from tandem.core.group import Policy
from tandem.core.refresh import OVER, Refresh, RefreshPhase
from tandem.core.types import Group, GroupSpec, GroupState, RankState, Role
from tandem.fleet.cluster import LocalCluster, connect, disconnect
from tandem.fleet.control_client import ControlClient, ControlError
from tandem.fleet.controller import CONTROL_KEY, ControlAddress, Controller, ControllerSettings, start_controller
from tandem.fleet.controller_watch import look
from tandem.fleet.hands import HandsSettings
from tandem.fleet.rank import RankName, RankSettings
from tandem.fleet.rank_actors import make_actor
from tandem.fleet.refresh_ask import RefreshAsk
from tandem.fleet.snapshot import DESIRED, FLEET_KEY, FleetRecord, read_snapshot, watch_snapshots
from tandem.state import Store, open_store

cloudpickle.register_pickle_by_value(script_engine)  # the controller's process cannot import it

FLEET = "test"
WITHIN_S = 20.0
RECORD = FleetRecord(name=FLEET, model_path="/first", model_name="script", model_version="1")


@dataclass
class Stage:
    """What the tests of this file share: starting it takes longer than each of them."""

    folder: Path
    cluster: LocalCluster
    controller: ActorHandle[Controller]

    @property
    def rooms(self) -> Path:
        return self.folder / "rooms"


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    with tempfile.TemporaryDirectory(prefix="tandem-") as name:
        folder = Path(name)
        cluster = LocalCluster.start(folder, 4)
        try:
            connect(cluster.address, namespace=FLEET)
            controller = start_controller(
                ControllerSettings(
                    fleet=RECORD,
                    store_url="embedded",
                    store_folder=str(folder),
                    engines=script_engine.ScriptEngines(str(folder / "rooms")),
                    hands=HandsSettings(rank=RankSettings(logs=str(folder / "logs"), scratch=str(folder))),
                    policy=Policy(start=30, settle=0.2, backoff=0.1, backoff_most=0.5),
                    control_port=0,
                    log=str(folder / "logs" / "controller.log"),
                )
            )
            ray.get(controller.ready.remote(WITHIN_S))
            yield Stage(folder, cluster, controller)
        finally:
            disconnect()
            cluster.stop()


@pytest.fixture
async def store(stage: Stage) -> AsyncIterator[Store]:
    store = await open_store("embedded", fleet=FLEET, folder=stage.folder)
    yield store
    await store.close()


@pytest.fixture
async def control(store: Store) -> AsyncIterator[ControlClient]:
    entry = await store.get(CONTROL_KEY)
    assert entry is not None
    async with ControlClient(msgspec.json.decode(entry.value, type=ControlAddress).address) as client:
        yield client


@pytest.fixture
async def pair(control: ControlClient, store: Store) -> tuple[Group, Group]:
    """The two groups that most tests look at, ready; whatever an earlier test did to them."""
    for role in Role:
        with contextlib.suppress(ControlError):
            await control.put_group(GroupSpec(group=f"{role}-0", role=role, nodes=2))
    return await until_ready(store, "prefill-0"), await until_ready(store, "decode-0")


async def until(store: Store, group: str, holds: Callable[[Group], bool]) -> Group:
    """The group as soon as it is as wanted."""
    seen: Group | None = None
    try:
        async with asyncio.timeout(WITHIN_S):
            async for fleet in watch_snapshots(store):
                seen = next((found for found in fleet.groups if found.group == group), None)
                if seen is not None and holds(seen):
                    return seen
    except TimeoutError:
        raise AssertionError(f"{group} did not get there in {WITHIN_S} s; it is {seen}") from None
    raise AssertionError("the watch ended")


async def until_ready(store: Store, group: str, epoch: int = 1) -> Group:
    return await until(store, group, lambda it: it.state is GroupState.READY and it.epoch >= epoch)


async def until_forgotten(store: Store, group: str) -> None:
    async with asyncio.timeout(WITHIN_S):
        async for fleet in watch_snapshots(store):
            if group not in {found.group for found in (*fleet.groups, *fleet.desired)}:
                return


def pids(*groups: Group) -> list[int]:
    return [rank.pid for group in groups for rank in group.ranks]


def living(*groups: Group) -> list[int]:
    return [pid for pid in pids(*groups) if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


def first_word(path: str) -> str:
    return Path(path).read_text().split()[0]


async def test_every_rank_of_a_group_runs_on_a_node_of_its_own(pair: tuple[Group, Group]) -> None:
    nodes = [rank.node for group in pair for rank in group.ranks]
    assert len(set(nodes)) == 4
    assert living(*pair) == pids(*pair)
    assert all(first_word(rank.log) == "serving" for group in pair for rank in group.ranks)


@pytest.mark.parametrize("rank", [0, 1])
async def test_a_killed_rank_takes_its_group_to_the_next_epoch_and_leaves_the_other_alone(
    pair: tuple[Group, Group], store: Store, rank: int
) -> None:
    prefill, decode = pair
    os.kill(decode.ranks[rank].pid, signal.SIGKILL)
    failed = await until(store, "decode-0", lambda it: it.state is GroupState.FAILED)
    assert f"rank {rank} was killed by SIGKILL; its log ends: serving on" in failed.reason
    again = await until_ready(store, "decode-0", decode.epoch + 1)
    assert again.epoch == decode.epoch + 1
    assert not set(pids(again)) & set(pids(decode))
    assert not living(decode)
    assert await until_ready(store, "prefill-0") == prefill


async def test_a_restarted_prefill_group_has_another_bootstrap_address(pair: tuple[Group, Group], store: Store) -> None:
    prefill = pair[0]
    os.kill(prefill.ranks[0].pid, signal.SIGKILL)
    again = await until_ready(store, "prefill-0", prefill.epoch + 1)
    # Decode groups remember prefill servers by address, and would speak to this one as to the dead one.
    assert (again.bootstrap_host, again.bootstrap_port) != (prefill.bootstrap_host, prefill.bootstrap_port)


async def test_an_engine_dies_with_its_actor_and_the_group_restarts(pair: tuple[Group, Group], store: Store) -> None:
    decode = pair[1]
    actor = ray.get_actor(str(RankName("decode-0", decode.epoch, 1)))
    await asyncio.to_thread(ray.kill, actor, no_restart=True)
    await until_ready(store, "decode-0", decode.epoch + 1)
    assert not living(decode)


async def test_a_stopped_process_is_found_within_seconds(pair: tuple[Group, Group], store: Store) -> None:
    decode = pair[1]
    os.kill(decode.ranks[1].pid, signal.SIGSTOP)
    failed = await until(store, "decode-0", lambda it: it.state is GroupState.FAILED)
    assert "rank 1 hangs" in failed.reason
    await until_ready(store, "decode-0", decode.epoch + 1)


async def test_a_killed_controller_comes_back_adopts_its_groups_and_restarts_none(
    stage: Stage, pair: tuple[Group, Group], store: Store
) -> None:
    old = await stage.controller.pid.remote()
    os.kill(old, signal.SIGKILL)
    async with asyncio.timeout(WITHIN_S):
        async for change in store.watch(CONTROL_KEY):
            assert change.value is not None
            address = msgspec.json.decode(change.value, type=ControlAddress).address
            with contextlib.suppress(ControlError):
                async with ControlClient(address, deadline=2) as control:
                    assert {group.group: group for group in (await control.fleet()).groups} == {
                        group.group: group for group in pair
                    }
                    break
    assert ray.get(stage.controller.pid.remote()) != old
    ray.get(stage.controller.ready.remote(WITHIN_S))
    assert living(*pair) == pids(*pair)


async def test_a_controller_that_stands_still_is_ended_and_the_next_one_restarts_none(
    stage: Stage, pair: tuple[Group, Group]
) -> None:
    assert await look(known=False, silent_s=WITHIN_S)
    old = await stage.controller.pid.remote()
    os.kill(old, signal.SIGSTOP)
    assert not await look(known=True, silent_s=0.5)
    await asyncio.to_thread(psutil.Process(old).wait, WITHIN_S)
    async with asyncio.timeout(WITHIN_S):
        while not await look(known=False, silent_s=WITHIN_S):
            await asyncio.sleep(0.1)
    ray.get(stage.controller.ready.remote(WITHIN_S))
    assert living(*pair) == pids(*pair)


async def test_what_happens_after_the_controller_came_back_is_noticed(
    stage: Stage, pair: tuple[Group, Group], store: Store
) -> None:
    os.kill(await stage.controller.pid.remote(), signal.SIGKILL)
    os.kill(pair[0].ranks[1].pid, signal.SIGKILL)
    await until_ready(store, "prefill-0", pair[0].epoch + 1)
    assert living(pair[1]) == pids(pair[1])


async def test_a_cordoned_group_stays_up_and_takes_no_pairs(
    pair: tuple[Group, Group], control: ControlClient, store: Store
) -> None:
    await control.cordon("decode-0", True)
    cordoned = await until(store, "decode-0", lambda it: it.state is GroupState.CORDONED)
    assert living(cordoned) == pids(pair[1])
    await control.cordon("decode-0", False)
    await until_ready(store, "decode-0")


async def test_a_draining_group_leaves_when_its_last_room_is_closed(
    stage: Stage, pair: tuple[Group, Group], control: ControlClient, store: Store
) -> None:
    stage.rooms.write_text("3")
    await control.drain("decode-0", 600, force=True)
    draining = await until(store, "decode-0", lambda it: it.state is GroupState.DRAINING)
    assert living(draining) == pids(pair[1])
    assert (await control.load("decode-0")).groups["decode-0"][0].running == 3
    stage.rooms.write_text("0")
    await until_forgotten(store, "decode-0")
    assert not living(draining)


async def test_a_removed_group_leaves_nothing_and_its_name_goes_on_with_the_next_epoch(
    pair: tuple[Group, Group], control: ControlClient, store: Store
) -> None:
    await control.remove("decode-0")
    await until_forgotten(store, "decode-0")
    assert not living(pair[1])
    await control.put_group(GroupSpec(group="decode-0", role=Role.DECODE, nodes=1))
    again = await until_ready(store, "decode-0")
    assert again.epoch == pair[1].epoch + 1
    await control.remove("decode-0")
    await until_forgotten(store, "decode-0")


async def test_a_group_without_nodes_says_what_it_waits_for(control: ControlClient, store: Store) -> None:
    await control.put_group(GroupSpec(group="wide", role=Role.DECODE, nodes=5))
    waiting = await until(store, "wide", lambda it: bool(it.reason))
    assert "waits for nodes: 5 with 1 tandem-rank free on each; of the cluster's 4 nodes, 4 have that" in waiting.reason
    await control.remove("wide")
    await until_forgotten(store, "wide")


async def test_a_group_that_no_engine_can_run_is_refused(control: ControlClient) -> None:
    with pytest.raises(ControlError, match="the script has no GPUs"):
        await control.put_group(GroupSpec(group="big", role=Role.DECODE, nodes=1, gpus_per_node=2))


async def test_a_record_that_someone_else_wrote_is_read_again_and_no_rank_restarts(
    pair: tuple[Group, Group], control: ControlClient, store: Store
) -> None:
    await store.put("groups/decode-0", msgspec.json.encode(msgspec.structs.replace(pair[1], reason="me")))
    await control.cordon("decode-0", True)
    await until(store, "decode-0", lambda it: it.state is GroupState.CORDONED)
    await control.cordon("decode-0", False)
    assert pids(await until_ready(store, "decode-0")) == pids(pair[1])


async def test_a_rank_of_no_group_is_ended_when_the_controller_looks_around(
    stage: Stage, pair: tuple[Group, Group]
) -> None:
    stray = make_actor(RankName("ghost", 1, 0), RankSettings(logs=str(stage.folder), scratch=str(stage.folder)), {})
    await stray.health.remote()
    os.kill(await stage.controller.pid.remote(), signal.SIGKILL)
    with pytest.raises(RayActorError):
        async with asyncio.timeout(WITHIN_S):
            await stray.watch.remote(RankState.PENDING, WITHIN_S)


async def over(control: ControlClient) -> Refresh:
    """The refresh once it is over."""
    async with asyncio.timeout(WITHIN_S):
        while (now := await control.refresh_state()).phase not in OVER:
            await asyncio.sleep(0.05)
    return now


@pytest.fixture
async def four(control: ControlClient, store: Store) -> AsyncIterator[list[str]]:
    """Two groups of each role, of one node each, and of version 1 whatever was before."""
    names = [f"{role}-{number}" for role in Role for number in (5, 6)]
    await store.put(FLEET_KEY, msgspec.json.encode(RECORD))
    for old in ("prefill-0", "decode-0"):
        with contextlib.suppress(ControlError):
            await control.remove(old)
        await until_forgotten(store, old)
    for name in names:
        role = Role(name.partition("-")[0])
        await control.put_group(GroupSpec(group=name, role=role, nodes=1, weights_path="/first", weight_version="1"))
    for name in names:
        await until_ready(store, name)
    yield names
    for name in names:  # not by the control service: a test may have killed it
        await store.delete(DESIRED + name)
    for name in names:
        await until_forgotten(store, name)


async def versions(store: Store, names: list[str]) -> dict[str, tuple[str, int]]:
    """Weight version and epoch of each group."""
    groups = {group.group: group for group in (await read_snapshot(store)).groups}
    return {name: (groups[name].weight_version, groups[name].epoch) for name in names}


async def test_other_weights_reach_every_group_without_a_restart_and_a_restarted_one_has_them_too(
    stage: Stage, four: list[str], control: ControlClient, store: Store
) -> None:
    before = await versions(store, four)
    await control.refresh(RefreshAsk(path="/second", version="2", canary="a", expect="1000 1001"))
    assert (await over(control)).phase is RefreshPhase.DONE
    assert await versions(store, four) == {name: ("2", epoch) for name, (_, epoch) in before.items()}
    assert (await read_snapshot(store)).model_version == "2"
    group = await until_ready(store, "decode-6")
    os.kill(group.ranks[0].pid, signal.SIGKILL)
    again = await until_ready(store, "decode-6", group.epoch + 1)
    assert again.weight_version == "2"
    assert "with /second" in Path(again.ranks[0].log).read_text()
    await control.refresh(RefreshAsk(path="/first", version="1"))
    assert (await over(control)).phase is RefreshPhase.DONE


def declaring(group: str, path: str, version: str) -> GroupSpec:
    role = Role(group.partition("-")[0])
    return GroupSpec(group=group, role=role, nodes=1, declared_path=path, declared_version=version)


async def made_anew(control: ControlClient, store: Store, group: str, path: str, version: str) -> Group:
    """A new group of that name, which declares these weights, as soon as it is ready."""
    await control.remove(group)
    await until_forgotten(store, group)
    await control.put_group(declaring(group, path, version))
    return await until_ready(store, group)


async def another_address(store: Store) -> str:
    """Of the control service, as soon as it answers again."""
    async with asyncio.timeout(WITHIN_S):
        async for change in store.watch(CONTROL_KEY):
            assert change.value is not None
            address = msgspec.json.decode(change.value, type=ControlAddress).address
            with contextlib.suppress(ControlError):
                async with ControlClient(address, deadline=2) as control:
                    await control.fleet()
                    return address
    raise AssertionError("the watch ended")


def started_with(group: Group) -> str:
    """The folder that its engine was given."""
    return Path(group.ranks[0].log).read_text().splitlines()[-1].rpartition(" with ")[2]


async def test_a_new_group_starts_with_the_weights_it_declares_and_after_a_refresh_with_what_took_their_place(
    stage: Stage, four: list[str], control: ControlClient, store: Store
) -> None:
    for name in four:
        await control.put_group(declaring(name, "/first", "1"))
    other = await made_anew(control, store, "decode-6", "/third", "3")
    assert (other.weight_version, started_with(other)) == ("3", "/third")
    with pytest.raises(ControlError, match="A change of the weights goes on"):
        await control.refresh(RefreshAsk(path="/second", version="2"))
    await made_anew(control, store, "decode-6", "/first", "1")
    await control.refresh(RefreshAsk(path="/second", version="2"))
    assert (await over(control)).phase is RefreshPhase.DONE
    os.kill(await stage.controller.pid.remote(), signal.SIGKILL)
    async with ControlClient(await another_address(store)) as control:  # the next one knows it too
        same = await made_anew(control, store, "decode-6", "/first", "1")
        assert (same.weight_version, started_with(same)) == ("2", "/second")
        other = await made_anew(control, store, "decode-6", "/third", "3")
        assert (other.weight_version, started_with(other)) == ("3", "/third")
        with pytest.raises(ControlError, match="The weights in /none cannot be taken"):
            await control.check_weights("/none", "4")


async def test_a_refresh_goes_on_when_the_controller_is_killed_in_the_middle(
    stage: Stage, four: list[str], control: ControlClient, store: Store
) -> None:
    before = await versions(store, four)
    stage.rooms.write_text("1")
    await control.refresh(RefreshAsk(path="/second", version="3"))
    await until(store, "prefill-6", lambda it: it.state is GroupState.DRAINING)
    os.kill(await stage.controller.pid.remote(), signal.SIGKILL)
    stage.rooms.write_text("0")
    for name in four:
        await until(store, name, lambda it: it.weight_version == "3" and it.state is GroupState.READY)
    assert await versions(store, four) == {name: ("3", epoch) for name, (_, epoch) in before.items()}


@pytest.mark.parametrize(
    ("ask", "why"),
    [
        (RefreshAsk(path="/bad", version="4"), "its engine did not load /bad: Failed to get weights iterator: bad"),
        (RefreshAsk(path="/second", version="4", expect="7"), "does not begin with what is expected"),
    ],
)
async def test_weights_that_do_not_load_or_answer_badly_are_undone(
    stage: Stage, four: list[str], control: ControlClient, store: Store, ask: RefreshAsk, why: str
) -> None:
    before = await versions(store, four)
    await control.refresh(ask)
    ended = await over(control)
    assert ended.phase is RefreshPhase.ROLLED_BACK
    assert why in ended.failure
    after = await versions(store, four)
    assert {version for version, _ in after.values()} == {"1"}
    assert sum(after[name][1] - before[name][1] for name in four) == 1


async def test_groups_on_a_node_that_dies_restart_on_another(
    stage: Stage, pair: tuple[Group, Group], store: Store
) -> None:
    tending = asyncio.create_task(stage.cluster.tend())
    node, pid = list(stage.cluster.nodes.items())[-1]
    os.kill(pid, signal.SIGKILL)
    (hit,) = [group for group in pair if node in {rank.node for rank in group.ranks}]
    again = await until_ready(store, hit.group, hit.epoch + 1)
    assert node not in {rank.node for rank in again.ranks}
    assert not living(hit)
    tending.cancel()
