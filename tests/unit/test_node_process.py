"""Small parts of `tandem node`: its probe, its folder, its orphans, and how it has a gateway stop."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tandem.fleet.node_logs import LogCopier
from tandem.fleet.node_probe import Probe
from tandem.fleet.node_process import make_folder, reap
from tandem.fleet.rank import RankSettings
from tandem.fleet.ray_children import RayProcess, end
from tandem.fleet.ray_processes import NodePlace, Session
from tandem.gateway.stop_socket import NODE_FOLDER_VARIABLE, STOP_SOCKET, ask_stop, serve_stop


def ask(port: int, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


async def test_a_node_is_live_at_once_and_ready_when_nothing_is_missing() -> None:
    missing = ["waits for the head"]
    probe = Probe(lambda: missing[0])
    port = await probe.open("127.0.0.1", 0)
    assert (await asyncio.to_thread(ask, port, "/live"))[0] == 200
    status, body = await asyncio.to_thread(ask, port, "/ready")
    assert (status, "waits for the head" in body) == (503, True)
    missing[0] = ""
    assert (await asyncio.to_thread(ask, port, "/ready"))[0] == 200
    assert (await asyncio.to_thread(ask, port, "/other"))[0] == 404
    await probe.close()


def test_a_nodes_folder_is_its_own_and_empty(tmp_path: Path) -> None:
    folder = make_folder(tmp_path, "fd00::7")
    (folder / "left").touch()
    assert make_folder(tmp_path, "fd00::7") == folder
    assert [path.name for path in folder.iterdir()] == ["logs"]
    assert folder.stat().st_mode & 0o777 == 0o700
    assert make_folder(tmp_path, "10.0.0.1") != folder


def test_only_children_that_nobody_waits_for_are_reaped() -> None:
    own, orphan = (subprocess.Popen([sys.executable, "-S", "-E", "-c", ""]) for _ in range(2))
    for child in (own, orphan):
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    reap([own.pid])
    with pytest.raises(ChildProcessError):
        os.waitpid(orphan.pid, os.WNOHANG)
    assert own.wait(5) == 0
    orphan.returncode = 0  # else it warns


async def test_a_gateway_is_told_to_stop_and_waited_for(tmp_path: Path) -> None:
    told: list[float] = []
    serve_stop(tmp_path / STOP_SOCKET, told.append)
    assert await ask_stop(tmp_path / STOP_SOCKET, 7) == "the gateway has stopped"
    assert told == [7]
    assert [thread.daemon for thread in threading.enumerate() if thread.name == "tandem-stop"] == [True]


async def test_a_node_without_a_gateway_need_not_stop_it(tmp_path: Path) -> None:
    assert (await ask_stop(tmp_path / STOP_SOCKET, 7)).startswith("no gateway runs here")


def test_a_rank_that_is_told_no_folder_takes_its_nodes_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NODE_FOLDER_VARIABLE, str(tmp_path))
    here = RankSettings().here()
    assert (here.logs, here.scratch, here.nursery) == (str(tmp_path / "logs"), str(tmp_path), "")
    told = RankSettings(logs="/l", scratch="/s")
    assert told.here() == told


def test_whole_lines_of_an_engines_log_are_copied_once(tmp_path: Path) -> None:
    output, log = io.BytesIO(), tmp_path / "decode-0-e1-r0.log"
    copier = LogCopier(tmp_path, output)
    log.write_bytes(b"one\ntw")
    copier.copy(log)
    with open(log, "ab") as file:
        file.write(b"o\n" + b"x" * 70_000 + b"\nend\n")
    copier.copy(log)
    copier.copy(log)
    lines = output.getvalue().splitlines()
    assert lines[:2] == [b"[decode-0-e1-r0] one", b"[decode-0-e1-r0] two"]
    assert b"".join(lines).count(b"x") == 70_000
    assert lines[-1] == b"[decode-0-e1-r0] end"


async def test_a_log_that_appears_is_followed(tmp_path: Path) -> None:
    read, write = os.pipe()
    with os.fdopen(read, "rb") as copied, os.fdopen(write, "wb") as output:
        following = asyncio.create_task(LogCopier(tmp_path, output).follow())
        line = asyncio.create_task(asyncio.to_thread(copied.readline))
        while not line.done():  # whether the watch has begun yet, nobody tells
            (tmp_path / "decode-0-e1-r0.log").open("a").write("ready\n")
            await asyncio.wait([line], timeout=0.1)
        assert await line == b"[decode-0-e1-r0] ready\n"
        following.cancel()
        await asyncio.wait([following])


async def test_who_gives_up_waiting_for_a_process_of_rays_does_not_keep_it_from_being_ended(tmp_path: Path) -> None:
    session = Session(tmp_path)
    session.make()
    process = RayProcess("sleeper", NodePlace(), ["/bin/sleep", "60"], session)
    waiting = asyncio.ensure_future(asyncio.wrap_future(process.ended))
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    await asyncio.to_thread(end, [process])
    assert process.ended.result(0) == -signal.SIGTERM
