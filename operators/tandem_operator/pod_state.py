"""Engines' pods: what is kept of them, and what they tell of their group (found nodes? what do they wait for?)."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from tandem_operator.cache import Cache
from tandem_operator.names import FLEET_LABEL, GROUP_LABEL, POD, STATEFUL_SET, Key, Object, leaving, owner

_USUAL = frozenset({"ContainerCreating", "PodInitializing"})
"""What every container waits for at first."""
_NO_IMAGE = frozenset({"ErrImagePull", "ImagePullBackOff"})
"""A kubelet tells them by turns."""
_NAMED = 3
_LONGEST_MESSAGE = 200


@dataclass(frozen=True)
class PodsState:
    """The pods of a group, as far as it matters to others."""

    scheduled: int = 0
    """Pods that have a node and are not on their way out."""
    placed: float | None = None
    """When the last of them got its node (Unix seconds); None = not all have one."""
    no_room: bool = False
    """The scheduler finds no node for one."""
    waits: str = ""
    """What pods wait for that does not come by itself, such as an image or a node. Empty = nothing."""
    going: str = ""
    """A pod that is on its way out: an engine that began there would end with it. Empty = none."""


def slim(pod: Object) -> Object:
    """Of a pod, what is looked at here: there may be a thousand of them, of many kilobytes each."""
    meta, status = pod["metadata"], pod.get("status") or {}
    labels = meta.get("labels") or {}
    kept = {name: meta[name] for name in _META if name in meta}
    return {
        "metadata": {**kept, "labels": {name: labels[name] for name in (FLEET_LABEL, GROUP_LABEL) if name in labels}},
        "spec": {"nodeName": (pod.get("spec") or {}).get("nodeName", "")},
        "status": {
            "phase": status.get("phase", ""),
            "conditions": [entry for entry in status.get("conditions") or () if entry["type"] == "PodScheduled"],
            "containerStatuses": [
                {"state": {"waiting": _calm(entry)}}
                for entry in status.get("containerStatuses") or ()
                if "waiting" in (entry.get("state") or {})
            ],
        },
    }


def same(before: Object | None, after: Object) -> bool:
    """Whether two slim pods tell the same: most of what a kubelet reports is of no interest here."""
    if before is None:
        return False
    old, new = ({**pod, "metadata": {**pod["metadata"], "resourceVersion": ""}} for pod in (before, after))
    return old == new


def pods_of(cache: Cache, key: Key, nodes: int) -> PodsState:
    """How the pods of the group of that key are. Those that an earlier StatefulSet of its name left do not count."""
    stateful = cache.get(Key(STATEFUL_SET, key.namespace, key.name))
    if stateful is None:
        return PodsState()
    labels = stateful["metadata"].get("labels") or {}
    wanted = {name: labels[name] for name in (FLEET_LABEL, GROUP_LABEL) if name in labels}
    uid = stateful["metadata"]["uid"]
    there = [
        pod
        for pod in cache.all(POD, key.namespace, wanted)
        if (owner(pod) or {}).get("uid") == uid and pod["status"]["phase"] not in _OVER
    ]
    pods = [pod for pod in there if not leaving(pod)]
    found = [entry for pod in pods for entry in pod["status"]["conditions"]]
    times = [_unix(entry["lastTransitionTime"]) for entry in found if entry["status"] == "True"]
    reasons = [f"{pod['metadata']['name']}: {why}" for pod in pods if (why := _waits(pod))]
    further = f"; and {len(reasons) - _NAMED} more" if len(reasons) > _NAMED else ""
    return PodsState(
        scheduled=len(times),
        placed=max(times) if times and len(times) >= nodes else None,
        no_room=any(entry["status"] == "False" and entry.get("reason") == "Unschedulable" for entry in found),
        waits="; ".join(reasons[:_NAMED]) + further,
        going=min((pod["metadata"]["name"] for pod in there if leaving(pod)), default=""),
    )


_META = ("name", "namespace", "uid", "resourceVersion", "ownerReferences", "deletionTimestamp")
_OVER = ("Failed", "Succeeded")


def _calm(container: Object) -> Object:
    """What a container waits for, without what only changes as the kubelet tries again and again."""
    waiting: Object = container["state"]["waiting"]
    reason = waiting.get("reason", "")
    if reason in _NO_IMAGE:
        return {"reason": "ErrImagePull", "message": f"the image {container.get('image', '')} cannot be pulled"}
    if reason == "CrashLoopBackOff":
        return {"reason": reason, "message": "its container ends soon after each start"}
    return waiting


def _waits(pod: Object) -> str:
    """What a pod waits for, if that is not usual."""
    told = [entry["state"]["waiting"] for entry in pod["status"]["containerStatuses"]]
    told += [entry for entry in pod["status"]["conditions"] if entry["status"] == "False"]
    unusual = [entry for entry in told if entry.get("reason", "") not in ("", *_USUAL)]
    if not unusual:
        return ""
    reason, message = str(unusual[0]["reason"]), str(unusual[0].get("message") or "")
    return f"{reason}: {message[:_LONGEST_MESSAGE]}" if message else reason


def _unix(stamp: str) -> float:
    return datetime.datetime.fromisoformat(stamp).timestamp()
