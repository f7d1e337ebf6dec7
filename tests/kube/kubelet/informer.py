"""All objects of a kind, kept up to date by list and watch."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kubernetes.client.exceptions import ApiException

from kube.kubelet.rest import TRANSIENT, Object, Rest, Stopped

Key = tuple[str, str]
"""Namespace (empty for what has none) and name."""

_WATCH_S = 300.0
_RETRY_S = 0.2


def key_of(thing: Object) -> Key:
    """The key of an object."""
    meta = thing["metadata"]
    return (meta.get("namespace", ""), meta["name"])


class Informer:
    """A thread that keeps a dictionary of objects and tells of each change, in order.

    `changed` gets the object and whether it is gone. An object that was replaced by another of the same name while
    nobody watched is told of as gone first.
    """

    def __init__(self, rest: Rest, where: str, changed: Callable[[Object, bool], None], stopped: threading.Event):
        self._rest = rest
        self._where = where
        self._changed = changed
        self._stopped = stopped
        self._objects: dict[Key, Object] = {}
        self._lock = threading.Lock()
        self.listed = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"informer{where}", daemon=True)

    def start(self) -> None:
        """Begin; `listed` is set when the first list is complete."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the thread, after `stopped` was set and the server went away."""
        self._thread.join(5)

    def all(self) -> list[Object]:
        """What is known."""
        with self._lock:
            return list(self._objects.values())

    def get(self, namespace: str, name: str) -> Object | None:
        """One object, or None."""
        with self._lock:
            return self._objects.get((namespace, name))

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                version = self._list()
                self.listed.set()
                while not self._stopped.is_set():
                    version = self._watch(version)
            except Stopped:
                return
            except (ApiException, *TRANSIENT):
                self._stopped.wait(_RETRY_S)  # gone versions (410) and a server that is away: list again

    def _list(self) -> str:
        answer = self._rest.persist("GET", self._where)
        now = {key_of(one): one for one in answer["items"]}
        with self._lock:
            before = dict(self._objects)
        for key, old in before.items():
            if key not in now or now[key]["metadata"]["uid"] != old["metadata"]["uid"]:
                self._tell(old, gone=True)
        for key, one in now.items():
            known = before.get(key)
            if known is None or known["metadata"]["resourceVersion"] != one["metadata"]["resourceVersion"]:
                self._tell(one, gone=False)
        return str(answer["metadata"]["resourceVersion"])

    def _watch(self, version: str) -> str:
        for event in self._rest.watch(self._where, version, _WATCH_S):
            if self._stopped.is_set():
                raise Stopped
            thing = event["object"]
            if event["type"] == "ERROR":
                raise ApiException(status=thing.get("code", 500), reason=thing.get("message"))
            self._tell(thing, gone=event["type"] == "DELETED")
            version = thing["metadata"]["resourceVersion"]
        return version

    def _tell(self, thing: Object, *, gone: bool) -> None:
        with self._lock:
            if gone:
                self._objects.pop(key_of(thing), None)
            else:
                self._objects[key_of(thing)] = thing
        self._changed(thing, gone)
