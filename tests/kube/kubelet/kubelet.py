"""The process kubelet: nodes, a scheduler, and pods that run. See the package for what it honours."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from kubernetes import client

from kube.kubelet.host import Host, Image
from kube.kubelet.informer import Informer
from kube.kubelet.nodes import Nodes
from kube.kubelet.pod import Pod
from kube.kubelet.rest import Object, Rest, path
from kube.kubelet.scheduler import Scheduler

_KINDS = {
    "pods": "v1",
    "nodes": "v1",
    "services": "v1",
    "endpoints": "v1",
    "persistentvolumeclaims": "v1",
    "statefulsets": "apps/v1",
}
_START_S = 60.0
_STOP_S = 20.0


class Kubelet:
    """All nodes of a test cluster. Start it inside the cluster's network."""

    def __init__(self, api: client.ApiClient, folder: Path) -> None:
        self._stopped = threading.Event()
        self.rest = Rest(api, self._stopped)
        self._informers = {
            kind: Informer(self.rest, path(kind, group=group), self._listener(kind), self._stopped)
            for kind, group in _KINDS.items()
        }
        self._host = Host(self.rest, folder, self._informers)
        self._scheduler = Scheduler(self.rest, self._informers)
        self._nodes = Nodes(self._host, self._informers["pods"])
        self._running: dict[str, Pod] = {}
        self._lock = threading.Lock()
        self.changes = threading.Condition()
        """Notified of every change of an object that the kubelet watches."""

    def start(self) -> None:
        """Begin; returns when it knows what is there."""
        self._host.wiring.start()
        self._scheduler.start()
        for informer in self._informers.values():
            informer.start()
        for kind, informer in self._informers.items():
            if not informer.listed.wait(_START_S):
                raise RuntimeError(f"the API server did not list {kind} within {_START_S:.0f} s")

    def stop(self) -> None:
        """Kill all pods' processes, and end. The objects stay as they are."""
        self._stopped.set()
        self._scheduler.stop()
        self._host.wiring.stop()
        with self._lock:
            running = list(self._running.values())
        for pod in running:
            pod.lose()
        for pod in running:
            pod.join(_STOP_S)
        self._host.close()

    # What tests may set and ask.

    @property
    def missing_images(self) -> set[str]:
        """Images that cannot be pulled; a name taken out is found at the next try, half a second later."""
        return self._host.missing_images

    @property
    def images(self) -> dict[str, Image]:
        """What image names stand for: environment, entry point, a prefix of commands."""
        return self._host.images

    def set_backoff(self, base_s: float) -> None:
        """Base of the restart back-off of pods that start from now on; 1 s at first."""
        self._host.backoff_s = base_s

    def objects(self, kind: str, namespace: str | None = None) -> list[Object]:
        """Objects of a kind that the kubelet watches (pods, nodes, services, endpoints, …), as it knows them."""
        return [
            one
            for one in self._informers[kind].all()
            if namespace is None or one["metadata"].get("namespace") == namespace
        ]

    def logs(self, pod: str, container: str | None = None, namespace: str | None = None) -> str:
        """What the containers of a pod (and of earlier pods of this name) wrote, in the order of their start."""
        found = self._log_files(namespace or "*", pod, container or "*")
        return "".join(path.read_text(errors="replace") for path in found)

    def tails(self, namespace: str, lines: int = 40) -> str:
        """The last lines of every container of a namespace, with headings: for a failed test."""
        parts = []
        for file in self._log_files(namespace, "*", "*"):
            text = file.read_text(errors="replace").splitlines()[-lines:]
            parts.append("\n".join([f"--- {file.stem.replace('_', ' ')}", *text]))
        return "\n".join(parts)

    def _log_files(self, namespace: str, pod: str, container: str) -> list[Path]:
        return sorted(self._host.logs_folder.glob(f"*_{namespace}_{pod}_{container}_*.log"))

    def pids(self, pod: str, namespace: str) -> list[int]:
        """Process ids, as this machine sees them, of the first process of each container of a pod that runs."""
        with self._lock:
            running = [one for one in self._running.values() if one.key == (namespace, pod)]
        return [pid for one in running for pid in one.pids()]

    # Nodes.

    def add_node(
        self,
        name: str,
        labels: Mapping[str, str] | None = None,
        capacity: Mapping[str, str] | None = None,
        taints: list[Object] | None = None,
    ) -> None:
        """Register a node. `capacity` goes over `nodes.CAPACITY` (8 GPUs and the like)."""
        self._nodes.add(name, labels or {}, capacity or {}, taints or [])

    def remove_node(self, name: str) -> None:
        """Lose a node for good: its processes are killed, its object and its pods' are deleted."""
        self._kill_node(name)
        self._nodes.evict(name)
        self._nodes.remove(name)

    def lose_node(self, name: str, *, notice_s: float = 1.0, evict_s: float | None = 2.0) -> None:
        """Kill all processes of a node at once.

        The API server hears of it after `notice_s` (40 s in a real cluster), and the pods' objects are deleted by force
        `evict_s` later (5 min, and by hand for StatefulSets); None: never.
        """
        self._kill_node(name)

        def notice() -> None:
            if not self._stopped.wait(notice_s) and self._nodes.is_lost(name):
                self._nodes.declare_lost(name)
                if evict_s is not None and not self._stopped.wait(evict_s):
                    self._nodes.evict(name)

        threading.Thread(target=notice, name=f"lost-{name}", daemon=True).start()

    def return_node(self, name: str) -> None:
        """A lost node is back; pods that are still bound to it start anew."""
        with self._lock:
            lost = {uid: one for uid, one in self._running.items() if one.node == name}
        for uid, pod in lost.items():
            pod.join(_STOP_S)
            self._running.pop(uid, None)
        self._nodes.declare_back(name)
        for bound in self._nodes.pods_of(name):
            self._pod_changed(bound, False)

    def _kill_node(self, name: str) -> None:
        self._nodes.mark_lost(name)
        with self._lock:
            lost = [one for one in self._running.values() if one.node == name]
        for pod in lost:
            pod.lose()

    # What the informers tell.

    def _listener(self, kind: str) -> Callable[[Object, bool], None]:
        def changed(thing: Object, gone: bool) -> None:
            if kind == "pods":
                self._pod_changed(thing, gone)
            if kind == "persistentvolumeclaims":
                self._host.claims.changed(thing, gone)
            if kind in ("pods", "nodes", "statefulsets"):
                self._scheduler.dirty()
            if kind in ("services", "endpoints"):
                self._host.wiring.dirty()
            with self.changes:
                self.changes.notify_all()

        return changed

    def _pod_changed(self, pod: Object, gone: bool) -> None:
        uid, node = pod["metadata"]["uid"], pod["spec"].get("nodeName")
        if node not in self._nodes.names:
            return
        with self._lock:
            known = self._running.get(uid)
            if gone:
                self._running.pop(uid, None)
            elif known is None and not self._nodes.is_lost(node) and not self._stopped.is_set():
                known = self._running[uid] = Pod(self._host, pod)
                known.start()
        if known is None:
            return
        if gone:
            known.post(known.vanish)
        else:
            known.post(lambda: known.update(pod))


def remove_leftovers(base: Path, prefix: str) -> None:
    """Remove folders `PREFIX-PID-…` of test runs that are no more."""
    for folder in base.glob(f"{prefix}-*"):
        pid = folder.name.removeprefix(f"{prefix}-").partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(folder, ignore_errors=True)
