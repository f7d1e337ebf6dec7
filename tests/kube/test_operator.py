"""The operator on a real API server. Its pods do not start (no image); a control service stands for a fleet."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kube.audit import lacking, requests, roles_of
from kube.cluster import Cluster
from kube.fleet_control import FleetControl
from kube.operator_world import EVERYWHERE, IMAGE, World
from kube.rights import ACCOUNT
from support.helm import template

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def world(cluster: Cluster, crds: None, namespace: str, tmp_path: Path) -> Iterator[World]:
    made = World(cluster, namespace, tmp_path, FleetControl())
    try:
        yield made
    finally:
        made.close()


def test_a_fleet_comes_up_with_everything_that_it_needs(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    assert set(world.all()) == {
        "Fleet/f",
        *(f"ConfigMap/f-{part}" for part in ("config", "rollout")),
        *(f"Service/{name}" for name in ("f", "f-head", "f-redis", "f-prefill-0", "f-decode-0")),
        *(f"StatefulSet/f-{part}" for part in ("head", "gateway", "redis", "prefill-0", "decode-0")),
        *(f"PodDisruptionBudget/f-{part}" for part in ("gateway", "prefill", "decode")),
        *(f"ExpertParallelPool/f-{role}" for role in ("prefill", "decode")),
        *(f"ExpertParallelGroup/f-{group}" for group in ("prefill-0", "decode-0")),
    }
    assert set(world.control.asked("put")) == {"decode-0", "prefill-0"}
    assert world.condition("Fleet/f", "ControlReachable")["status"] == "True"
    # No gateway runs, so nobody is answered, and the fleet says so.
    assert world.condition("Fleet/f", "Available")["message"] == "no gateway is ready"


def test_a_group_says_what_its_pods_wait_for(world: World) -> None:
    world.fleet()
    world.operator()
    world.wait(world.calm)
    told = world.condition("ExpertParallelGroup/f-decode-0", "PodsReady")["message"]
    assert f"f-decode-0-1: ErrImagePull: the image {IMAGE} cannot be pulled" in told


def versions(world: World) -> dict[str, str]:
    return {name: one["metadata"]["resourceVersion"] for name, one in world.all().items()}


def still(world: World, seconds: float = 2.0) -> Callable[[], dict[str, str] | None]:
    """The versions, once they have been the same for so long: Kubernetes' controllers write late what they see."""
    since, seen = time.monotonic(), versions(world)

    def look() -> dict[str, str] | None:
        nonlocal since, seen
        if (now := versions(world)) != seen:
            since, seen = time.monotonic(), now
        return seen if time.monotonic() - since >= seconds else None

    return look


def test_a_second_pass_writes_nothing(world: World) -> None:
    world.fleet()
    first = world.operator()
    world.ready()
    world.wait(world.calm)
    first.kill(signal.SIGTERM)
    before = world.wait(still(world), "nobody writes any more")
    second = world.operator()
    looks = {"ExpertParallelGroup": 4, "Fleet": 2, "Pools": 2}
    for kind, times in looks.items():
        world.wait(lambda kind=kind, times=times: second.looks(kind) >= times, kind)
    assert second.counted("tandem_operator_writes_total") == 0
    assert versions(world) == before


def test_whatever_is_deleted_comes_back(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    before = {name: one["metadata"]["uid"] for name, one in world.all().items()}
    children = sorted(name for name in before if name.partition("/")[0] not in ("Fleet", "ExpertParallelGroup"))
    children.remove("ExpertParallelPool/f-prefill")  # its group goes with it
    children.remove("ExpertParallelPool/f-decode")
    world.cluster.kubectl("delete", "-n", world.namespace, "--wait=false", *children)

    def back() -> bool:
        now = {name: one["metadata"]["uid"] for name, one in world.all().items()}
        same = [name for name in children if now.get(name, before[name]) == before[name]]
        assert not same, f"{same} are not new"
        return True

    world.wait(back)
    assert world.control.asked("drain") == []


def test_kubectl_scale_adds_a_group_and_drains_one(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    scale = ("scale", "epp", "f-decode", "-n", world.namespace)
    world.cluster.kubectl(*scale, "--replicas=2")
    world.ready("1/1 2/2")
    world.cluster.kubectl(*scale, "--replicas=1")
    world.ready("1/1 1/1")
    assert len(world.control.asked("drain")) == 1
    world.wait(lambda: len([name for name in world.all() if name.startswith("StatefulSet/f-decode-")]) == 1)
    events = world.cluster.events("f-decode", world.namespace)
    assert any("drains and goes: 1 group is wanted" in event for event in events)


def test_a_pool_that_is_deleted_comes_back_and_its_groups_drain(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    before = world.all()["ExpertParallelPool/f-decode"]["metadata"]["uid"]
    world.control.holds = True
    world.kubectl("delete", "epp", "f-decode", "--wait=false")
    world.wait(lambda: world.control.asked("drain") == ["decode-0"])
    world.wait(lambda: world.one("ExpertParallelGroup/f-decode-1"), "another group in its place")
    held = world.all()
    assert held["ExpertParallelPool/f-decode"]["metadata"]["uid"] != before
    assert {"ExpertParallelGroup/f-decode-0", "StatefulSet/f-decode-0"} <= held.keys()
    world.control.let_go("decode-0")
    world.wait(lambda: "ExpertParallelGroup/f-decode-0" not in world.all())
    world.ready()

    def nothing_is_orphaned() -> bool:
        now = world.all()
        uids = {one["metadata"]["uid"] for one in now.values()}
        owners = {name: one["metadata"]["ownerReferences"] for name, one in now.items() if name != "Fleet/f"}
        orphans = [name for name, whose in owners.items() if not {one["uid"] for one in whose} <= uids]
        assert not orphans, f"the owners of {orphans} are gone"
        assert "PodDisruptionBudget/f-decode" in now, "the pool has no budget"
        return True

    world.wait(nothing_is_orphaned)
    assert world.control.asked("drain") == ["decode-0"]


def test_groups_that_a_deleted_pool_leaves_serve_on_and_what_a_deleted_group_leaves_goes(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    world.kubectl("scale", "epp", "f-decode", "--replicas=2")
    world.ready("1/1 2/2")
    before = world.all()
    world.kubectl("delete", "epp", "f-decode", "--cascade=orphan", "--wait=false")  # a busy collector takes its time

    def taken_up() -> bool:
        now = world.all()
        pool = now.get("ExpertParallelPool/f-decode", before["ExpertParallelPool/f-decode"])["metadata"]["uid"]
        assert pool != before["ExpertParallelPool/f-decode"]["metadata"]["uid"], "the pool is not made again"
        for name in (
            "ExpertParallelGroup/f-decode-0",
            "ExpertParallelGroup/f-decode-1",
            "PodDisruptionBudget/f-decode",
        ):
            owners = [one["uid"] for one in now[name]["metadata"].get("ownerReferences", ())]
            assert owners == [pool], f"{name} is owned by {owners}"
        return True

    world.wait(taken_up)
    world.ready("1/1 2/2")
    rest = {name: one["metadata"]["uid"] for name, one in before.items() if name != "ExpertParallelPool/f-decode"}
    assert {name: world.all()[name]["metadata"]["uid"] for name in rest} == rest
    assert world.control.asked("drain") == []

    world.kubectl("delete", "epg", "f-decode-0", "--cascade=orphan", "--wait=false")
    first = rest["ExpertParallelGroup/f-decode-0"]
    world.wait(lambda: first not in {one["metadata"]["uid"] for one in world.all().values()})
    world.ready("1/1 2/2")
    assert world.control.asked("drain") == ["decode-0"]
    left = [name for name in world.all() if name.endswith("/f-decode-0")]
    assert left == [], f"{left} are left of the group"


def test_a_number_that_somebody_set_stands_until_the_fleet_says_another(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    world.cluster.kubectl("scale", "epp", "f-decode", "-n", world.namespace, "--replicas=2")
    world.ready("1/1 2/2")
    pool = {"nodes": 2, "gpusPerNode": 1, "rollout": {"canarySeconds": 0}}
    world.fleet(slo={"ttftSeconds": 9})
    world.wait(lambda: '"ttft_s": 9' in world.all()["ConfigMap/f-config"]["data"]["fleet.json"])
    world.ready("1/1 2/2")
    world.fleet(decode={**pool, "groups": 3})
    world.ready("1/1 3/3")


def test_a_group_that_is_deleted_drains_before_it_is_gone(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    world.control.holds = True
    uid = world.all()["ExpertParallelGroup/f-decode-0"]["metadata"]["uid"]
    world.cluster.kubectl("delete", "epg", "f-decode-0", "-n", world.namespace, "--wait=false")
    world.wait(lambda: world.control.asked("drain") == ["decode-0"])
    world.wait(lambda: world.one("ExpertParallelGroup/f-decode-1"), "another group in its place")
    told = world.wait(
        lambda: [c for c in [world.condition("ExpertParallelGroup/f-decode-0", "Drained")] if c["status"] == "False"]
    )
    assert told[0]["reason"] == "Draining"
    held = world.all()
    assert held["ExpertParallelGroup/f-decode-0"]["metadata"]["finalizers"] == ["tandem.dev/drain"]
    assert "StatefulSet/f-decode-0" in held
    world.control.let_go("decode-0")
    world.wait(lambda: "ExpertParallelGroup/f-decode-0" not in world.all())
    world.wait(lambda: "StatefulSet/f-decode-0" not in world.all())
    assert world.all()["ExpertParallelGroup/f-decode-1"]["metadata"]["uid"] != uid


def test_a_group_that_is_still_needed_stays_and_says_so(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    world.control.refuses = "decode-0 is the last decode group that is ready."
    world.cluster.kubectl("delete", "epg", "f-decode-0", "-n", world.namespace, "--wait=false")
    world.wait(lambda: world.condition("ExpertParallelGroup/f-decode-0", "Drained").get("reason") == "StillNeeded")
    annotate = ("annotate", "epg", "f-decode-0", "-n", world.namespace, "tandem.dev/force-drain=true")
    world.cluster.kubectl(*annotate)
    world.wait(lambda: "ExpertParallelGroup/f-decode-0" not in world.all())


def test_an_operator_that_is_killed_in_the_middle_of_a_drain_goes_on_with_it(world: World) -> None:
    world.fleet()
    first = world.operator()
    world.ready()
    world.control.holds = True
    world.cluster.kubectl("delete", "epg", "f-decode-0", "-n", world.namespace, "--wait=false")
    world.wait(lambda: world.control.asked("drain") == ["decode-0"])
    first.kill()
    world.control.let_go("decode-0")
    assert "ExpertParallelGroup/f-decode-0" in world.all()
    world.operator()
    world.wait(lambda: "ExpertParallelGroup/f-decode-0" not in world.all())
    assert world.control.asked("drain") == ["decode-0"]


def test_a_group_that_an_evicted_pod_drained_is_put_again(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    before = len(world.control.asked("put"))
    world.control.let_go("decode-0")  # what `tandem node leave` brings about
    world.wait(lambda: "decode-0" in world.control.asked("put")[before:])
    world.ready()
    assert "ExpertParallelGroup/f-decode-1" not in world.all()


def test_deleting_the_fleet_leaves_nothing_though_its_head_is_gone(world: World) -> None:
    world.fleet()
    world.operator()
    world.ready()
    world.control.stop()
    world.cluster.kubectl("delete", "fleet", "f", "-n", world.namespace)
    world.wait(lambda: not world.all(), "nothing")
    assert world.control.asked("drain") == []


def test_of_two_operators_one_acts_and_the_other_takes_over(world: World) -> None:
    first = world.operator()
    world.wait(lambda: first.counted("tandem_operator_leader") == 1)
    second = world.operator()
    world.wait(second.is_ready)
    world.fleet()
    world.ready()
    assert second.counted("tandem_operator_writes_total") == 0
    assert second.counted("tandem_operator_leader") == 0
    first.kill()
    world.wait(lambda: second.counted("tandem_operator_leader") == 1)
    world.cluster.kubectl("scale", "epp", "f-decode", "-n", world.namespace, "--replicas=2")
    world.ready("1/1 2/2")


def test_of_two_releases_that_look_at_a_namespace_one_acts_and_the_other_takes_over(world: World) -> None:
    first = world.operator()
    world.fleet()
    world.ready()
    second = world.operator("--lease", "of-another-release")
    world.wait(lambda: any("AnotherOperator" in event for event in world.cluster.events("f", world.namespace)))
    assert second.counted("tandem_operator_leader") == 1
    assert second.counted("tandem_operator_namespace_claimed", namespace=world.namespace) == 0
    world.kubectl("scale", "epp", "f-decode", "--replicas=2")
    world.ready("1/1 2/2")
    assert second.counted("tandem_operator_writes_total") == 0
    first.kill()
    world.kubectl("delete", "lease", "tandem-fleets")  # or it runs out
    world.kubectl("scale", "epp", "f-decode", "--replicas=1")
    world.ready("1/1 1/1")
    assert second.counted("tandem_operator_namespace_claimed", namespace=world.namespace) == 1


def test_an_operator_of_the_whole_cluster_needs_no_more_than_the_charts_cluster_role(
    cluster: Cluster, world: World, tmp_path: Path
) -> None:
    with cluster.namespace("operators") as release, cluster.namespace("other") as elsewhere:
        made = template(values={"operator": {"watchNamespaces": ["*"]}}, namespace=release)
        mine = [one for one in made if one["kind"] == "ServiceAccount" or "Role" in one["kind"]]
        assert {one["kind"] for one in mine} >= {"ClusterRole", "ClusterRoleBinding"}
        listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": mine})
        cluster.kubectl("apply", "-f", "-", input=listed)
        other = World(cluster, elsewhere, tmp_path, world.control)
        kubeconfig = cluster.service_account(ACCOUNT, release)
        operator = world.operator(kubeconfig=kubeconfig, namespaces=EVERYWHERE, lease_namespace=release)
        try:
            for place in (world, other):
                place.fleet()
            for place in (world, other):
                place.ready()
                held = (place.got("leases/tandem-fleets") or {})["spec"]["holderIdentity"]
                assert held == f"{release}/tandem-operator"
                assert operator.counted("tandem_operator_namespace_claimed", namespace=place.namespace) == 1
            assert {name.partition("/")[0] for name in other.all()} == {name.partition("/")[0] for name in world.all()}
            for place in (world, other):
                place.kubectl("delete", "fleet", "f", "--wait=false")
            for place in (world, other):
                place.wait(lambda place=place: not place.all(), "nothing")
            operator.kill(signal.SIGTERM)  # a watch is noted when it ends
            asked = list(requests(cluster.control_plane.audit_log, ACCOUNT, release))
            assert {one.right.verb for one in asked} >= {"list", "watch", "create", "patch"}
            assert lacking(asked, roles_of(made), [release, elsewhere, world.namespace]) == []
        finally:
            other.let_groups_go()
            cluster.kubectl("delete", "-f", "-", input=listed, check=False)


def test_a_fleet_that_cannot_be_says_why(world: World) -> None:
    world.fleet(planning={"gpuBudget": 1})
    world.operator()
    world.wait(lambda: world.condition("Fleet/f", "Valid")["status"] == "False")
    assert "above planning.gpuBudget (1)" in world.condition("Fleet/f", "Valid")["message"]
    assert set(world.all()) == {"Fleet/f"}
    world.fleet(ray={"address": "ray.example:6379"})
    world.wait(lambda: "spec.model.path" in world.condition("Fleet/f", "Valid").get("message", ""))
    assert set(world.all()) == {"Fleet/f"}
    world.fleet()
    world.ready()
    assert world.condition("Fleet/f", "Valid")["status"] == "True"
