"""A Fleet in a Ray cluster that is there already, as KubeRay makes one: pods that run `ray start`, with real engines.

The tests share one fleet and follow each other.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kube.cluster import Cluster
from kube.live_fleet import NAME, OPERATOR_IMAGE, LiveFleet, install
from tandem.fleet.ray_processes import RANK_RESOURCE
from tandem.models.tiny import ensure_tiny

pytestmark = pytest.mark.timeout(900)
START_S = 240.0
RAY_START = (
    "exec python -m ray.scripts.scripts start --block --disable-usage-stats --node-ip-address=$POD_IP --num-cpus=2"
)
MEMORY = "--object-store-memory=80000000 --plasma-directory=/tmp"


def ray_pod(name: str, flags: str, *, ranks: int = 0) -> dict[str, Any]:
    """A pod of somebody's Ray cluster."""
    resources = json.dumps({RANK_RESOURCE: ranks} if ranks else {})
    folders = {"tmp": "/tmp", "shm": "/dev/shm"}
    container = {
        "name": "ray",
        "image": OPERATOR_IMAGE,
        "command": ["sh", "-c", f"{RAY_START} {MEMORY} --resources='{resources}' {flags}"],
        "env": [
            {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "RAY_AUTH_MODE", "value": "disabled"},
            {"name": "HOME", "value": "/tmp"},
        ],
        "volumeMounts": [{"name": volume, "mountPath": folder} for volume, folder in folders.items()],
    }
    volumes = [{"name": "tmp", "emptyDir": {}}, {"name": "shm", "emptyDir": {"medium": "Memory"}}]
    meta = {"name": name, "labels": {"app": name}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": meta,
        "spec": {"nodeName": "node-b1", "containers": [container], "volumes": volumes},
    }


def worker(fleet: LiveFleet, name: str) -> None:
    """One more node of the Ray cluster, with room for one rank."""
    address = f"--address=ray.{fleet.namespace}.svc:6379"
    fleet.cluster.apply(ray_pod(name, address, ranks=1), namespace=fleet.namespace)


@pytest.fixture(scope="module")
def model() -> Iterator[Path]:
    """The tiny model in a folder that all pods see: they have a /tmp of their own."""
    folder = Path(tempfile.mkdtemp(prefix=".tandem-model-", dir=Path(__file__).parents[2]))
    try:
        ensure_tiny(folder / "tiny")
        yield folder / "tiny"
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def fleet(cluster: Cluster, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFleet]:
    with cluster.namespace("ray") as namespace:
        ray = {"address": f"ray.{namespace}.svc:6379"}
        folder = tmp_path_factory.mktemp("fleet")
        given = {"ray": ray, "model": {"path": str(model)}, "gateway": {"auth": "off", "replicas": 1}}
        live = install(cluster, namespace, folder, operator={"rayClusters": True}, **given)
        service = {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": {"app": "ray-head"}}
        named = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "ray"}, "spec": service}
        head = ray_pod("ray-head", "--head --port=6379 --include-dashboard=false")
        cluster.apply(named, head, namespace=namespace)
        started = "Ray runtime started"
        cluster.wait(lambda: started in cluster.kubelet.logs("ray-head", "ray", namespace), START_S, "Ray's head")
        for name in ("ray-1", "ray-2"):
            worker(live, name)
        try:
            cluster.wait(lambda: live.get("fleets", NAME).get("status", {}).get("phase") == "Ready", START_S, "ready")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{cluster.kubelet.tails(namespace)}") from None
        yield live


def pods(fleet: LiveFleet) -> set[str]:
    """Names of all pods but the operator's."""
    names = {one["metadata"]["name"] for one in fleet.cluster.kubelet.objects("pods", fleet.namespace)}
    return {name for name in names if not name.startswith("tandem-operator")}


def test_groups_on_rays_own_nodes_answer_exactly(fleet: LiveFleet) -> None:
    # Taking the references compares greedy answers with the oracle's.
    assert fleet.references().recipes
    assert pods(fleet) == {f"{NAME}-head-0", f"{NAME}-gateway-0", f"{NAME}-redis-0", "ray-head", "ray-1", "ray-2"}


def test_the_operator_says_what_it_cannot_do_there(fleet: LiveFleet) -> None:
    told = fleet.kubectl("describe", "fleet", NAME)
    assert "places the groups on its own nodes" in told
    assert "These settings have no meaning: prefill.pods.resources" in told


def test_a_group_for_which_there_is_no_node_waits_and_says_so_until_there_is(fleet: LiveFleet) -> None:
    fleet.kubectl("scale", "epp", f"{NAME}-decode", "--replicas=2")
    fleet.cluster.wait(lambda: "waits for nodes: 1" in fleet.kubectl("get", "epg", "-o", "json"), 90, "it says so")
    worker(fleet, "ray-3")
    fleet.cluster.wait(lambda: fleet.ready("decode", 2), START_S, "two decode groups")


def test_a_deleted_fleet_leaves_ray_as_it_was(fleet: LiveFleet) -> None:
    fleet.kubectl("delete", "fleet", NAME, "--wait=false")
    fleet.cluster.wait(lambda: not fleet.kubectl("get", "fleets", "-o", "name"), START_S, "the fleet is gone")
    fleet.cluster.wait(lambda: pods(fleet) == {"ray-head", "ray-1", "ray-2", "ray-3"}, START_S, "only Ray's are left")
    nodes = [pid for name in ("ray-1", "ray-2", "ray-3") for pid in fleet.cluster.kubelet.pids(name, fleet.namespace)]
    below = [command(one) for pid in nodes for one in psutil.Process(pid).children(recursive=True)]
    assert [one for one in below if "sglang" in one] == []


def command(process: psutil.Process) -> str:
    """Its command line; empty once it has ended."""
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
