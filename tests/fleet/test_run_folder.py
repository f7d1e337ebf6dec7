"""The record of a run on this machine, and the sweep of what it left."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from tandem.fleet.run_folder import RUN_VARIABLE, AlreadyRunningError, HostRecord, RunFolder, processes_of, sweep


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setenv("TANDEM_HOME", str(tmp_path))
    return RunFolder("a")


def record(pid: int, created: float, scratch: str = "/nonexistent") -> HostRecord:
    return HostRecord(pid=pid, created=created, run=uuid.uuid4().hex, scratch=scratch, store="embedded")


def sleeper(run: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], env={**os.environ, RUN_VARIABLE: run}
    )


def test_a_second_host_of_the_same_fleet_is_refused(folder: RunFolder) -> None:
    with folder.hold(), pytest.raises(AlreadyRunningError, match="named a already runs"), RunFolder("a").hold():
        pass


def test_a_host_is_alive_while_its_process_runs(folder: RunFolder) -> None:
    assert record(os.getpid(), psutil.Process().create_time()).alive


def test_a_later_process_with_the_same_pid_is_not_the_host() -> None:
    assert not record(os.getpid(), time.time() - 1e6).alive


def test_the_record_survives_a_restart(folder: RunFolder) -> None:
    written = record(1, 2.0)
    with folder.hold():
        folder.write(written)
    assert RunFolder("a").record() == written


def test_sweep_kills_the_processes_of_its_run_and_no_other() -> None:
    mine, other = uuid.uuid4().hex, uuid.uuid4().hex
    left, foreign = sleeper(mine), sleeper(other)
    try:
        assert sweep(mine) == 1
        assert not psutil.pid_exists(left.pid)
        assert [process.pid for process in processes_of(other)] == [foreign.pid]
    finally:
        for process in (left, foreign):
            process.kill()
            process.wait()


def test_clear_forgets_the_record_and_the_scratch_folder(folder: RunFolder, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with folder.hold():
        folder.write(record(1, 2.0, str(scratch)))
        folder.clear()
    assert folder.record() is None
    assert not scratch.exists()
