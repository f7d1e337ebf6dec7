"""The first group of a revision on a real API server: nobody is sent to it before it has answered a known prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from kube.cluster import Cluster
from kube.fleet_control import FleetControl
from kube.operator_world import NOWHERE, World, pool
from tandem.core.group_check import CheckVerdict, GroupCheck

pytestmark = pytest.mark.timeout(600)

UNKNOWN = GroupCheck(verdict=CheckVerdict.UNKNOWN, message="was being asked when prefill-0 restarted or left")
WRONG = GroupCheck(verdict=CheckVerdict.WRONG, message="it says Rome")


@pytest.fixture
def world(cluster: Cluster, crds: None, namespace: str, tmp_path: Path) -> Iterator[World]:
    """A Fleet that serves, whose pods are never scheduled; an operator looks after it."""
    made = World(cluster, namespace, tmp_path, FleetControl())
    try:
        part = {part: {"pods": NOWHERE} for part in ("gateway", "ray", "redis")}
        made.fleet(prefill=pool(), decode=pool(), **part)
        made.operator()
        made.ready()
        yield made
    finally:
        made.close()


def change(world: World, seed: int) -> None:
    """Decode gets other flags."""
    patch = {"spec": {"decode": {"args": [f"--random-seed={seed}"]}}}
    world.kubectl("patch", "fleet", "f", "--type=merge", "-p", json.dumps(patch))


def replaced(world: World, name: str) -> bool:
    """Whether decode's only group is this one, ready."""
    groups = {key.partition("/f-")[2]: one for key, one in world.all().items() if key.startswith("ExpertParallelGroup")}
    assert set(groups) == {"prefill-0", name}, f"there are {sorted(groups)}"
    phase = (groups[name].get("status") or {}).get("phase")
    assert phase == "Ready", f"{name} is {phase}"
    return True


def test_a_canary_serves_when_it_has_answered_and_a_wrong_one_never(world: World) -> None:
    world.control.answers = {"decode-1": [UNKNOWN, GroupCheck(verdict=CheckVerdict.OK)]}
    world.control.answers |= {name: [WRONG] for name in ("decode-0", "decode-2")}
    change(world, 1)
    world.wait(lambda: replaced(world, "decode-1"))
    assert world.control.asked("check") == ["decode-1", "decode-1"]
    assert world.condition("ExpertParallelGroup/f-decode-1", "Checked")["status"] == "True"

    world.control.routed.clear()
    change(world, 2)  # its group is decode-0 again, if the operator has seen by then that the number is free

    def failed() -> bool:
        told = world.condition("ExpertParallelPool/f-decode", "Degraded")
        assert told.get("reason") == "RevisionFailed", f"it says {told}"
        return True

    world.wait(failed)
    world.wait(lambda: replaced(world, "decode-1"))
    *before, wrong = world.control.asked("check")
    assert before == ["decode-1", "decode-1"]
    assert wrong not in world.control.routed
    told = world.condition("ExpertParallelPool/f-decode", "Degraded")["message"]
    assert f"{wrong} failed the known prompt: it says Rome; 1 group of revision" in told
    assert "AnswersWrongly" in world.kubectl("get", "events")
