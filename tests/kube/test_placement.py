"""Where pods are put, decided without a cluster."""

from __future__ import annotations

from typing import Any

from kube.kubelet.placement import plan
from kube.kubelet.rest import Object

RACK = "rack"


def node(name: str, *, gpus: int = 8, rack: str = "a", **spec: Any) -> Object:
    labels = {"kubernetes.io/hostname": name, RACK: rack}
    status = {"allocatable": {"nvidia.com/gpu": str(gpus), "cpu": "8", "pods": "110"}}
    return {"metadata": {"name": name, "labels": labels}, "spec": spec, "status": status}


def pod(
    name: str, *, gpus: int = 0, labels: dict[str, str] | None = None, gang: int | None = None, **spec: Any
) -> Object:
    meta: Object = {"name": name, "namespace": "n", "uid": name, "labels": labels or {}, "creationTimestamp": "t"}
    if gang is not None:
        meta["annotations"] = {"tandem.dev/gang-size": str(gang)}
        meta["labels"] = {**meta["labels"], "tandem.dev/group": "g"}
    container = {"resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}
    return {"metadata": meta, "spec": {"containers": [container], **spec}, "status": {}}


def bound(pods: list[Object], nodes: list[Object], sets: list[Object] | None = None) -> dict[str, str]:
    """Which pod gets which node."""
    return {key[1]: name for key, name in plan(pods, nodes, sets or []).bindings}


def required(kind: str, labels: dict[str, str], key: str) -> Object:
    """A required affinity to, or from, pods with labels."""
    term = {"labelSelector": {"matchLabels": labels}, "topologyKey": key}
    return {kind: {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def test_gpus_are_counted_over_the_pods_that_are_there() -> None:
    there = pod("there", gpus=6, nodeName="one")
    assert bound([there, pod("new", gpus=4)], [node("one"), node("two")]) == {"new": "two"}


def test_pods_that_have_ended_take_no_room() -> None:
    ended = {**pod("ended", gpus=8, nodeName="one"), "status": {"phase": "Succeeded"}}
    assert bound([ended, pod("new", gpus=8)], [node("one")]) == {"new": "one"}


def test_small_pods_fill_a_node_before_they_break_another() -> None:
    there = pod("there", gpus=2, nodeName="two")
    assert bound([there, pod("new", gpus=1)], [node("one"), node("two")]) == {"new": "two"}


def test_a_selector_that_no_node_has_keeps_a_pod_waiting_and_says_so() -> None:
    result = plan([pod("new", nodeSelector={RACK: "z"})], [node("one")], [])
    assert result.waiting == {("n", "new"): "0/1 nodes are available: 1 node(s) didn't match node selector."}


def test_a_cordoned_node_takes_nothing() -> None:
    assert bound([pod("new")], [node("one", unschedulable=True), node("two")]) == {"new": "two"}


def test_a_taint_keeps_away_who_does_not_tolerate_it() -> None:
    nodes = [node("one", taints=[{"key": "gpu", "value": "yes", "effect": "NoSchedule"}])]
    tolerant = pod("tolerant", tolerations=[{"key": "gpu", "operator": "Exists"}])
    assert bound([tolerant, pod("other")], nodes) == {"tolerant": "one"}


def test_pods_that_repel_each_other_share_no_node() -> None:
    alone = required("podAntiAffinity", {"app": "x"}, "kubernetes.io/hostname")
    pods = [pod(str(number), labels={"app": "x"}, affinity=alone) for number in range(3)]
    placed = bound(pods, [node("one"), node("two")])
    assert sorted(placed.values()) == ["one", "two"]


def test_anti_affinity_of_pods_that_are_there_counts_for_newcomers() -> None:
    alone = required("podAntiAffinity", {"app": "x"}, RACK)
    there = pod("there", nodeName="one", affinity=alone)
    nodes = [node("one"), node("two"), node("three", rack="b")]
    assert bound([there, pod("new", labels={"app": "x"})], nodes) == {"new": "three"}


def test_node_affinity_by_expressions_and_by_name() -> None:
    by_rack = {"matchExpressions": [{"key": RACK, "operator": "NotIn", "values": ["a"]}]}
    by_name = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["one"]}]}
    nodes = [node("one"), node("two", rack="b")]
    for term, wanted in ((by_rack, "two"), (by_name, "one")):
        terms = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
        assert bound([pod("new", affinity={"nodeAffinity": terms})], nodes) == {"new": wanted}


def test_a_preference_decides_between_nodes_that_fit() -> None:
    term = {"labelSelector": {"matchLabels": {"app": "x"}}, "topologyKey": RACK}
    wish = {
        "podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 1, "podAffinityTerm": term}]}
    }
    there = pod("there", labels={"app": "x"}, nodeName="three")
    nodes = [node("one"), node("two", rack="b"), node("three", rack="b", gpus=0)]
    assert bound([there, pod("new", gpus=1, affinity=wish)], nodes) == {"new": "two"}


def test_what_is_not_known_keeps_a_pod_waiting() -> None:
    spread = [{"whenUnsatisfiable": "DoNotSchedule", "topologyKey": RACK, "maxSkew": 1}]
    result = plan([pod("new", topologySpreadConstraints=spread)], [node("one")], [])
    assert "topologySpreadConstraints" in result.waiting["n", "new"]


def test_a_gang_is_bound_whole_or_not_at_all() -> None:
    pods = [pod(str(number), gpus=8, gang=3) for number in range(3)]
    assert bound(pods, [node("one"), node("two")]) == {}
    assert len(bound(pods, [node("one"), node("two"), node("three")])) == 3


def test_a_gang_waits_for_its_last_pod() -> None:
    result = plan([pod("0", gang=2)], [node("one")], [])
    assert result.waiting == {("n", "0"): "its gang waits for 1 more pods"}


def test_the_size_of_a_gang_is_that_of_its_stateful_set() -> None:
    one = pod("0", labels={"tandem.dev/group": "g"})
    one["metadata"]["ownerReferences"] = [{"uid": "set"}]
    owner = {"metadata": {"uid": "set"}, "spec": {"replicas": 2}}
    assert bound([one], [node("one")], [owner]) == {}


def test_one_pod_of_a_gang_that_runs_comes_back_alone() -> None:
    there = pod("0", gpus=8, gang=2, nodeName="one")
    assert bound([there, pod("1", gpus=8, gang=2)], [node("one"), node("two")]) == {"1": "two"}


def test_a_gang_that_wants_one_rack_goes_where_all_of_it_fits() -> None:
    together = required("podAffinity", {"tandem.dev/group": "g"}, RACK)
    pods = [pod(str(number), gpus=8, gang=2, affinity=together) for number in range(2)]
    nodes = [node("a1"), node("b1", rack="b"), node("b2", rack="b")]
    assert set(bound(pods, nodes).values()) == {"b1", "b2"}
