"""The operator on a real API server. Its pods do not start (no image); a control service stands for a fleet."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from kube.cluster import Cluster
from kube.fleet_control import FleetControl

pytestmark = pytest.mark.timeout(900)

CRDS = Path(__file__).parents[2] / "helm" / "tandem" / "crds"
IMAGE = "registry.invalid/tandem:none"
KINDS = "fleets,epp,epg,statefulsets,services,configmaps,poddisruptionbudgets"
SOON = 240.0
"""Seconds; the machine may be busy."""


@pytest.fixture(scope="module")
def crds(cluster: Cluster) -> None:
    """Our resources are served, and their objects are garbage-collected."""
    cluster.kubelet.missing_images.add(IMAGE)
    cluster.kubectl("apply", "-f", str(CRDS))
    cluster.kubectl("wait", "--for=condition=Established", "--timeout=60s", "crd", "--all")
    cluster.control_plane.restart_controller_manager()


@dataclass
class Operator:
    """One replica, as a process."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int

    def counted(self, name: str, **labels: str) -> float:
        """The sum of a metric over all others of its labels; 0 while it is not there."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as answer:
                text = answer.read().decode()
        except OSError:
            return 0.0
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        lines = [line for line in text.splitlines() if line.partition("{")[0].partition(" ")[0] == name]
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(part in line for part in wanted))

    def is_ready(self) -> bool:
        """Whether its readiness probe passes."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def looks(self, kind: str) -> float:
        """How often it has looked at objects of that kind, with success."""
        return self.counted("tandem_operator_reconciles_total", kind=kind, result="done")

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)
        self.process.wait(60)


@dataclass
class World:
    """A namespace with a Fleet, a control service, and operators."""

    cluster: Cluster
    namespace: str
    folder: Path
    control: FleetControl
    operators: list[Operator] = field(default_factory=list)

    def operator(self) -> Operator:
        """Start one more."""
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as probe:
            port = probe.getsockname()[1]
        log = self.folder / f"operator-{len(self.operators)}.log"
        command = [sys.executable, "-m", "tandem_operator.main", "run", "--namespace", self.namespace]
        command += ["--port", str(port), "--lease-namespace", self.namespace, "--lease-seconds", "20"]
        env = {**os.environ, "KUBECONFIG": str(self.cluster.kubeconfig)}
        env["TANDEM_OPERATOR_CONTROL"] = f"127.0.0.1:{self.control.port}"
        with log.open("wb") as out:
            process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
        self.operators.append(Operator(process, log, port))
        return self.operators[-1]

    def fleet(self, name: str = "f", **spec: Any) -> None:
        """Apply a Fleet."""
        pool = {"nodes": 2, "gpusPerNode": 1, "rollout": {"canarySeconds": 0}}
        image = {"name": IMAGE}
        body = {
            "apiVersion": "tandem.dev/v1alpha1",
            "kind": "Fleet",
            "metadata": {"name": name},
            "spec": {"device": "cpu", "images": {"engine": image, "redis": image}, "prefill": pool, "decode": pool},
        }
        body["spec"].update(spec)  # type: ignore[attr-defined]
        self.cluster.apply(body, namespace=self.namespace)

    def all(self) -> dict[str, dict[str, Any]]:
        """Every object that is the fleet's, by kind/name."""
        found = json.loads(self.cluster.kubectl("get", KINDS, "-n", self.namespace, "-o", "json"))["items"]
        ours = [
            one for one in found if "tandem.dev/fleet" in one["metadata"].get("labels", {}) or one["kind"] == "Fleet"
        ]
        return {f"{one['kind']}/{one['metadata']['name']}": one for one in ours}

    def one(self, name: str) -> dict[str, Any] | None:
        return self.all().get(name)

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        status = (self.one(name) or {}).get("status") or {}
        return next((entry for entry in status.get("conditions", ()) if entry["type"] == kind), {"status": "?"})

    def calm(self) -> bool:
        """Whether both groups of a new fleet have told of all their pods that they find no image, the last news."""
        groups = ("ExpertParallelGroup/f-prefill-0", "ExpertParallelGroup/f-decode-0")
        told = [self.condition(group, "PodsReady").get("message", "") for group in groups]
        assert all(message.count("ErrImagePull") == 2 for message in told), f"they say {told}"
        return True

    def ready(self, summary: str = "1/1 1/1") -> None:
        """Wait until that many groups are ready, and all is told."""

        def told() -> bool:
            found = self.all()
            groups = [one for name, one in found.items() if name.startswith("ExpertParallelGroup/")]
            fleet = found.get("Fleet/f", {}).get("status") or {}
            waiting = [one["metadata"]["name"] for one in groups if (one.get("status") or {}).get("phase") != "Ready"]
            assert not waiting, f"{waiting} are not ready"
            assert fleet.get("summary") == summary, f"the fleet has {fleet.get('summary')}"
            pools = [one.get("status") or {} for name, one in found.items() if name.startswith("ExpertParallelPool/")]
            assert all(pool.get("ready") == pool.get("replicas") for pool in pools), "pools do not know"
            return True

        self.wait(told)

    def wait(self, true: Any, what: str = "") -> Any:
        return self.cluster.wait(true, SOON, what)

    def write_report(self) -> str:
        return "\n".join(operator.log.read_text(errors="replace")[-4000:] for operator in self.operators)


@pytest.fixture
def world(cluster: Cluster, crds: None, namespace: str, tmp_path: Path) -> Iterator[World]:
    made = World(cluster, namespace, tmp_path, FleetControl())
    try:
        yield made
    finally:
        for operator in made.operators:
            if operator.process.poll() is None:
                operator.kill()
        print(made.write_report())  # in the report of a test that fails
        # Whatever a failed test left waits for a drain that nobody does any more.
        for group in json.loads(cluster.kubectl("get", "epg", "-n", namespace, "-o", "json"))["items"]:
            name = group["metadata"]["name"]
            patch = '{"metadata":{"finalizers":null}}'
            cluster.kubectl("patch", "epg", name, "-n", namespace, "--type=merge", "-p", patch, check=False)
        made.control.close()


def test_a_fleet_comes_up_with_everything_that_it_needs(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    assert set(world.all()) == {
        "Fleet/f",
        *(f"ConfigMap/f-{part}" for part in ("config", "rollout")),
        *(f"Service/{name}" for name in ("f", "f-head", "f-redis", "f-prefill-0", "f-decode-0")),
        *(f"StatefulSet/f-{part}" for part in ("head", "gateway", "redis", "prefill-0", "decode-0")),
        *(f"PodDisruptionBudget/f-{part}" for part in ("gateway", "prefill", "decode")),
        *(f"ExpertParallelPool/f-{role}" for role in ("prefill", "decode")),
        *(f"ExpertParallelGroup/f-{group}" for group in ("prefill-0", "decode-0")),
    }
    assert sorted(world.control.asked("put")) == ["decode-0", "prefill-0"]
    assert world.condition("Fleet/f", "ControlReachable")["status"] == "True"
    # No gateway runs, so nobody is answered, and the fleet says so.
    assert world.condition("Fleet/f", "Available")["message"] == "no gateway is ready"


def test_a_group_says_what_its_pods_wait_for(world: World) -> None:
    world.fleet()
    world.operator()
    world.wait(world.calm)
    told = world.condition("ExpertParallelGroup/f-decode-0", "PodsReady")["message"]
    assert f"f-decode-0-1: ErrImagePull: the image {IMAGE} cannot be pulled" in told


def test_a_second_pass_writes_nothing(world: World) -> None:
    world.fleet()
    first = world.operator()
    world.ready()
    world.wait(world.calm)
    first.kill(signal.SIGTERM)
    before = {name: one["metadata"]["resourceVersion"] for name, one in world.all().items()}
    second = world.operator()
    looks = {"ExpertParallelGroup": 4, "Fleet": 2, "Pools": 2}
    for kind, times in looks.items():
        world.wait(lambda kind=kind, times=times: second.looks(kind) >= times, kind)
    assert second.counted("tandem_operator_writes_total") == 0
    assert {name: one["metadata"]["resourceVersion"] for name, one in world.all().items()} == before


def test_whatever_is_deleted_comes_back(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    before = {name: one["metadata"]["uid"] for name, one in world.all().items()}
    children = sorted(name for name in before if name.partition("/")[0] not in ("Fleet", "ExpertParallelGroup"))
    children.remove("ExpertParallelPool/f-prefill")  # its group goes with it
    children.remove("ExpertParallelPool/f-decode")
    world.cluster.kubectl("delete", "-n", world.namespace, "--wait=false", *children)

    def back() -> bool:
        now = {name: one["metadata"]["uid"] for name, one in world.all().items()}
        same = [name for name in children if now.get(name, before[name]) == before[name]]
        assert not same, f"{same} are not new"
        return True

    world.wait(back)
    assert world.control.asked("drain") == []


def test_kubectl_scale_adds_a_group_and_drains_one(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    scale = ("scale", "epp", "f-decode", "-n", world.namespace)
    world.cluster.kubectl(*scale, "--replicas=2")
    world.ready("1/1 2/2")
    world.cluster.kubectl(*scale, "--replicas=1")
    world.ready("1/1 1/1")
    assert len(world.control.asked("drain")) == 1
    world.wait(lambda: len([name for name in world.all() if name.startswith("StatefulSet/f-decode-")]) == 1)
    events = world.cluster.events("f-decode", world.namespace)
    assert any("drains and goes: 1 group is wanted" in event for event in events)


def test_a_number_that_somebody_set_stands_until_the_fleet_says_another(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    world.cluster.kubectl("scale", "epp", "f-decode", "-n", world.namespace, "--replicas=2")
    world.ready("1/1 2/2")
    pool = {"nodes": 2, "gpusPerNode": 1, "rollout": {"canarySeconds": 0}}
    world.fleet(slo={"ttftSeconds": 9})
    world.wait(lambda: '"ttft_s": 9' in world.all()["ConfigMap/f-config"]["data"]["fleet.json"])
    world.ready("1/1 2/2")
    world.fleet(decode={**pool, "groups": 3})
    world.ready("1/1 3/3")


def test_a_group_that_is_deleted_drains_before_it_is_gone(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    world.control.holds = True
    uid = world.all()["ExpertParallelGroup/f-decode-0"]["metadata"]["uid"]
    world.cluster.kubectl("delete", "epg", "f-decode-0", "-n", world.namespace, "--wait=false")
    world.wait(lambda: world.control.asked("drain") == ["decode-0"])
    world.wait(lambda: world.one("ExpertParallelGroup/f-decode-1"), "another group in its place")
    told = world.wait(
        lambda: [c for c in [world.condition("ExpertParallelGroup/f-decode-0", "Drained")] if c["status"] == "False"]
    )
    assert told[0]["reason"] == "Draining"
    held = world.all()
    assert held["ExpertParallelGroup/f-decode-0"]["metadata"]["finalizers"] == ["tandem.dev/drain"]
    assert "StatefulSet/f-decode-0" in held
    world.control.let_go("decode-0")
    world.wait(lambda: "ExpertParallelGroup/f-decode-0" not in world.all())
    world.wait(lambda: "StatefulSet/f-decode-0" not in world.all())
    assert world.all()["ExpertParallelGroup/f-decode-1"]["metadata"]["uid"] != uid


def test_a_group_that_is_still_needed_stays_and_says_so(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    world.control.refuses = "decode-0 is the last decode group that is ready."
    world.cluster.kubectl("delete", "epg", "f-decode-0", "-n", world.namespace, "--wait=false")
    world.wait(lambda: world.condition("ExpertParallelGroup/f-decode-0", "Drained").get("reason") == "StillNeeded")
    annotate = ("annotate", "epg", "f-decode-0", "-n", world.namespace, "tandem.dev/force-drain=true")
    world.cluster.kubectl(*annotate)
    world.wait(lambda: "ExpertParallelGroup/f-decode-0" not in world.all())


def test_an_operator_that_is_killed_in_the_middle_of_a_drain_goes_on_with_it(world: World) -> None:
    world.fleet()
    first = world.operator()
    world.ready()
    world.control.holds = True
    world.cluster.kubectl("delete", "epg", "f-decode-0", "-n", world.namespace, "--wait=false")
    world.wait(lambda: world.control.asked("drain") == ["decode-0"])
    first.kill()
    world.control.let_go("decode-0")
    assert "ExpertParallelGroup/f-decode-0" in world.all()
    world.operator()
    world.wait(lambda: "ExpertParallelGroup/f-decode-0" not in world.all())
    assert world.control.asked("drain") == ["decode-0"]


def test_a_group_that_an_evicted_pod_drained_is_put_again(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    world.control.let_go("decode-0")  # what `tandem node leave` brings about
    world.wait(lambda: world.control.asked("put").count("decode-0") == 2)
    world.ready()
    assert "ExpertParallelGroup/f-decode-1" not in world.all()


def test_deleting_the_fleet_leaves_nothing_though_its_head_is_gone(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    world.control.stop()
    world.cluster.kubectl("delete", "fleet", "f", "-n", world.namespace)
    world.wait(lambda: not world.all(), "nothing")
    assert world.control.asked("drain") == []


def test_of_two_operators_one_acts_and_the_other_takes_over(world: World) -> None:
    first = world.operator()
    world.wait(lambda: first.counted("tandem_operator_leader") == 1)
    second = world.operator()
    world.wait(second.is_ready)
    world.fleet()
    world.ready()
    assert second.counted("tandem_operator_writes_total") == 0
    assert second.counted("tandem_operator_leader") == 0
    first.kill()
    world.wait(lambda: second.counted("tandem_operator_leader") == 1)
    world.cluster.kubectl("scale", "epp", "f-decode", "-n", world.namespace, "--replicas=2")
    world.ready("1/1 2/2")


def test_a_fleet_that_cannot_be_says_why(world: World) -> None:
    world.fleet(planning={"gpuBudget": 1})
    world.operator()
    world.wait(lambda: world.condition("Fleet/f", "Valid")["status"] == "False")
    assert "above planning.gpuBudget (1)" in world.condition("Fleet/f", "Valid")["message"]
    assert set(world.all()) == {"Fleet/f"}
    world.fleet(ray={"address": "ray.example:6379"})
    world.wait(lambda: world.condition("Fleet/f", "Valid").get("reason") == "NotSupported")
    assert set(world.all()) == {"Fleet/f"}
    world.fleet()
    world.ready()
    assert world.condition("Fleet/f", "Valid")["status"] == "True"
