"""What a rank's actor finds out about its engine's processes."""

from __future__ import annotations

import asyncio
import errno
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tandem.core.heartbeat import Beat, Limits
from tandem.engine.heartbeat import Pulse
from tandem.fleet import engine_health, process_files
from tandem.fleet.engine_health import EngineWatch, HealthCheck, ProgressCheck

ME = os.getpid()
LIMITS = Limits(hang_s=3, blocked_s=3, mute_s=3)
TICKS = os.sysconf("SC_CLK_TCK")


class Proc:
    """A made-up /proc."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.children: dict[int, list[int]] = {}

    def add(self, pid: int, parent: int, title: str, *, own: int = 0, reaped: int = 0) -> None:
        """A process of two threads that has used `own` ticks, and whose dead have used `reaped`."""
        columns = ["S", str(parent), *["0"] * 9, str(own), "0", str(reaped), "0", "0"]
        for thread in (pid, pid + 100):
            (self.root / f"{pid}/task/{thread}").mkdir(parents=True, exist_ok=True)
            (self.root / f"{pid}/task/{thread}/children").write_text("")
        (self.root / f"{pid}/stat").write_text(f"{pid} (a name) of 2) {' '.join(columns)}")
        (self.root / f"{pid}/cmdline").write_text(title)
        if pid not in self.children.setdefault(parent, []):
            self.children[parent].append(pid)
        started = self.root / f"{parent}/task/{parent + 100}/children"  # by the second thread
        if started.exists():
            started.write_text(" ".join(map(str, self.children[parent])) + " ")

    def tree(self) -> list[int]:
        return sorted(int(path.name) for path in self.root.iterdir())


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Proc:
    """The HTTP server 1, its DP controller 2, whose scheduler 3 has forked 4, and started ninja 5 with nvcc 6."""
    root = tmp_path / "proc"
    root.mkdir()
    monkeypatch.setattr(process_files, "PROC", root)
    proc = Proc(root)
    proc.add(1, 0, "python -m sglang.launch_server")
    proc.add(2, 1, "sglang::data_parallel_controller", own=900)
    proc.add(3, 2, "sglang::scheduler_DP0", own=800, reaped=1)
    proc.add(4, 3, "sglang::scheduler_DP0", own=20)
    proc.add(5, 3, "ninja", own=300, reaped=4000)
    proc.add(6, 5, "nvcc", own=50000)
    return proc


def test_what_a_scheduler_has_started_counts_alive_and_dead(proc: Proc) -> None:
    assert process_files.helpers_s(3) == (1 + 20 + 300 + 4000 + 50000) / TICKS


def test_sglangs_own_processes_are_nobodys_helpers(proc: Proc) -> None:
    assert process_files.helpers_s(1) == 0


def test_a_process_that_has_gone_has_no_helpers(proc: Proc) -> None:
    assert process_files.helpers_s(77) == 0


def test_schedulers_have_to_write_and_what_they_have_forked_has_not(proc: Proc) -> None:
    assert HealthCheck(proc).schedulers == [3]


def test_an_engine_whose_scheduler_never_writes_is_ill(proc: Proc, tmp_path: Path) -> None:
    watch = EngineWatch(proc, tmp_path / "no such folder", LIMITS)
    said = [watch.ailment(float(now)) for now in range(4)]
    assert said[:3] == [""] * 3
    assert said[3].startswith("is not watched: its scheduler process 3 has shown no progress at all for 3 s")


def test_an_engine_waits_for_its_compiler(proc: Proc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = {3: Beat(who="scheduler DP 0", moves=7, doing=engine_health.Doing.FORWARD)}
    monkeypatch.setattr(engine_health, "read_beats", lambda folder: stuck)
    check = ProgressCheck(tmp_path, LIMITS)
    for now in range(20):
        proc.add(6, 5, "nvcc", own=TICKS * now)
        assert check.ailment(float(now)) == ""
    said = [check.ailment(20.0 + now) for now in range(3)]
    assert said[2].startswith("hangs: its scheduler DP 0 has made no progress for 22 s")


def unreadable(folder: Path) -> Mapping[int, Beat]:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


class Alone:
    def tree(self) -> list[int]:
        return [ME]


def test_a_look_that_fails_now_and_then_is_no_illness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Pulse(tmp_path, "one").turn()
    watch, real = EngineWatch(Alone(), tmp_path, Limits(hang_s=99, blocked_s=99)), engine_health.read_beats
    for now in range(50):
        monkeypatch.setattr(engine_health, "read_beats", real if now % 5 == 4 else unreadable)
        assert watch.ailment(float(now)) == ""


def test_an_engine_that_cannot_be_looked_at_any_more_is_ill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_health, "read_beats", unreadable)
    watch = EngineWatch(Alone(), tmp_path, LIMITS)
    assert [watch.ailment(float(now)) for now in range(4)] == [""] * 4
    assert watch.ailment(4.0) == (
        "is not watched any more: 5 looks at its processes in a row failed: [Errno 24] Too many open files"
    )


def test_want_of_file_handles_does_not_make_a_process_look_dead(
    proc: Proc, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = EngineWatch(proc, tmp_path, LIMITS)
    assert watch.ailment(0.0) == ""
    monkeypatch.setattr(process_files, "_read", unreadable)
    assert watch.ailment(1.0) == ""


class WithWorker:
    """An engine of this process and a worker of its own."""

    def __init__(self, worker: int) -> None:
        self._worker = worker

    def tree(self) -> list[int]:
        return [ME, self._worker]


async def test_the_end_of_a_worker_is_seen_at_once(tmp_path: Path) -> None:
    title = "setproctitle.setproctitle('sglang::detokenizer')"
    code = f"import sys, setproctitle; {title}; print(flush=True); sys.stdin.read()"
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", code, **pipes)
    assert worker.stdin is not None
    assert worker.stdout is not None
    await worker.stdout.readline()
    watch = EngineWatch(WithWorker(worker.pid), tmp_path, Limits(hang_s=99, blocked_s=99))
    assert watch.ailment(0.0) == ""
    worker.stdin.close()
    async with asyncio.timeout(20):
        await watch.pause(3600.0)
    assert watch.ailment(1.0) == f"lost its process {worker.pid}"
    await worker.wait()


async def test_a_look_is_due_although_nothing_ends(tmp_path: Path) -> None:
    watch = EngineWatch(Alone(), tmp_path, LIMITS)
    assert watch.ailment(0.0) == ""
    async with asyncio.timeout(20):
        await watch.pause(0.01)
