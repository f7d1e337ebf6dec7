"""How a fleet ends: in order, or by SIGKILL of everything at once. Either way nothing stays behind."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

import psutil
import pytest

from support.fleet import Fleet, ephemeral, shared_memory, temporary_files
from support.oracle import Oracle
from support.redis_server import RedisServer
from tandem.config import PoolConfig, StateConfig
from tandem.models.tiny import ensure_tiny

pytestmark = pytest.mark.timeout(240)


def listening() -> set[int]:
    """TCP ports of this machine on which anybody listens."""
    return {found.laddr.port for found in psutil.net_connections("tcp") if found.status == psutil.CONN_LISTEN}


def assert_nothing_left(fleet: Fleet, processes: list[psutil.Process], ports: set[int], memory: set[str]) -> None:
    assert [process for process in processes if process.is_running() and process.status() != "zombie"] == []
    assert fleet.processes() == []
    assert ports & listening() == set()
    assert shared_memory() - memory == set()


@pytest.fixture
def memory() -> set[str]:
    return shared_memory()


@pytest.fixture
def other_weights(home: Path) -> Path:
    ensure_tiny(home / "other", seed=1)
    return home / "other"


def test_kv_of_other_weights_changes_the_answer_and_killing_everything_leaves_nothing(
    memory: set[str], tiny: Path, other_weights: Path, oracle: Oracle
) -> None:
    """One start serves two tests: the negative control of "the KV really moves", and the end by SIGKILL."""
    prefill = PoolConfig(args=("--model-path", str(other_weights)))
    fleet = Fleet(ephemeral("control", tiny).model_copy(update={"prefill": prefill}))
    try:
        prompt = [random.Random(5).randrange(300, 900) for _ in range(60)]
        answer = fleet.complete(prompt, 12)
        recomputed = [answer[0], *oracle.complete([*prompt, answer[0]], 11)]
        assert answer != recomputed, "decode ignored the KV that prefill sent, and computed the prompt itself"
        processes, ports = fleet.processes(), fleet.listening()
        assert len(processes) > 20
        assert len(ports) > 10
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        fleet.host.wait(10)
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert alive == []
        assert_nothing_left(fleet, processes, ports, memory)
    finally:
        fleet.stop()


def test_a_host_that_is_killed_takes_everything_with_it(memory: set[str], tiny: Path) -> None:
    fleet = Fleet(ephemeral("orphan", tiny))
    try:
        processes, ports = fleet.processes(), fleet.listening()
        fleet.host.kill()
        fleet.host.wait(10)
        psutil.wait_procs(processes, timeout=20)
        assert_nothing_left(fleet, processes, ports, memory)
    finally:
        fleet.stop()


def test_a_fleet_with_its_state_in_redis_answers_and_when_stopped_leaves_nothing(
    redis_server: RedisServer, memory: set[str], tiny: Path, oracle: Oracle
) -> None:
    temporary = temporary_files()
    fleet = Fleet(ephemeral("stopped", tiny).model_copy(update={"state": StateConfig(url=redis_server.url)}))
    assert fleet.complete([400, 500, 600], 8) == oracle.complete([400, 500, 600], 8)
    processes, ports = fleet.processes(), fleet.listening()
    began = time.monotonic()
    assert fleet.stop() == 0
    assert time.monotonic() - began < 30
    assert_nothing_left(fleet, processes, ports, memory)
    assert temporary_files() - temporary == set()
