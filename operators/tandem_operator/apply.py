"""Brings children to what was rendered, by server-side apply, and only where they differ: a second pass writes nothing.

What was rendered last is remembered in an annotation, as a hash: a field that is not rendered any more would not be
missed otherwise. Objects of the same name that somebody else has made are left alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

from tandem_operator.api import GROUP
from tandem_operator.cache import Cache
from tandem_operator.compare import covers
from tandem_operator.kube import Kube, KubeError
from tandem_operator.metrics import WRITES
from tandem_operator.names import MANAGED_BY, MANAGER, Key, Kind, Object, leaving, owned, owner, watched_label

APPLIED = f"{GROUP}/applied"
_IMMUTABLE = (
    "updates to statefulset spec for fields other than",  # a StatefulSet; what follows differs between versions
    "only allowed for updateStrategy",  # RollingUpdate to OnDelete: what the server had filled in stays
    "field is immutable",  # a Service's clusterIP before 1.20, and fields of other kinds
    "may not change once set",  # a Service's clusterIPs since 1.20
    "primary clusterIP can not be unset",
)
"""How servers (1.20 to 1.37) say that a field of an object that is there cannot have another value."""


class Trouble(Exception):
    """A child cannot be as rendered now; the message says why, and what to do. The next look tries again."""


class NotOurs(Trouble):
    """An object of the name that a child should have belongs to somebody else."""

    def __init__(self, key: Key, whose: str) -> None:
        super().__init__(f"{key} {whose}: delete it, or give this fleet another name")


class Refused(Trouble):
    """The server takes some value for wrong (422)."""

    def __init__(self, key: Key, said: str) -> None:
        super().__init__(f"The API server refuses {key}: {said}")


class Busy(Trouble):
    """An object of the name that a child should have is still being deleted."""

    def __init__(self, key: Key) -> None:
        super().__init__(f"{key} is still being deleted; the new one is made when it is gone")


def digest(value: object) -> str:
    """Short hash of what was rendered."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def stamped(obj: Object) -> Object:
    """The same with the hash of what it says."""
    meta = obj["metadata"]
    return {**obj, "metadata": {**meta, "annotations": {**meta.get("annotations", {}), APPLIED: digest(obj)}}}


def without_empty(value: Any) -> Any:
    """The same without fields that are the empty string: servers before 1.21 take those for null and refuse them."""
    if isinstance(value, dict):
        return {name: without_empty(inner) for name, inner in value.items() if inner != ""}
    if isinstance(value, list):
        return [without_empty(inner) for inner in value]
    return value


def difference(live: Object, wanted: Object) -> Object:
    """The merge patch that makes `wanted` of `live`; empty if they are the same. What is not in `wanted` goes away."""
    change: Object = {name: None for name in live if name not in wanted}
    for name, value in wanted.items():
        known = live.get(name)
        if isinstance(value, dict) and isinstance(known, dict):
            if inner := difference(known, value):
                change[name] = inner
        elif known != value:
            change[name] = value
    return change


class Applier:
    """Writes to the server and to the cache, so that the next look sees what was written."""

    def __init__(self, kube: Kube, cache: Cache, watched: Collection[Kind]) -> None:
        """`watched`: the kinds that the cache has; others are asked for."""
        self.kube = kube
        self.cache = cache
        self.watched = watched

    async def ensure(self, key: Key, obj: Object, parent: Object, *, keep: Mapping[str, object] | None = None) -> bool:
        """Let a child of `parent` be as rendered; return whether something was written.

        `keep`: fields of its spec that belong to others, with the values they have now: they are said along with the
        rest if the child is still the one that is known (KubeError 409 otherwise), since a field that is left out
        would be taken away. Raises Trouble: NotOurs, Busy, Refused.
        """
        live = await self._live(key)
        if live is not None and leaving(live):
            raise Busy(key)
        if live is not None and not owned(live, parent):
            if (other := owner(live)) is not None:
                raise NotOurs(key, f"is controlled by {other['kind']} {other['name']} ({other['uid']})")
            # One of ours may have lost its owner, as in a backup that was put back.
            if (live["metadata"].get("labels") or {}).get(MANAGED_BY) != MANAGER:
                raise NotOurs(key, f"was not made by {MANAGER}")
        wanted = stamped(obj)
        if live is not None and covers(live, wanted):
            return False
        if keep:
            meta = dict(wanted["metadata"])
            if live is not None:
                meta["resourceVersion"] = live["metadata"]["resourceVersion"]
            wanted = {**wanted, "metadata": meta, "spec": {**wanted["spec"], **keep}}
        try:
            self._note(key, await self.kube.apply(key, wanted))
        except KubeError as error:
            if error.status != 422:
                raise
            if live is None or key.kind.plural not in ("statefulsets", "services") or not _immutable(error):
                raise Refused(key, error.said) from error
            # Its pods stay, and the new one adopts them.
            await self.kube.delete(key, live["metadata"]["uid"], orphan=True)
            raise Busy(key) from error
        WRITES.labels(key.kind.kind).inc()
        return True

    async def patch(self, key: Key, change: Object, *, part: str = "") -> Object:
        """Merge a change into an object and note the outcome."""
        answer = await self.kube.patch(key, change, part=part)
        WRITES.labels(key.kind.kind).inc()
        if part != "scale":
            self._note(key, answer)
        return answer

    async def status(self, key: Key, obj: Object, status: Object) -> bool:
        """Let an object's status be this, if it is not; return whether something was written."""
        if not (change := difference(obj.get("status") or {}, without_empty(status))):
            return False
        await self.patch(key, {"status": change}, part="status")
        return True

    async def remove(self, key: Key, parent: Object) -> bool:
        """Delete a child of `parent` if it is there; return whether that was done now."""
        live = self.cache.get(key)
        if live is None or leaving(live) or not owned(live, parent):
            return False
        await self.kube.delete(key, live["metadata"]["uid"])
        WRITES.labels(key.kind.kind).inc()
        return True

    async def sweep(self, key: Key) -> bool:
        """Delete an object that we made and nobody owns any more; return whether that was done now."""
        live = await self.kube.find(key)  # not as it was: it may have lost its owner just now
        ours = live is not None and (live["metadata"].get("labels") or {}).get(MANAGED_BY) == MANAGER
        if live is None or not ours or leaving(live) or live["metadata"].get("ownerReferences"):
            return False
        await self.kube.delete(key, live["metadata"]["uid"])
        WRITES.labels(key.kind.kind).inc()
        return True

    async def _live(self, key: Key) -> Object | None:
        if key.kind not in self.watched:
            return await self.kube.get(key)
        if (known := self.cache.get(key)) is not None or watched_label(key.kind) is None:
            return known
        return await self.kube.find(key)  # the cache has only what carries our label

    def _note(self, key: Key, answer: Object) -> None:
        if key.kind in self.watched:
            self.cache.put(key.kind, answer)


def _immutable(error: KubeError) -> bool:
    """Whether all that the server finds wrong is that a field cannot be changed: else the next one is refused too."""
    return all(any(words in cause for words in _IMMUTABLE) for cause in error.causes or (error.said,))
