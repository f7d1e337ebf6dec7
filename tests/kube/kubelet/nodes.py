"""Nodes: their registration, their loss, their return."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from kubernetes.client.exceptions import ApiException

from kube.kubelet.host import Host
from kube.kubelet.informer import Informer, key_of
from kube.kubelet.report import now
from kube.kubelet.rest import MERGE, STRATEGIC, Object, path

UNREACHABLE = "node.kubernetes.io/unreachable"

CAPACITY = {
    "cpu": "64",
    "memory": "512Gi",
    "pods": "110",
    "ephemeral-storage": "1Ti",
    "hugepages-2Mi": "64Gi",
    "hugepages-1Gi": "64Gi",
    "nvidia.com/gpu": "8",
    "rdma/hca_shared_devices": "8",
}
"""Of a node, unless a test says otherwise. These are numbers: the machine has what it has."""


class Nodes:
    """Registers nodes and plays the node lifecycle controller, which the control plane runs without."""

    def __init__(self, host: Host, pods: Informer) -> None:
        self._host = host
        self._rest = host.rest
        self._pods = pods
        self._lock = threading.Lock()
        self._lost: set[str] = set()
        self.names: set[str] = set()

    def is_lost(self, name: str) -> bool:
        """Whether a node is lost now."""
        return name in self._lost

    def add(self, name: str, labels: Mapping[str, str], capacity: Mapping[str, str], taints: list[Object]) -> None:
        """Register a node; one of this name that is there is brought up to date."""
        offered = {**CAPACITY, **capacity}
        system = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
        body = {"metadata": {"name": name, "labels": {**system, **labels}}}
        try:
            self._rest.persist("POST", path("nodes"), body)
        except ApiException as error:
            if error.status != 409:
                raise
            self._rest.persist("PATCH", path("nodes", None, name), body, content=MERGE)
        addresses = [
            {"type": "InternalIP", "address": self._host.node_address(name)},
            {"type": "Hostname", "address": name},
        ]
        status = {
            "capacity": offered,
            "allocatable": offered,
            "addresses": addresses,
            "nodeInfo": {"kubeletVersion": "v1.20.2", "osImage": "processes of the test machine"},
        }
        self._rest.persist("PATCH", path("nodes/status", None, name), {"status": status}, content=MERGE)
        self._condition(name, "True", "KubeletReady", "kubelet is posting ready status")
        # Admission has tainted it as not ready.
        self._rest.persist("PATCH", path("nodes", None, name), {"spec": {"taints": taints or None}}, content=MERGE)
        self.names.add(name)

    def remove(self, name: str) -> None:
        """Delete a node's object; its pods must have ended or be lost."""
        self.names.discard(name)
        self._lost.discard(name)
        self._rest.persist("DELETE", path("nodes", None, name))

    def mark_lost(self, name: str) -> None:
        """From now on nobody speaks for the node."""
        self._lost.add(name)

    def declare_lost(self, name: str) -> None:
        """NotReady and tainted, its pods not ready: as the node lifecycle controller does when heartbeats miss."""
        self._condition(name, "Unknown", "NodeStatusUnknown", "Kubelet stopped posting node status.")
        taints = [{"key": UNREACHABLE, "effect": effect} for effect in ("NoSchedule", "NoExecute")]
        self._rest.persist("PATCH", path("nodes", None, name), {"spec": {"taints": taints}}, content=STRATEGIC)
        condition = {"type": "Ready", "status": "False", "reason": "NodeLost", "lastTransitionTime": now()}
        for pod in self.pods_of(name):
            body = {"metadata": {"uid": pod["metadata"]["uid"]}, "status": {"conditions": [condition]}}
            self._ignoring_gone("PATCH", path("pods/status", *key_of(pod)), body, STRATEGIC)

    def evict(self, name: str) -> None:
        """Delete the pods of a lost node by force."""
        for pod in self.pods_of(name):
            if self.is_lost(name):
                body = {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}}
                self._ignoring_gone("DELETE", path("pods", *key_of(pod)), body, None)

    def declare_back(self, name: str) -> None:
        """Ready, and without the taint."""
        self._lost.discard(name)
        node = self._rest.persist("GET", path("nodes", None, name))
        taints = [one for one in node["spec"].get("taints", []) if one["key"] != UNREACHABLE]
        self._rest.persist("PATCH", path("nodes", None, name), {"spec": {"taints": taints or None}}, content=MERGE)
        self._condition(name, "True", "KubeletReady", "kubelet is posting ready status")

    def pods_of(self, name: str) -> list[Object]:
        """The objects of pods that are bound to a node."""
        return [pod for pod in self._pods.all() if pod["spec"].get("nodeName") == name]

    def _ignoring_gone(self, method: str, where: str, body: Object, content: str | None) -> None:
        try:
            self._rest.persist(method, where, body, content=content)
        except ApiException as error:
            if error.status not in (404, 409):
                raise

    def _condition(self, name: str, status: str, reason: str, message: str) -> None:
        condition = {
            "type": "Ready",
            "status": status,
            "reason": reason,
            "message": message,
            "lastHeartbeatTime": now(),
            "lastTransitionTime": now(),
        }
        body = {"status": {"conditions": [condition]}}
        self._rest.persist("PATCH", path("nodes/status", None, name), body, content=STRATEGIC)
