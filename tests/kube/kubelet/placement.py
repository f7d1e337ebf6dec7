"""Which node each waiting pod is bound to. Pure.

Honoured: resources, nodeSelector, required and preferred node affinity, required and preferred pod affinity and
anti-affinity by topology key (labelSelector and namespaces; both those of the pod and the anti-affinity of pods that
are there), taints, cordoned nodes, gangs. topologySpreadConstraints count when they say ScheduleAnyway, as nothing; a
pod with a `DoNotSchedule` constraint or a namespaceSelector waits, and says why. Priorities and preemption: not.

A **gang** is the pods with the same label `tandem.dev/group` in a namespace. Its size is the annotation
`tandem.dev/gang-size`, or the replicas of the StatefulSet that owns them. Its waiting pods are bound all or none, and
not before all are there.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from kube.kubelet.informer import Key, key_of
from kube.kubelet.quantity import parse, requests
from kube.kubelet.rest import Object
from kube.kubelet.selectors import node_term_fits, selector_fits, tolerates

GANG_LABEL = "tandem.dev/group"
GANG_SIZE = "tandem.dev/gang-size"
_ENDED = ("Succeeded", "Failed")


@dataclass
class Plan:
    """What a round of scheduling decides."""

    bindings: list[tuple[Key, str]] = field(default_factory=list)
    waiting: dict[Key, str] = field(default_factory=dict)
    """Why a pod waits."""


@dataclass(frozen=True)
class _Placed:
    pod: Object
    node: Object


class _Room:
    """Nodes, and the pods on them."""

    def __init__(self, nodes: Sequence[Object], placed: Iterable[_Placed]) -> None:
        self.nodes = nodes
        self.placed = list(placed)
        self.used: defaultdict[str, defaultdict[str, Fraction]] = defaultdict(lambda: defaultdict(Fraction))
        for one in self.placed:
            self._count(one)

    def _count(self, one: _Placed) -> None:
        for name, amount in requests(one.pod).items():
            self.used[one.node["metadata"]["name"]][name] += amount

    def with_(self, placed: Iterable[_Placed]) -> _Room:
        return _Room(self.nodes, [*self.placed, *placed])

    def add(self, one: _Placed) -> None:
        self.placed.append(one)
        self._count(one)


def plan(pods: Sequence[Object], nodes: Sequence[Object], sets: Sequence[Object]) -> Plan:
    """Bind what can be bound. `sets` are the StatefulSets, for the sizes of gangs."""
    by_name = {node["metadata"]["name"]: node for node in nodes}
    live = [pod for pod in pods if pod.get("status", {}).get("phase") not in _ENDED]
    bound = [pod for pod in live if pod["spec"].get("nodeName") in by_name]
    room = _Room(nodes, [_Placed(pod, by_name[pod["spec"]["nodeName"]]) for pod in bound])
    waiting = [pod for pod in live if not pod["spec"].get("nodeName") and not _ending(pod)]
    result = Plan()
    for gang in _gangs(waiting):
        missing = _missing(gang, live, sets)
        if missing:
            result.waiting |= {key_of(pod): f"its gang waits for {missing} more pods" for pod in gang}
            continue
        choice, why = _place_all(gang, room)
        if choice is None:
            result.waiting |= {key_of(pod): why for pod in gang}
            continue
        for one in choice:
            room.add(one)
            result.bindings.append((key_of(one.pod), one.node["metadata"]["name"]))
    return result


def _ending(pod: Object) -> bool:
    return "deletionTimestamp" in pod["metadata"]


def _gang_key(pod: Object) -> Key | None:
    meta = pod["metadata"]
    group = meta.get("labels", {}).get(GANG_LABEL)
    return None if group is None else (meta["namespace"], group)


def _gangs(waiting: Sequence[Object]) -> list[list[Object]]:
    """The waiting pods, those of one gang together; the oldest first."""
    together: dict[tuple[str, ...], list[Object]] = {}
    for pod in sorted(waiting, key=lambda one: (one["metadata"]["creationTimestamp"], key_of(one))):
        gang = _gang_key(pod)
        together.setdefault(("pod", *key_of(pod)) if gang is None else ("gang", *gang), []).append(pod)
    return list(together.values())


def _missing(gang: Sequence[Object], live: Sequence[Object], sets: Sequence[Object]) -> int:
    """How many pods of the gang do not exist yet."""
    key = _gang_key(gang[0])
    if key is None:
        return 0
    written = gang[0]["metadata"].get("annotations", {}).get(GANG_SIZE)
    owners = {owner["uid"] for owner in gang[0]["metadata"].get("ownerReferences", [])}
    sizes = [one["spec"].get("replicas", 1) for one in sets if one["metadata"]["uid"] in owners]
    size = int(written) if written is not None else max(sizes, default=1)
    there = sum(1 for pod in live if _gang_key(pod) == key and not _ending(pod))
    return max(0, size - there)


def _place_all(gang: Sequence[Object], room: _Room) -> tuple[list[_Placed] | None, str]:
    """Nodes for all pods of a gang: each node is tried for the first pod, and the rest follow as they fit best.

    Where a gang's pods are alike, the first one's node decides its rack, and nothing else needs to be tried.
    """
    why = ""
    for first in _fitting(gang[0], room):
        chosen = [_Placed(gang[0], first)]
        for pod in gang[1:]:
            now = room.with_(chosen)
            fits = _fitting(pod, now)
            if not fits:
                why = why or _why_none(pod, now)
                break
            chosen.append(_Placed(pod, fits[0]))
        else:
            return chosen, ""
    return None, why or _why_none(gang[0], room)


def _fitting(pod: Object, room: _Room) -> list[Object]:
    """Nodes that can take a pod, the preferred first, then the fullest (whole nodes stay free), then by name."""
    fits = [node for node in room.nodes if why_not(pod, node, room) is None]

    def rank(node: Object) -> tuple[float, float, str]:
        name = node["metadata"]["name"]
        return (-_preference(pod, node, room), -float(room.used[name]["nvidia.com/gpu"]), name)

    return sorted(fits, key=rank)


def _why_none(pod: Object, room: _Room) -> str:
    reasons = Counter(why_not(pod, node, room) for node in room.nodes)
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if reason is not None)
    return f"0/{len(room.nodes)} nodes are available: {told or 'there is none'}."


def why_not(pod: Object, node: Object, room: _Room) -> str | None:
    """Why a node cannot take a pod, or None."""
    spec = pod["spec"]
    unsupported = _unsupported(spec)
    if unsupported:
        return f"do not know {unsupported} (the process kubelet honours a subset)"
    if node["spec"].get("unschedulable"):
        return "node(s) were unschedulable"
    for taint in node["spec"].get("taints", []):
        if taint["effect"] in ("NoSchedule", "NoExecute") and not tolerates(pod, taint):
            return f"node(s) had taint {{{taint['key']}: {taint.get('value', '')}}}, that the pod didn't tolerate"
    labels = node["metadata"].get("labels", {})
    if any(labels.get(key) != value for key, value in spec.get("nodeSelector", {}).items()):
        return "node(s) didn't match node selector"
    affinity = spec.get("affinity", {})
    terms = _required(affinity.get("nodeAffinity")).get("nodeSelectorTerms")
    if terms is not None and not any(node_term_fits(term, node) for term in terms):
        return "node(s) didn't match node affinity"
    capacity = node["status"].get("allocatable", {})
    used = room.used[node["metadata"]["name"]]
    for name, amount in requests(pod).items():
        if amount and parse(capacity.get(name, 0)) - used[name] < amount:
            return f"Insufficient {name}"
    return _pod_affinity_fails(pod, node, room)


def _required(affinity: Object | None) -> Any:
    """A node selector, or a list of terms."""
    return (affinity or {}).get("requiredDuringSchedulingIgnoredDuringExecution") or {}


def _pod_terms(pod: Object, kind: str) -> list[Object]:
    return list(_required(pod["spec"].get("affinity", {}).get(kind)) or [])


def _unsupported(spec: Object) -> str | None:
    if any(one.get("whenUnsatisfiable") == "DoNotSchedule" for one in spec.get("topologySpreadConstraints", [])):
        return "topologySpreadConstraints with DoNotSchedule"
    for kind in ("podAffinity", "podAntiAffinity"):
        if any("namespaceSelector" in term for term in _required(spec.get("affinity", {}).get(kind)) or []):
            return f"{kind} with a namespaceSelector"
    return None


def _term_matches(term: Object, owner: Object, other: Object) -> bool:
    """Whether `other` is a pod that a term of `owner` speaks of."""
    spaces = term.get("namespaces") or [owner["metadata"]["namespace"]]
    meta = other["metadata"]
    return meta["namespace"] in spaces and selector_fits(term.get("labelSelector"), meta.get("labels", {}))


def _same_place(key: str, node: Object, other: Object) -> bool:
    value = node["metadata"].get("labels", {}).get(key)
    return value is not None and other["metadata"].get("labels", {}).get(key) == value


def _pod_affinity_fails(pod: Object, node: Object, room: _Room) -> str | None:
    for term in _pod_terms(pod, "podAffinity"):
        matching = [one for one in room.placed if _term_matches(term, pod, one.pod)]
        # The first of pods that want to be together goes anywhere the key exists.
        if not matching and _term_matches(term, pod, pod) and term["topologyKey"] in node["metadata"].get("labels", {}):
            continue
        if not any(_same_place(term["topologyKey"], node, one.node) for one in matching):
            return "node(s) didn't match pod affinity rules"
    for term in _pod_terms(pod, "podAntiAffinity"):
        for one in room.placed:
            if _term_matches(term, pod, one.pod) and _same_place(term["topologyKey"], node, one.node):
                return "node(s) didn't match pod anti-affinity rules"
    for one in room.placed:
        for term in _pod_terms(one.pod, "podAntiAffinity"):
            if _term_matches(term, one.pod, pod) and _same_place(term["topologyKey"], node, one.node):
                return "node(s) didn't satisfy existing pods' anti-affinity rules"
    return None


def _preference(pod: Object, node: Object, room: _Room) -> float:
    """Sum of the weights of the preferences that a node meets."""
    preferred = "preferredDuringSchedulingIgnoredDuringExecution"
    affinity = pod["spec"].get("affinity", {})
    score = 0.0
    for one in affinity.get("nodeAffinity", {}).get(preferred, []):
        score += one["weight"] if node_term_fits(one["preference"], node) else 0
    for kind, sign in (("podAffinity", 1), ("podAntiAffinity", -1)):
        for one in affinity.get(kind, {}).get(preferred, []):
            term = one["podAffinityTerm"]
            near = sum(
                1
                for there in room.placed
                if _same_place(term["topologyKey"], node, there.node) and _term_matches(term, pod, there.pod)
            )
            score += sign * one["weight"] * near
    return score
