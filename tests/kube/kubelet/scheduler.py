"""Carries out what `placement.py` plans, on every change of pods, nodes or StatefulSets."""

from __future__ import annotations

import threading
import traceback

from kubernetes.client.exceptions import ApiException

from kube.kubelet.informer import Informer, Key, key_of
from kube.kubelet.placement import plan
from kube.kubelet.report import Events, now
from kube.kubelet.rest import STRATEGIC, Object, Rest, Stopped, path


class Scheduler:
    """A thread of its own; `dirty` tells it that something changed."""

    def __init__(self, rest: Rest, informers: dict[str, Informer]) -> None:
        self._rest = rest
        self._informers = informers
        self._events = Events(rest, "scheduler")
        self._bound: dict[str, str] = {}
        """Nodes of pods whose binding the informer has not seen yet, by uid."""
        self._told: dict[str, str] = {}
        self._dirty = threading.Event()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, once the API answers or has been given up."""
        self._stopped = True
        self._events.close()
        self._dirty.set()
        self._thread.join()

    def dirty(self) -> None:
        """Something changed."""
        self._dirty.set()

    def _run(self) -> None:
        while True:
            self._dirty.wait()
            self._dirty.clear()
            if self._stopped:
                return
            try:
                self._round()
            except Stopped:
                return
            except ApiException:
                traceback.print_exc()

    def _round(self) -> None:
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
