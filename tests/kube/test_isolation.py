"""Sandboxes and containers without a cluster: what is left when their starter is killed."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kube.kubelet import remove_leftovers

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces (CI is root)")

STARTER = """
import json, os, signal, sys
from pathlib import Path
from kube.kubelet.processes import ContainerProcess, Sandbox

base = Path(sys.argv[1])
for name in ("shm", "root"):
    (base / name).mkdir()
sandbox = Sandbox("pod", {str(base / "shm"): 1 << 20})
order = {
    "sandbox": sandbox.pid, "root": str(base / "root"), "hidden": ["/run"], "memory": str(base / "shm"), "files": {},
    "links": {}, "mounts": [], "read_only_root": False, "directory": "/", "env": {"PATH": os.environ["PATH"]},
    "argv": ["sh", "-c", "sleep 1000 & exec sleep 1000"],
}
container = ContainerProcess(order, base / "log")
print(json.dumps([sandbox.pid, container.pid]), flush=True)
signal.pause()
"""


def ends(descriptor: int, within: float) -> bool:
    """Whether a process, by its pidfd, ends."""
    return bool(select.select([descriptor], [], [], within)[0])


def test_everything_dies_with_who_started_it(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(tmp_path)], stdout=subprocess.PIPE, env=env)
    try:
        assert starter.stdout is not None
        handles = [os.pidfd_open(pid) for pid in json.loads(starter.stdout.readline())]
    finally:
        starter.send_signal(signal.SIGKILL)
        starter.communicate()
    assert all(ends(handle, 30) for handle in handles)
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_folders_of_runs_that_are_no_more_are_removed(tmp_path: Path) -> None:
    done = subprocess.Popen(["true"])
    done.wait()
    old, own, other = tmp_path / f"run-{done.pid}-x", tmp_path / f"run-{os.getpid()}-x", tmp_path / "run-y"
    for folder in (old, own, other):
        folder.mkdir()
    remove_leftovers(tmp_path, "run")
    assert [folder.exists() for folder in (old, own, other)] == [False, True, True]
