"""What the kubelet tells the API server: pods' status, the end of pods, Events. A thread for each sort."""

from __future__ import annotations

import datetime
import queue
import threading
import traceback
import uuid
from dataclasses import dataclass, field

from kubernetes.client.exceptions import ApiException

from kube.kubelet.informer import Key
from kube.kubelet.rest import MERGE, STRATEGIC, Object, Rest, Stopped, path


def now() -> str:
    """The time, as Kubernetes writes it."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass
class _Pending:
    key: Key
    status: Object | None = None
    delete: bool = False


class StatusReports:
    """Writes pods' status, and deletes pods that have ended. A server that is away gets the latest when it is back."""

    def __init__(self, rest: Rest) -> None:
        self._rest = rest
        self._pending: dict[str, _Pending] = {}
        self._wake = threading.Condition()
        self._closed = False
        threading.Thread(target=self._run, name="status-reports", daemon=True).start()

    def status(self, key: Key, uid: str, status: Object) -> None:
        """Report a status."""
        with self._wake:
            self._pending.setdefault(uid, _Pending(key)).status = status
            self._wake.notify()

    def gone(self, key: Key, uid: str) -> None:
        """Delete the object, after its last status."""
        with self._wake:
            self._pending.setdefault(uid, _Pending(key)).delete = True
            self._wake.notify()

    def forget(self, uid: str) -> None:
        """Report nothing more of a pod that is not ours any longer."""
        with self._wake:
            self._pending.pop(uid, None)

    def close(self) -> None:
        """End."""
        with self._wake:
            self._closed = True
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._pending and not self._closed:
                    self._wake.wait()
                if self._closed:
                    return
                uid = next(iter(self._pending))
                todo = self._pending.pop(uid)
            try:
                self._write(uid, todo)
            except Stopped:
                return
            except ApiException as error:
                # 404 and 409: it is gone, or another pod has its name by now.
                if error.status not in (404, 409):
                    traceback.print_exc()

    def _write(self, uid: str, todo: _Pending) -> None:
        if todo.status is not None:
            body = {"metadata": {"uid": uid}, "status": todo.status}
            self._rest.persist("PATCH", path("pods/status", *todo.key), body, content=STRATEGIC)
        if todo.delete:
            options = {"gracePeriodSeconds": 0, "preconditions": {"uid": uid}}
            self._rest.persist("DELETE", path("pods", *todo.key), options)


@dataclass
class _Written:
    name: str
    count: int = field(default=1)


class Events:
    """Writes Events; the same again only counts up."""

    def __init__(self, rest: Rest, component: str) -> None:
        self._rest = rest
        self._component = component
        self._queue: queue.Queue[tuple[Object, str, str, str] | None] = queue.Queue()
        self._written: dict[tuple[str, str, str], _Written] = {}
        threading.Thread(target=self._run, name="events", daemon=True).start()

    def tell(self, thing: Object, reason: str, message: str, kind: str = "Normal") -> None:
        """Of a pod, or another object with `kind` and `apiVersion`; `kind` here is Normal or Warning."""
        self._queue.put((thing, reason, message, kind))

    def close(self) -> None:
        """End."""
        self._queue.put(None)

    def _run(self) -> None:
        while (event := self._queue.get()) is not None:
            try:
                self._write(*event)
            except Stopped:
                return
            except ApiException as error:
                # 403, 404: its namespace is going away.
                if error.status not in (403, 404, 409):
                    traceback.print_exc()

    def _write(self, thing: Object, reason: str, message: str, kind: str) -> None:
        meta, when = thing["metadata"], now()
        namespace = meta.get("namespace", "default")
        same = (meta["uid"], reason, message)
        if same in self._written:
            known = self._written[same]
            known.count += 1
            body = {"count": known.count, "lastTimestamp": when}
            self._rest.persist("PATCH", path("events", namespace, known.name), body, content=MERGE)
            return
        known = self._written[same] = _Written(f"{meta['name']}.{uuid.uuid4().hex[:16]}")
        reference = {
            "kind": thing.get("kind", "Pod"),
            "apiVersion": thing.get("apiVersion", "v1"),
            "namespace": namespace,
            "name": meta["name"],
            "uid": meta["uid"],
        }
        event = {
            "metadata": {"name": known.name, "namespace": namespace},
            "involvedObject": reference,
            "reason": reason,
            "message": message[:1000],
            "type": kind,
            "source": {"component": self._component, "host": thing.get("spec", {}).get("nodeName", "")},
            "firstTimestamp": when,
            "lastTimestamp": when,
            "count": 1,
        }
        self._rest.persist("POST", path("events", namespace), event)
