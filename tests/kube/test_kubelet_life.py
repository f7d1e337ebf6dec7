"""The process kubelet: how pods live and end, where they run, and what a lost node or API server does to them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from kube.cluster import Cluster
from kube.conftest import NODES, RACK
from kube.control_plane import budget_api
from kube.kubelet.rest import Object
from kube.manifests import pod, service, workload
from kube.pods import FOREVER, SOON, end_of, fetch, main_status, node_of, ready, serve

GPU = "nvidia.com/gpu"


# How it lives, and ends.


def test_a_readiness_probe_decides_whether_traffic_comes(cluster: Cluster, namespace: str) -> None:
    probe = {"exec": {"command": ["test", "-e", "/let-me"]}, "periodSeconds": 1, "failureThreshold": 1}
    script = "trap 'touch /let-me' USR1; echo up; while true; do sleep 0.1; done"
    cluster.apply(pod("shy", "sh", "-c", script, container={"readinessProbe": probe}), namespace=namespace)
    cluster.wait(lambda: "up" in cluster.kubelet.logs("shy", namespace=namespace), SOON, "shy runs")
    cluster.wait(
        lambda: any(event.startswith("Unhealthy: Readiness") for event in cluster.events("shy", namespace)),
        SOON,
        "the probe has failed",
    )
    assert not cluster.ready("shy", namespace)
    (pid,) = cluster.kubelet.pids("shy", namespace)
    os.kill(pid, signal.SIGUSR1)
    ready(cluster, namespace, "shy")


def test_a_container_whose_liveness_fails_is_restarted(cluster: Cluster, namespace: str) -> None:
    probe = {"httpGet": {"port": 8000}, "periodSeconds": 1, "failureThreshold": 1, "initialDelaySeconds": 1}
    cluster.apply(pod("ill", *FOREVER, container={"livenessProbe": probe}), namespace=namespace)
    cluster.wait(lambda: main_status(cluster, "ill", namespace)["restartCount"] >= 1, SOON, "a restart")
    assert main_status(cluster, "ill", namespace)["lastState"]["terminated"]["exitCode"] == 137


def test_other_probes_wait_for_the_startup_probe(cluster: Cluster, namespace: str) -> None:
    container = {
        "startupProbe": {"tcpSocket": {"port": "http"}, "periodSeconds": 1, "failureThreshold": 60},
        "livenessProbe": {"httpGet": {"port": "http"}, "periodSeconds": 1, "failureThreshold": 1, "timeoutSeconds": 10},
        "ports": [{"name": "http", "containerPort": 8000}],
    }
    script = f"sleep 3; {serve('up')[2]}"
    cluster.apply(pod("slow", "sh", "-c", script, container=container), namespace=namespace)
    ready(cluster, namespace, "slow")
    assert main_status(cluster, "slow", namespace)["restartCount"] == 0


def test_pre_stop_runs_before_sigterm(cluster: Cluster, namespace: str) -> None:
    hook = {"preStop": {"exec": {"command": ["sh", "-c", "echo hook > /proc/1/fd/1"]}}}
    script = "trap 'echo term; exit 0' TERM; echo up; while true; do sleep 0.1; done"
    container = {"lifecycle": hook}
    cluster.apply(
        pod("tidy", "sh", "-c", script, terminationGracePeriodSeconds=30, container=container), namespace=namespace
    )
    cluster.wait(lambda: "up" in cluster.kubelet.logs("tidy", namespace=namespace), SOON, "tidy is up")
    cluster.kubectl("delete", "pod", "tidy", "--namespace", namespace)
    assert cluster.kubelet.logs("tidy", namespace=namespace).split() == ["up", "hook", "term"]


def test_who_does_not_end_within_its_grace_is_killed(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("deaf", *FOREVER, terminationGracePeriodSeconds=2), namespace=namespace)
    ready(cluster, namespace, "deaf")
    (pid,) = cluster.kubelet.pids("deaf", namespace)
    cluster.kubectl("delete", "pod", "deaf", "--namespace", namespace)
    assert not Path(f"/proc/{pid}").exists()


def test_an_eviction_ends_a_pod_unless_its_budget_forbids(cluster: Cluster, namespace: str) -> None:
    spec = {"minAvailable": 1, "selector": {"matchLabels": {"app": "kept"}}}
    budget = {"apiVersion": budget_api(), "kind": "PodDisruptionBudget", "metadata": {"name": "b"}, "spec": spec}
    cluster.apply(budget, pod("kept", *FOREVER), namespace=namespace)
    ready(cluster, namespace, "kept")
    said = cluster.kubectl("drain", "--pod-selector=app=kept", "--force", "--timeout=5s", *NODES, check=False)
    cluster.kubectl("uncordon", *NODES)
    assert "violate the pod's disruption budget" in said
    assert cluster.pod("kept", namespace) is not None


@pytest.mark.parametrize(
    ("policy", "command", "phase", "code"),
    [("Never", "exit 3", "Failed", 3), ("OnFailure", "exit 0", "Succeeded", 0)],
)
def test_a_pod_that_ends_for_good(
    cluster: Cluster, namespace: str, policy: str, command: str, phase: str, code: int
) -> None:
    cluster.apply(pod("ends", "sh", "-c", command, restartPolicy=policy), namespace=namespace)
    ended = end_of(cluster, "ends", namespace)
    found = cluster.pod("ends", namespace)
    assert found is not None
    assert (found["status"]["phase"], ended["exitCode"]) == (phase, code)


def test_a_container_that_fails_is_restarted_with_back_off(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("fails", "sh", "-c", "exit 3"), namespace=namespace)

    def backs_off() -> bool:
        state = main_status(cluster, "fails", namespace)["state"]
        return state.get("waiting", {}).get("reason") == "CrashLoopBackOff"

    cluster.wait(backs_off, SOON, "CrashLoopBackOff")
    status = main_status(cluster, "fails", namespace)
    assert status["restartCount"] >= 1
    assert status["lastState"]["terminated"]["exitCode"] == 3


def test_a_command_that_does_not_exist_is_told(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("typo", "no-such-program", restartPolicy="Never"), namespace=namespace)
    ended = end_of(cluster, "typo", namespace)
    assert ended["reason"] == "StartError"
    assert "no-such-program" in ended["message"]


# Where it runs.


def test_a_pod_that_no_node_can_take_says_why(cluster: Cluster, namespace: str) -> None:
    container = {"resources": {"limits": {GPU: "9"}}}
    cluster.apply(pod("large", *FOREVER, container=container), namespace=namespace)

    def waits() -> bool:
        found = cluster.pod("large", namespace)
        conditions = found["status"].get("conditions", []) if found else []
        return any("4 Insufficient nvidia.com/gpu" in one.get("message", "") for one in conditions)

    cluster.wait(waits, SOON, "Unschedulable")


def gang(name: str, size: int, gpus: int) -> Object:
    """A StatefulSet whose pods are a gang within one rack."""
    term = {"labelSelector": {"matchLabels": {"tandem.dev/group": name}}, "topologyKey": RACK}
    affinity = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    container = {"resources": {"limits": {GPU: str(gpus)}}}
    template = pod(name, *FOREVER, labels={"tandem.dev/group": name}, affinity=affinity, container=container)
    return workload("StatefulSet", name, size, template, serviceName=name, podManagementPolicy="Parallel")


def test_a_gang_is_bound_whole_within_one_rack_or_not_at_all(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("small", *FOREVER, container={"resources": {"limits": {GPU: "1"}}}), namespace=namespace)
    ready(cluster, namespace, "small")
    cluster.apply(gang("one", 2, 8), gang("two", 2, 8), namespace=namespace)
    # Both come at once: which of them the controller manager makes first is its own affair.
    first = cluster.wait(lambda: next((g for g in ("one", "two") if cluster.ready(f"{g}-0", namespace)), None), SOON)
    ready(cluster, namespace, f"{first}-1")
    racks = {NODES[str(node_of(cluster, namespace, f"{first}-{rank}"))] for rank in (0, 1)}
    assert len(racks) == 1
    assert racks != {NODES[str(node_of(cluster, namespace, "small"))]}
    (other,) = {"one", "two"} - {first}
    cluster.wait(
        lambda: any("FailedScheduling" in one for one in cluster.events(f"{other}-0", namespace)), SOON, "it waits"
    )
    assert node_of(cluster, namespace, f"{other}-0") is node_of(cluster, namespace, f"{other}-1") is None
    cluster.kubectl("delete", "pod", "small", "--namespace", namespace)
    ready(cluster, namespace, f"{other}-0", f"{other}-1")


def test_pods_of_a_lost_node_die_and_come_up_elsewhere(cluster: Cluster, namespace: str) -> None:
    cluster.apply(workload("StatefulSet", "moves", 1, pod("moves", *FOREVER), serviceName="moves"), namespace=namespace)
    ready(cluster, namespace, "moves-0")
    node = str(node_of(cluster, namespace, "moves-0"))
    (pid,) = cluster.kubelet.pids("moves-0", namespace)
    cluster.kubelet.lose_node(node)
    try:
        cluster.wait(lambda: not Path(f"/proc/{pid}").exists(), SOON, "the process is dead")
        cluster.wait(lambda: node_of(cluster, namespace, "moves-0") not in (None, node), SOON, "another node")
        ready(cluster, namespace, "moves-0")
    finally:
        cluster.kubelet.return_node(node)
    cluster.kubectl("wait", "--for=condition=Ready", f"node/{node}", "--timeout=30s")


def test_pods_start_again_on_a_node_that_comes_back_soon(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("stays", *FOREVER), namespace=namespace)
    ready(cluster, namespace, "stays")
    node = str(node_of(cluster, namespace, "stays"))
    before = cluster.kubelet.pids("stays", namespace)
    cluster.kubelet.lose_node(node, evict_s=None)
    cluster.wait(lambda: not cluster.ready("stays", namespace), SOON, "stays is not ready")
    cluster.kubelet.return_node(node)
    ready(cluster, namespace, "stays")
    assert cluster.kubelet.pids("stays", namespace) != before


def test_a_pod_on_the_host_network_has_its_nodes_address(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("host", *serve("host"), hostNetwork=True), namespace=namespace)
    ready(cluster, namespace, "host")
    found = cluster.pod("host", namespace)
    assert found is not None
    assert found["status"]["podIP"] == found["status"]["hostIP"]
    address = f"{found['status']['podIP']}:8000"
    assert cluster.wait(lambda: fetch(address), SOON, "an answer") == "host"


def test_pods_run_on_while_the_api_server_is_away(cluster: Cluster, namespace: str) -> None:
    cluster.apply(pod("steady", *serve("steady")), service("steady", 80), namespace=namespace)
    address = cluster.address("steady", namespace)
    cluster.wait(lambda: fetch(address), SOON, "an answer")
    (pid,) = cluster.kubelet.pids("steady", namespace)
    cluster.control_plane.stop_api_server()
    try:
        assert fetch(address) == "steady"
    finally:
        cluster.control_plane.start_api_server()
    assert cluster.kubelet.pids("steady", namespace) == [pid]
    assert cluster.ready("steady", namespace)
