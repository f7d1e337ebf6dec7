"""Carries out what `placement.py` plans, on every change of pods, nodes or StatefulSets."""

from __future__ import annotations

from kubernetes.client.exceptions import ApiException

from kube.kubelet.informer import Informer, Key, key_of
from kube.kubelet.placement import plan
from kube.kubelet.report import Events, now
from kube.kubelet.rest import STRATEGIC, Object, Rest, path
from kube.kubelet.rounds import Rounds


class Scheduler(Rounds):
    """A thread of its own; `dirty` tells it that something changed."""

    def __init__(self, rest: Rest, informers: dict[str, Informer]) -> None:
        super().__init__("scheduler")
        self._rest = rest
        self._informers = informers
        self._events = Events(rest, "scheduler")
        self._bound: dict[str, str] = {}
        """Nodes of pods whose binding the informer has not seen yet, by uid."""
        self._told: dict[str, str] = {}

    def stop(self) -> None:
        """End, once the API answers or has been given up."""
        self._stopped = True
        self._events.close()
        super().stop()

    def round(self) -> None:
        pods = {key_of(pod): self._as_bound(pod) for pod in self._informers["pods"].all()}
        uids = {pod["metadata"]["uid"] for pod in pods.values()}
        for known in (self._bound, self._told):
            for uid in known.keys() - uids:
                del known[uid]
        result = plan(list(pods.values()), self._informers["nodes"].all(), self._informers["statefulsets"].all())
        for key, node in result.bindings:
            self._bind(key, pods[key], node)
        for key, why in result.waiting.items():
            self._waits(key, pods[key], why)

    def _as_bound(self, pod: Object) -> Object:
        uid = pod["metadata"]["uid"]
        if pod["spec"].get("nodeName"):
            self._bound.pop(uid, None)
            return pod
        node = self._bound.get(uid)
        return pod if node is None else {**pod, "spec": {**pod["spec"], "nodeName": node}}

    def _bind(self, key: Key, pod: Object, node: str) -> None:
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        meta = {"name": key[1], "uid": pod["metadata"]["uid"]}
        body = {"apiVersion": "v1", "kind": "Binding", "metadata": meta, "target": target}
        try:
            self._rest.persist("POST", path("pods/binding", *key), body)
        except ApiException as error:
            # 404: deleted meanwhile; 409: bound by a request whose answer was lost, or being deleted.
            if error.status not in (404, 409):
                raise
        self._bound[pod["metadata"]["uid"]] = node
        self._events.tell(pod, "Scheduled", f"Successfully assigned {key[0]}/{key[1]} to {node}")

    def _waits(self, key: Key, pod: Object, why: str) -> None:
        uid = pod["metadata"]["uid"]
        if self._told.get(uid) == why:
            return
        self._told[uid] = why
        self._events.tell(pod, "FailedScheduling", why, "Warning")
        condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": why}
        body = {"metadata": {"uid": uid}, "status": {"conditions": [{**condition, "lastTransitionTime": now()}]}}
        try:
            self._rest.persist("PATCH", path("pods/status", *key), body, content=STRATEGIC)
        except ApiException as error:
            if error.status not in (404, 409):
                raise
