"""One rank, without Ray: its engine is a small script."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from script_engine import SCRIPT

from tandem.core.heartbeat import Limits
from tandem.core.types import RankState
from tandem.engine.launch import RankEndpoints
from tandem.fleet.ports import BLOCK, FIRST, LAST, PortBlock
from tandem.fleet.rank import RankActor, RankName, RankSettings

HOST = "127.0.0.1"
COUNTING = """
import sys
from prometheus_client import CollectorRegistry, Counter
Counter("tandem_engine_test", "", ["rank"], registry=CollectorRegistry()).labels(0).inc(3)
"""

BEATING = """
import threading, time
from tandem.engine.heartbeat import open_pulse
pulse = open_pulse("scheduler DP 0")
def beat():
    while BEATS:
        pulse.turn()
        time.sleep(0.2)
    pulse.forward()
threading.Thread(target=beat, daemon=True).start()
"""


@pytest.fixture
async def rank(tmp_path: Path) -> AsyncIterator[RankActor]:
    settings = RankSettings(logs=str(tmp_path / "logs"), scratch=str(tmp_path), limits=Limits(hang_s=3, blocked_s=2))
    rank = RankActor("decode-0", 1, 0, settings, host=HOST, node="here")
    yield rank
    await rank.stop(0)


async def endpoints(rank: RankActor) -> RankEndpoints:
    prepared = await rank.prepare({})
    assert prepared.interface == "lo"
    return RankEndpoints(host=HOST, http_port=prepared.first_port, dist_init=f"{HOST}:{prepared.first_port + 2}")


def script(code: str, where: RankEndpoints) -> tuple[str, ...]:
    return (sys.executable, "-c", code, where.host, str(where.http_port), "/no/rooms", "/no/weights")


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


async def test_a_rank_is_ready_when_its_own_engine_answers(rank: RankActor) -> None:
    where = await endpoints(rank)
    status = await rank.start(script(SCRIPT, where), {}, where)
    assert status.state is RankState.STARTING
    assert await rank.wait_ready(10)
    assert (await rank.health()).pid == status.pid


async def test_an_answer_of_another_process_does_not_count(rank: RankActor) -> None:
    where = await endpoints(rank)
    stranger = await asyncio.create_subprocess_exec(*script(SCRIPT, where), stdout=asyncio.subprocess.PIPE)
    assert stranger.stdout is not None
    await stranger.stdout.readline()
    await rank.start((sys.executable, "-c", "import time; time.sleep(60)"), {}, where)
    assert not await rank.wait_ready(10)
    assert "another process answers there" in (await rank.health()).detail
    stranger.kill()
    await stranger.wait()


async def test_a_death_is_told_at_once_with_the_last_lines_of_the_log(rank: RankActor) -> None:
    where = await endpoints(rank)
    await rank.start((sys.executable, "-c", "print('no weights'); raise SystemExit(3)"), {}, where)
    status = await rank.watch(RankState.STARTING, 10)
    assert status.state is RankState.DEAD
    assert status.detail == "exited with code 3; its log ends: no weights"


async def test_a_command_that_cannot_be_run_is_a_death_too(rank: RankActor) -> None:
    where = await endpoints(rank)
    await rank.start(("/no/such/engine",), {}, where)
    status = await rank.watch(RankState.STARTING, 10)
    assert "cannot run /no/such/engine" in status.detail


async def test_a_stopped_process_counts_as_dead_after_two_looks(rank: RankActor) -> None:
    where = await endpoints(rank)
    status = await rank.start(script(SCRIPT, where), {}, where)
    assert await rank.wait_ready(10)
    os.kill(status.pid, signal.SIGSTOP)
    assert "hangs" in (await rank.watch(RankState.READY, 10)).detail


async def test_an_engine_that_is_there_but_makes_no_progress_counts_as_dead(rank: RankActor) -> None:
    where = await endpoints(rank)
    await rank.start(script(BEATING.replace("BEATS", "False") + SCRIPT, where), {}, where)
    assert await rank.wait_ready(10)
    detail = (await rank.watch(RankState.READY, 10)).detail
    assert detail.startswith("hangs: its scheduler DP 0 has made no progress for ")


async def test_an_engine_that_makes_progress_lives(rank: RankActor) -> None:
    where = await endpoints(rank)
    await rank.start(script(BEATING.replace("BEATS", "True") + SCRIPT, where), {}, where)
    assert await rank.wait_ready(10)
    assert (await rank.watch(RankState.READY, 6)).state is RankState.READY


async def test_a_new_epoch_waits_for_the_end_of_the_old_one_on_its_node(rank: RankActor) -> None:
    old = await asyncio.create_subprocess_exec("sleep", "60")
    with pytest.raises(TimeoutError):
        await rank.prepare({"here": [old.pid]}, deadline=0.05)
    await rank.prepare({"elsewhere": [old.pid]}, deadline=0.05)
    preparing = asyncio.create_task(rank.prepare({"here": [old.pid]}, deadline=10))
    old.kill()
    assert (await preparing).node == "here"
    await old.wait()


async def test_what_the_engine_counted_can_be_read_after_its_death(rank: RankActor) -> None:
    where = await endpoints(rank)
    await rank.start((sys.executable, "-c", COUNTING), {}, where)
    await rank.watch(RankState.STARTING, 10)
    assert await rank.counters() == {'tandem_engine_test_total{rank="0"}': 3}


async def test_a_stopped_rank_leaves_no_file_but_its_log(rank: RankActor, tmp_path: Path) -> None:
    where = await endpoints(rank)
    await rank.start(script(SCRIPT, where), {}, where)
    await rank.wait_ready(10)
    assert (await rank.stop(0)).state is RankState.DEAD
    assert files(tmp_path) == ["decode-0-e1-r0.log"]


def test_blocks_of_ports_are_claimed_once_and_skip_what_is_taken() -> None:
    with PortBlock.claim(HOST) as first, PortBlock.claim(HOST) as second:
        assert second.first >= first.first + BLOCK
    with socket.create_server((HOST, first.first + BLOCK - 1)), PortBlock.claim(HOST) as other:
        assert other.first != first.first
        assert FIRST <= other.first <= LAST + 1 - BLOCK


def test_the_name_of_an_actor_tells_its_rank() -> None:
    assert RankName.parse(str(RankName("decode-0", 4, 1))) == RankName("decode-0", 4, 1)
    assert RankName.parse("SERVE_CONTROLLER_ACTOR") is None
