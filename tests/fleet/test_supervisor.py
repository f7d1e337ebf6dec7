"""The engine process supervisor, with small commands in the engine's place."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tandem.engine import guard
from tandem.engine.supervisor import EngineCommand, EngineProcess, Exit, StartError

SERVER = """
import socket, sys, time
s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1], flush=True); time.sleep(600)
"""
FAMILY = """
import os, signal, subprocess, sys, time
orphan = "import os,time; os.setsid(); time.sleep(600)"
start = "import subprocess,sys; subprocess.Popen([sys.executable,'-c',%r])" % orphan
p = subprocess.Popen([sys.executable, "-c", start])
p.wait(); print("ready", flush=True); time.sleep(600)
"""
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
)
OWNER = """
import asyncio, sys
from pathlib import Path
from tandem.engine.supervisor import EngineCommand, EngineProcess
async def main():
    p = await EngineProcess.start(EngineCommand((sys.executable, "-c", sys.argv[2]), {}, Path(sys.argv[1])))
    print(p.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "engine.log"


def python(code: str, log: Path, **env: str) -> EngineCommand:
    return EngineCommand((sys.executable, "-c", code), env, log)


async def until_logged(log: Path, word: str) -> str:
    async with asyncio.timeout(10):
        while word not in (text := log.read_text() if log.exists() else ""):
            await asyncio.sleep(0.01)
    return text


async def until_gone(*pids: int) -> None:
    async with asyncio.timeout(10):
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            await asyncio.sleep(0.01)


async def test_an_exit_code_is_reported(log: Path) -> None:
    process = await EngineProcess.start(python("raise SystemExit(7)", log))
    assert await process.wait() == Exit(code=7)


async def test_a_signal_is_reported_by_name(log: Path) -> None:
    process = await EngineProcess.start(python("import time; time.sleep(600)", log))
    os.kill(process.pid, signal.SIGKILL)
    assert str(await process.wait()) == "killed by SIGKILL"


async def test_output_and_environment_reach_the_engine(log: Path) -> None:
    process = await EngineProcess.start(python("import os; print(os.environ['WORD'])", log, WORD="hello"))
    await process.wait()
    assert log.read_text() == "hello\n"


async def test_a_command_that_does_not_exist_says_so_in_the_log(log: Path) -> None:
    process = await EngineProcess.start(EngineCommand(("/no/such/engine",), {}, log))
    assert await process.wait() == Exit(code=127)
    assert "cannot run /no/such/engine" in log.read_text()


async def test_stop_ends_an_engine_that_ignores_sigterm(log: Path) -> None:
    process = await EngineProcess.start(python(STUBBORN, log))
    await until_logged(log, "ready")
    assert await process.stop(grace=0.1) == Exit(signal=signal.SIGKILL)


async def test_stop_leaves_no_orphan_even_one_in_a_session_of_its_own(log: Path) -> None:
    process = await EngineProcess.start(python(FAMILY, log))
    await until_logged(log, "ready")
    guard_pid = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[1])
    family = guard.descendants(guard_pid)
    assert len(family) == 2
    await process.stop(grace=0.1)
    assert not [pid for pid in family if Path(f"/proc/{pid}").exists()]


@pytest.fixture
def owner(log: Path) -> Iterator[asyncio.subprocess.Process]:
    started: list[asyncio.subprocess.Process] = []
    yield started  # type: ignore[misc]
    for process in started:
        with suppress(ProcessLookupError):
            process.kill()


async def owned(log: Path, started: list[asyncio.subprocess.Process]) -> tuple[asyncio.subprocess.Process, int]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", OWNER, str(log), STUBBORN, stdout=asyncio.subprocess.PIPE
    )
    started.append(process)
    assert process.stdout is not None
    return process, int(await asyncio.wait_for(process.stdout.readline(), 10))


async def test_the_engine_dies_with_an_owner_that_is_killed(log: Path, owner: list[asyncio.subprocess.Process]) -> None:
    process, engine = await owned(log, owner)
    await until_logged(log, "ready")
    process.kill()
    await process.wait()
    await until_gone(engine)


async def test_the_engine_dies_with_its_guard_and_the_owner_is_told(log: Path) -> None:
    process = await EngineProcess.start(python(STUBBORN, log))
    await until_logged(log, "ready")
    parent = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    assert await asyncio.wait_for(process.wait(), 5) == Exit(signal=signal.SIGKILL)
    await until_gone(process.pid)


async def test_a_listener_is_told_from_one_of_another_process(log: Path) -> None:
    process = await EngineProcess.start(python(SERVER, log))
    port = int(await until_logged(log, "\n"))
    foreign = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    assert process.owns_listener(port)
    assert not process.owns_listener(foreign.sockets[0].getsockname()[1])
    foreign.close()
    await process.stop(grace=0)


async def test_a_nursery_that_is_not_there_is_done_without(log: Path, tmp_path: Path) -> None:
    command = EngineCommand((sys.executable, "-m", "tandem.engine.cpu.launch_server", "--help"), {}, log)
    process = await EngineProcess.start(command, nursery=tmp_path / "none.sock")
    await process.stop(grace=0)


async def test_a_guard_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((StartError, NotADirectoryError, FileExistsError)):
        await EngineProcess.start(python("pass", tmp_path / "file" / "engine.log"))
