"""Events: what the operator did and why, for people who `kubectl describe` an object."""

from __future__ import annotations

import datetime
import hashlib
import logging
from collections import OrderedDict
from typing import Literal

from tandem_operator.kube import Kube, KubeError
from tandem_operator.names import EVENT, MANAGER, Key, Kind, Object

_log = logging.getLogger(__name__)
_LONGEST_MESSAGE = 1024
_REMEMBERED = 2000
_REPEAT_S = 300.0
"""The same sentence about the same object is told again after this, as the same Event."""


class Recorder:
    """Tells Events. That one is lost is no reason to stop: it is logged, and the work goes on."""

    def __init__(self, kube: Kube, identity: str) -> None:
        self._kube = kube
        self._identity = identity
        self._told: OrderedDict[str, float] = OrderedDict()

    async def tell(
        self, kind: Kind, obj: Object, reason: str, message: str, *, type_: Literal["Normal", "Warning"] = "Normal"
    ) -> None:
        """Note an Event about `obj`, unless it was just told."""
        meta = obj["metadata"]
        message = message[:_LONGEST_MESSAGE]
        mark = hashlib.sha256("\0".join((meta["uid"], type_, reason, message)).encode()).hexdigest()[:16]
        now = datetime.datetime.now(datetime.UTC)
        if now.timestamp() - self._told.get(mark, 0.0) < _REPEAT_S:
            return
        self._told[mark] = now.timestamp()
        self._told.move_to_end(mark)
        while len(self._told) > _REMEMBERED:
            self._told.popitem(last=False)
        _log.info("%s %s/%s: %s: %s", kind.kind, meta["namespace"], meta["name"], reason, message)
        stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
        key = Key(EVENT, meta["namespace"], f"{meta['name'][:200]}.{mark}")
        body: Object = {
            "metadata": {"name": key.name, "namespace": key.namespace},
            "involvedObject": {
                "apiVersion": kind.api_version,
                "kind": kind.kind,
                "namespace": meta["namespace"],
                "name": meta["name"],
                "uid": meta["uid"],
                "resourceVersion": meta["resourceVersion"],
            },
            "type": type_,
            "reason": reason,
            "message": message,
            "source": {"component": MANAGER},
            "reportingComponent": MANAGER,
            "reportingInstance": self._identity,
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "count": 1,
        }
        try:
            try:
                await self._kube.create(EVENT, key.namespace, body)
            except KubeError as error:
                if error.reason != "AlreadyExists":
                    raise
                await self._kube.patch(key, {"lastTimestamp": stamp})
        except KubeError as error:
            _log.warning("An Event was not noted: %s", error)
