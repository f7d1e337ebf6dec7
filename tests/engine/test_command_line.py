"""The `tandem` command against a real fleet."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from support.fleet import Fleet

pytestmark = pytest.mark.timeout(150)


def tandem(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = "from tandem.cli.main import app; app()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_status_names_everything_that_an_outside_check_needs(fleet: Fleet, tiny: Path) -> None:
    status = json.loads(tandem("status", "--json", "--fleet", "shared").stdout)
    assert status["model_path"] == str(tiny)
    prefill = next(group for group in status["groups"] if group["role"] == "prefill")
    assert prefill["url"].startswith("http://")
    assert prefill["bootstrap_port"] > 0
    for group in status["groups"]:
        assert group["state"] == "ready"
        assert group["epoch"] >= 1
        assert [rank["rank"] for rank in group["ranks"]] == [0, 1]
        assert len({rank["node"] for rank in group["ranks"]}) == 2
        for rank in group["ranks"]:
            assert Path(rank["log"]).is_file()
            assert Path(f"/proc/{rank['pid']}").exists()
    gateway = status["counters"][f"{status['gateways'][0]['url']}/metrics"]
    assert {"tandem_open_rooms", "tandem_completion_tokens_total"} <= gateway.keys()


def test_status_for_people_shows_every_group_and_rank(fleet: Fleet) -> None:
    shown = tandem("status", "--fleet", "shared").stdout
    assert all(word in shown for word in ("prefill-0", "decode-0", "rank 1", "ready", fleet.base))


def test_chat_streams_an_answer(fleet: Fleet) -> None:
    done = tandem("chat", "Hello", "--max-tokens", "8", "--fleet", "shared")
    assert done.returncode == 0
    assert done.stdout.strip()


def test_scaling_a_pool_up_and_down_starts_and_drains_whole_groups(fleet: Fleet) -> None:
    assert "starting decode-1" in tandem("scale", "decode", "2", "--fleet", "shared").stdout
    fleet.until("the new group is ready", lambda: states(fleet).get("decode-1") == "ready", 60)
    assert "draining decode-1" in tandem("scale", "decode", "1", "--fleet", "shared").stdout
    fleet.until("the group is gone", lambda: states(fleet).get("decode-1", "gone") == "gone", 60)
    assert states(fleet)["decode-0"] == "ready"


def states(fleet: Fleet) -> dict[str, str]:
    return {group["group"]: group["state"] for group in fleet.status()["groups"]}


def test_a_fleet_that_does_not_run_is_one_clear_sentence() -> None:
    done = tandem("status", "--fleet", "nobody")
    assert done.returncode == 1
    assert "no fleet named nobody runs on this machine: start it with `tandem up`" in done.stderr


def test_a_second_fleet_of_the_same_name_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("name: shared\ngateway: {port: 0, grpc_port: 0}\ncontrol: {port: 0}\n")
    done = tandem("up", "-f", str(file))
    assert done.returncode == 1
    assert "a fleet named shared already runs here" in done.stderr


def starting(file: Path, *options: str) -> tuple[subprocess.Popen[str], psutil.Process]:
    """A `tandem up` in its beginnings, and the host process that it has just started."""
    code = "from tandem.cli.main import app; app()"
    command = subprocess.Popen([sys.executable, "-c", code, "up", "-f", str(file), *options], text=True)
    deadline = time.monotonic() + 20
    while not (hosts := psutil.Process(command.pid).children()):
        assert command.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return command, hosts[0]


def test_a_second_up_that_is_interrupted_does_the_first_no_harm(fleet: Fleet, tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("name: shared\ngateway: {port: 0, grpc_port: 0}\ncontrol: {port: 0}\n")
    command, _ = starting(file)
    command.send_signal(signal.SIGINT)
    command.wait(30)
    assert fleet.folder.record() is not None
    assert len(fleet.complete([400, 500], 4)) == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_detached_up_that_ends_before_the_fleet_is_ready_takes_it_along(
    number: signal.Signals, tiny: Path, tmp_path: Path
) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text(f"name: early\nmodel: {{path: {tiny}}}\ngateway: {{port: 0, grpc_port: 0}}\ncontrol: {{port: 0}}\n")
    command, host = starting(file, "--detach")
    command.send_signal(number)
    command.wait(60)
    psutil.wait_procs([host], timeout=30)
    assert not host.is_running()


def test_a_layout_that_cannot_work_is_refused_before_anything_starts(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text(f"name: odd\nmodel: {{path: {tiny}}}\ndecode: {{nodes: 3}}\ngateway: {{port: 0, grpc_port: 0}}\n")
    done = tandem("up", "-f", str(file))
    assert done.returncode == 1
    assert "3" in done.stderr


def test_a_wrong_file_is_answered_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("prefill:\n  gropus: 1\n")
    assert f"{file}:2: prefill.gropus: no such field" in tandem("up", "-f", str(file)).stderr.replace("\n", "")


def test_doctor_tells_what_the_machine_has(home: Path) -> None:
    found = {line["what"] for line in json.loads(tandem("doctor", "--json").stdout)}
    assert {"GPUs", "RDMA devices", "HTTP port", "free memory", "sglang", "torch"} <= found
