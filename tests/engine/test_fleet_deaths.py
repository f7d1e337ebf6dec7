"""What happens when parts of a real fleet are killed."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import Any

import pytest

from support.fleet import Fleet
from support.oracle import Oracle

pytestmark = pytest.mark.timeout(180)

BACK_S = 60.0
PROMPT = [random.Random(11).randrange(300, 900) for _ in range(50)]


def whole(fleet: Fleet) -> bool:
    return all(group["state"] == "ready" for group in fleet.status()["groups"])


def pids(group: dict[str, Any]) -> list[int]:
    return [rank["pid"] for rank in group["ranks"]]


def until_answering(fleet: Fleet) -> None:
    """The gateway learns of a new epoch a moment after the status does."""
    fleet.until("the fleet is whole", lambda: whole(fleet), BACK_S)


@pytest.mark.parametrize(
    ("victim", "rank", "bystander"),
    [
        pytest.param("prefill-0", 0, "decode-0", id="prefill leader"),
        pytest.param("prefill-0", 1, "decode-0", id="prefill follower"),
        pytest.param("decode-0", 0, "prefill-0", id="decode leader"),
        pytest.param("decode-0", 1, "prefill-0", id="decode follower"),
    ],
)
def test_a_killed_rank_brings_its_group_back_at_the_next_epoch_and_no_other(
    fleet: Fleet, oracle: Oracle, victim: str, rank: int, bystander: str
) -> None:
    until_answering(fleet)
    before, other = fleet.group(victim), fleet.group(bystander)
    os.kill(before["ranks"][rank]["pid"], signal.SIGKILL)
    fleet.until("the next epoch is ready", lambda: _ready_at(fleet, victim, before["epoch"] + 1), BACK_S)
    assert not set(pids(fleet.group(victim))) & set(pids(before))
    assert pids(fleet.group(bystander)) == pids(other)
    assert fleet.group(bystander)["epoch"] == other["epoch"]
    assert fleet.complete(PROMPT, 8) == oracle.complete(PROMPT, 8)


def _ready_at(fleet: Fleet, name: str, epoch: int) -> bool:
    group = fleet.group(name)
    return group["epoch"] == epoch and group["state"] == "ready"


def test_a_killed_controller_comes_back_and_restarts_no_group(fleet: Fleet, oracle: Oracle) -> None:
    until_answering(fleet)
    before = {group["group"]: (group["epoch"], pids(group)) for group in fleet.status()["groups"]}
    controller = next(process for process in fleet.processes() if "Controller" in _title(process))
    controller.kill()
    assert fleet.complete(PROMPT, 8) == oracle.complete(PROMPT, 8)
    fleet.until("the control service answers again", lambda: bool(fleet.status()["loads"]), 30)
    time.sleep(2)  # would a restart come, it would come now: nothing tells that none will
    assert {group["group"]: (group["epoch"], pids(group)) for group in fleet.status()["groups"]} == before
    assert whole(fleet)


def test_a_killed_gcs_is_replaced_and_ends_nothing(fleet: Fleet, oracle: Oracle) -> None:
    until_answering(fleet)
    before = {group["group"]: (group["epoch"], pids(group)) for group in fleet.status()["groups"]}
    gateways = fleet.status()["gateways"]
    gcs = next(process for process in fleet.processes() if "gcs_server" in _title(process))
    gcs.kill()
    assert fleet.complete(PROMPT, 8) == oracle.complete(PROMPT, 8)
    fleet.until("there is another GCS", lambda: any("gcs_server" in _title(one) for one in fleet.processes()), 30)
    assert {group["group"]: (group["epoch"], pids(group)) for group in fleet.status()["groups"]} == before
    assert fleet.status()["gateways"] == gateways
    # It knows the actors, and can place new ones.
    victim = fleet.group("decode-0")
    os.kill(victim["ranks"][1]["pid"], signal.SIGKILL)
    fleet.until("the next epoch is ready", lambda: _ready_at(fleet, "decode-0", victim["epoch"] + 1), BACK_S)
    assert pids(fleet.group("prefill-0")) == before["prefill-0"][1]
    assert fleet.complete(PROMPT, 8) == oracle.complete(PROMPT, 8)


def _title(process: Any) -> str:
    return " ".join(process.cmdline()) if process.is_running() else ""
