"""What the API server last told, by kind: reconcilers read this, and write to the server.

News comes from watches, from listings and from the answers to the operator's own writes, in any order; the
resourceVersion says which is newer. (Since 1.35 Kubernetes promises that these can be compared; etcd's always could.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

from tandem_operator.names import Key, Kind, Object

_REMEMBERED = 10_000
"""Deleted objects that late news of them must not bring back."""


class Cache:
    """The objects that exist, as far as is known."""

    def __init__(self) -> None:
        self._objects: dict[Kind, dict[tuple[str, str], Object]] = {}
        self._gone: OrderedDict[str, None] = OrderedDict()

    def get(self, key: Key) -> Object | None:
        """The object; None = there is none. Not to be changed."""
        return self._objects.get(key.kind, {}).get((key.namespace, key.name))

    def all(self, kind: Kind, namespace: str | None = None, labels: Mapping[str, str] | None = None) -> list[Object]:
        """The objects of a kind, in the order of their names, that have all these labels."""
        wanted = (labels or {}).items()
        return [
            obj
            for (where, _), obj in sorted(self._objects.get(kind, {}).items())
            if namespace in (None, where) and wanted <= (obj["metadata"].get("labels") or {}).items()
        ]

    def any(self, kind: Kind, namespace: str) -> bool:
        """Whether there is an object of a kind in a namespace."""
        return any(where == namespace for where, _ in self._objects.get(kind, {}))

    def put(self, kind: Kind, obj: Object) -> bool:
        """Note an object; return whether it is news."""
        meta = obj["metadata"]
        if meta["uid"] in self._gone:
            return False
        known = self._objects.setdefault(kind, {}).get((meta.get("namespace", ""), meta["name"]))
        if known is not None and _version(known) >= _version(obj):
            return False
        self._objects[kind][meta.get("namespace", ""), meta["name"]] = obj
        return True

    def remove(self, kind: Kind, obj: Object) -> bool:
        """Note that an object is gone for good; return whether that is news."""
        meta = obj["metadata"]
        self._gone[meta["uid"]] = None
        while len(self._gone) > _REMEMBERED:
            self._gone.popitem(last=False)
        place = self._objects.get(kind, {})
        known = place.get((meta.get("namespace", ""), meta["name"]))
        if known is None or known["metadata"]["uid"] != meta["uid"]:
            return False
        del place[meta.get("namespace", ""), meta["name"]]
        return True

    def relist(self, kind: Kind, namespace: str | None, listing: Object) -> Iterator[Object]:
        """Take over a whole listing; yield what is different or gone. A watch may have missed a deletion."""
        items = listing["items"] or []
        for obj in items:
            if self.put(kind, obj):
                yield obj
        there = {obj["metadata"]["uid"] for obj in items}
        taken_at = int(listing["metadata"]["resourceVersion"])
        for obj in self.all(kind, namespace):
            if obj["metadata"]["uid"] not in there and _version(obj) <= taken_at:
                self.remove(kind, obj)
                yield obj


def _version(obj: Object) -> int:
    return int(obj["metadata"]["resourceVersion"])
