"""Ray's processes on this machine: they come quickly, stay as many as they should be, and go without a trace."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import ray
from ray import cloudpickle

from tandem.fleet.cluster import ClusterError, LocalCluster, connect, disconnect

HOST = """
import os, sys, time, ray
from pathlib import Path
from tandem.fleet.cluster import LocalCluster, connect
cluster = LocalCluster.start(Path(sys.argv[1]), 2)
connect(cluster.address, namespace="test")
@ray.remote(num_cpus=0)
class Actor:
    def pid(self):
        return os.getpid()
actors = [Actor.options(lifetime="detached", name=str(n), resources={"tandem-rank": 1}).remote() for n in range(2)]
print(*cluster.pids, *ray.get([actor.pid.remote() for actor in actors]), flush=True)
sys.stdin.read()
"""


class Named:
    """An actor."""

    def pid(self) -> int:
        return os.getpid()


cloudpickle.register_pickle_by_value(sys.modules[__name__])  # an actor's process cannot import it


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tandem-") as name:
        yield Path(name)


def ended(pids: list[int], within: float) -> bool:
    """Whether all these processes end in time."""
    handles = [os.pidfd_open(pid) for pid in pids if psutil.pid_exists(pid)]
    poll = [select.select([handle], [], [], within) for handle in handles]
    for handle in handles:
        os.close(handle)
    return all(readable for readable, _, _ in poll)


@pytest.mark.alone
def test_a_stopped_cluster_leaves_no_process_and_no_file(folder: Path) -> None:
    shared = set(os.listdir("/dev/shm"))
    cluster = LocalCluster.start(folder, 3)
    connect(cluster.address, namespace="test")
    family = [child.pid for pid in cluster.pids for child in psutil.Process(pid).children(recursive=True)]
    disconnect()
    cluster.stop()
    assert ended([*cluster.pids, *family], 0.5)
    assert list(folder.iterdir()) == []
    assert set(os.listdir("/dev/shm")) <= shared


@pytest.mark.alone
def test_everything_dies_with_a_host_that_is_killed(folder: Path) -> None:
    shared = set(os.listdir("/dev/shm"))
    host = subprocess.Popen(
        [sys.executable, "-c", HOST, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert host.stdout is not None
    pids = [int(word) for word in host.stdout.readline().split()]
    assert len(pids) == 5
    handles = [os.pidfd_open(pid) for pid in pids]
    host.kill()
    host.communicate()
    assert all(select.select([handle], [], [], 5)[0] for handle in handles)
    for handle in handles:
        os.close(handle)
    assert set(os.listdir("/dev/shm")) <= shared


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("later", [False, True], ids=["from the start", "added later"])
async def test_a_node_that_dies_is_replaced(folder: Path, later: bool) -> None:
    cluster = LocalCluster.start(folder, 1 if later else 2)
    try:
        tending = asyncio.create_task(cluster.tend())
        await asyncio.sleep(0)  # it waits for deaths among the nodes of now
        cluster.grow(2)
        gcs, head, node = cluster.pids
        os.kill(node, signal.SIGKILL)
        await until(lambda: node not in cluster.pids and len(cluster.pids) == 3)
        assert cluster.pids[:2] == [gcs, head]
        tending.cancel()
    finally:
        cluster.stop()


async def test_a_gcs_that_dies_is_replaced_and_nodes_and_actors_live_on(folder: Path) -> None:
    cluster = LocalCluster.start(folder, 2)
    try:
        tending = asyncio.create_task(cluster.tend())
        connect(cluster.address, namespace="test")
        named = ray.remote(num_cpus=0)(Named)
        old = named.options(name="old", lifetime="detached").remote()
        pid = await old.pid.remote()
        gcs, *raylets = cluster.pids
        os.kill(gcs, signal.SIGKILL)
        assert await old.pid.remote() == pid  # also while there is none
        await until(lambda: cluster.pids[0] != gcs)
        new = named.options(name="new", lifetime="detached").remote()
        assert await new.pid.remote() != pid
        assert await ray.get_actor("old").pid.remote() == pid
        assert cluster.pids[1:] == raylets
        assert [node["Alive"] for node in ray.nodes()] == [True, True]
        tending.cancel()
    finally:
        disconnect()
        cluster.stop()


async def test_the_end_of_a_gcs_that_will_not_live_is_told(folder: Path) -> None:
    cluster = LocalCluster.start(folder, 1)
    try:
        tending = asyncio.create_task(cluster.tend())
        for _ in range(3):
            gcs = cluster.pids[0]
            os.kill(gcs, signal.SIGKILL)
            await until(lambda gcs=gcs: cluster.pids[0] != gcs or tending.done())  # type: ignore[misc]
        assert f"gcs_server (PID {gcs}) was killed by SIGKILL" in await tending
    finally:
        cluster.stop()


async def test_the_end_of_the_head_is_told(folder: Path) -> None:
    cluster = LocalCluster.start(folder, 1)
    try:
        tending = asyncio.create_task(cluster.tend())
        os.kill(cluster.pids[1], signal.SIGKILL)
        async with asyncio.timeout(10):
            assert "and it was the head" in await tending
    finally:
        cluster.stop()


def test_a_folder_too_deep_for_unix_sockets_is_refused(folder: Path) -> None:
    with pytest.raises(ClusterError, match="too long a path"):
        LocalCluster.start(folder / ("x" * 90), 1)


def test_a_cluster_cannot_be_bound_to_a_thread_that_ends(folder: Path) -> None:
    failures: list[str] = []

    def start() -> None:
        try:
            LocalCluster.start(folder, 1)
        except ClusterError as error:
            failures.append(str(error))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join(10)
    assert failures == ["a local cluster must be started by the main thread, with which it dies"]
