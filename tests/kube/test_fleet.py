"""A fleet on Kubernetes, end to end: real API server, the chart, the operator's pod, real engines in pods.

The tests share one fleet and follow each other; each leaves it ready, and says how many decode groups it needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kube import operator_deaths
from kube.audit import granted, lacking, requests, roles_of
from kube.cluster import SOON, Cluster
from kube.conftest import RACK
from kube.control_plane import budget_api
from kube.live_fleet import (
    MISSING_IMAGE,
    MODEL,
    NAME,
    NEXT_IMAGE,
    OPERATOR_ACCOUNT,
    LiveFleet,
    install,
    tiny,
    uninstall,
    values,
)
from kube.live_looks import (
    decode_pod_alone_on_its_node,
    decode_pods,
    described,
    drain,
    epochs,
    group_of,
    groups,
    images,
    phase,
    platform_has,
    reasons,
    remembered,
    replaced,
    scaled,
    settled,
    started_anew,
    uid,
    until,
    weights,
)
from support.helm import helm, template
from tandem.core.types import GroupSpec, Role

pytestmark = pytest.mark.timeout(900)
START_S = 240
KILLS = 20
MORE_NODES = ("node-c1", "node-c2", "node-c3")
"""With those of `cluster`, each engine has one of its own: of prefill, two decode groups of two pods, and what replaces
them."""
BACKOFF_S = 1.0
"""The test kubelet's own."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of checkpoints that every node has, at /models in the pods: tiny, and other weights."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate((MODEL, "other")):
        tiny(folder, name, seed=seed)
    return folder


def served(models: Path, name: str, **more: str) -> dict[str, Any]:
    """A Fleet's `model`. Its name in the API is the same for all of them."""
    return {"path": f"/models/{name}", "name": MODEL, "volume": {"hostPath": str(models)}, **more}


@pytest.fixture(scope="module")
def fleet(cluster: Cluster, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFleet]:
    with more_nodes(cluster), cluster.namespace("fleet") as namespace:
        cluster.kubelet.set_backoff(operator_deaths.BACKOFF_S)  # of pods that start from now on
        live = install(
            cluster,
            namespace,
            tmp_path_factory.mktemp("fleet"),
            operator={"replicas": 2},
            model=served(models, MODEL),
            ray={"storage": "1Gi"},
        )
        until(live, lambda: phase(live) == "Ready", START_S)
        cluster.kubelet.set_backoff(BACKOFF_S)
        yield live


@contextlib.contextmanager
def more_nodes(cluster: Cluster) -> Iterator[None]:
    for name in MORE_NODES:
        cluster.kubelet.add_node(name, {RACK: "c"})
    try:
        yield
    finally:
        for name in MORE_NODES:
            cluster.kubelet.remove_node(name)


def test_a_fleet_that_helm_installed_answers_exactly_through_its_service(fleet: LiveFleet) -> None:
    # Taking the references compares greedy answers with the oracle's.
    assert fleet.references().recipes


def test_kubectl_tells_the_fleets_story(fleet: LiveFleet) -> None:
    told = fleet.kubectl("get", "fleets,epp,epg")
    assert all(word in told for word in (NAME, f"{NAME}-prefill", f"{NAME}-decode-0", "Ready"))


def test_helm_test_gets_an_answer_through_the_service(fleet: LiveFleet) -> None:
    said = helm("test", "tandem", "--namespace", fleet.namespace, kubeconfig=fleet.cluster.kubeconfig)
    assert re.search(r"Phase:\s+Succeeded", said), said


def test_the_scale_subresource_tells_the_groups_and_selects_their_pods(fleet: LiveFleet) -> None:
    where = f"/apis/tandem.dev/v1alpha1/namespaces/{fleet.namespace}/expertparallelpools/{NAME}-decode/scale"
    scale = json.loads(fleet.kubectl("get", "--raw", where))
    assert (scale["spec"]["replicas"], scale["status"]["replicas"]) == (1, 1)
    pods = fleet.kubectl("get", "pods", "-l", scale["status"]["selector"], "-o", "name").split()
    assert pods == [f"pod/{NAME}-decode-0-0"]


def test_scaling_decode_up_loses_no_request(fleet: LiveFleet) -> None:
    with fleet.traffic() as traffic:
        scaled(fleet, decode=2)
        traffic.progress(100)


def test_a_leading_operator_killed_twenty_times_changes_nothing_for_clients(fleet: LiveFleet) -> None:
    scaled(fleet, decode=2)
    rng = random.Random(8)
    killed: list[str] = []
    with fleet.traffic() as traffic:
        for number in range(KILLS):
            if number == 2:
                fleet.kubectl("scale", "epp", f"{NAME}-decode", "--replicas=1")
            if number == 7:
                fleet.kubectl("scale", "epp", f"{NAME}-decode", "--replicas=2")
            operator_deaths.kill_leader(fleet, traffic, rng, killed)
        settled(fleet, decode=2)
    assert len(set(killed)) == KILLS


def test_an_api_server_that_restarts_and_a_slow_etcd_change_nothing_for_clients(fleet: LiveFleet) -> None:
    scaled(fleet, decode=2)
    with fleet.traffic() as traffic:
        fleet.cluster.restart_api_server(away_s=5)
        traffic.progress(50)
        with fleet.cluster.slow_etcd():
            traffic.progress(150)
        settled(fleet, decode=2)


def test_the_pods_of_redis_and_of_the_head_deleted_by_hand_cost_neither_a_request_nor_a_group(fleet: LiveFleet) -> None:
    scaled(fleet, decode=2)
    before = epochs(fleet)
    assert len(before) == 3
    with fleet.traffic() as traffic:
        replaced(fleet, f"{NAME}-redis-0")  # has no volume: it comes back empty
        until(fleet, lambda: remembered(fleet) == set(before), SOON)
        traffic.progress(50)
        replaced(fleet, f"{NAME}-head-0")
        until(fleet, lambda: epochs(fleet) == before, SOON)
        traffic.progress(50)
        settled(fleet, decode=2)
    assert epochs(fleet) == before


def test_a_lost_node_costs_no_request(fleet: LiveFleet) -> None:
    scaled(fleet, decode=2)
    pod = decode_pod_alone_on_its_node(fleet)
    node, group = pod["spec"]["nodeName"], group_of(pod)
    epoch = fleet.epoch(group)
    with fleet.traffic() as traffic:
        fleet.cluster.kubelet.lose_node(node)
        try:
            traffic.progress(100)
            started_anew(fleet, group, epoch)
            settled(fleet, decode=2)
        finally:
            fleet.cluster.kubelet.return_node(node)


def test_a_node_that_is_drained_moves_its_streams_first(fleet: LiveFleet) -> None:
    scaled(fleet, decode=2)
    pod = decode_pods(fleet)[0]
    node, name, group = pod["spec"]["nodeName"], pod["metadata"]["name"], group_of(pod)
    epoch, moves = fleet.epoch(group), fleet.migrations()
    with fleet.traffic(clients=4) as traffic:
        traffic.progress(20)
        said = drain(fleet, node, 100)
        assert f"pod/{name} evicted" in said, said
        traffic.progress(100)
        started_anew(fleet, group, epoch)
        settled(fleet, decode=2)
    # Whatever else is counted there is a stream that broke, and was mended.
    assert {why for why, count in fleet.migrations().items() if count > moves[why]} <= {"moved"}


def test_scaling_decode_down_loses_no_request(fleet: LiveFleet) -> None:
    scaled(fleet, decode=2)
    with fleet.traffic():
        scaled(fleet, decode=1)


def test_the_node_of_the_last_decode_group_cannot_be_drained(fleet: LiveFleet) -> None:
    scaled(fleet, decode=1)

    def forbids() -> bool:
        budget = fleet.cluster.get("poddisruptionbudgets", f"{NAME}-decode", fleet.namespace, group=budget_api())
        assert budget is not None
        status = budget.get("status", {})
        known = status.get("observedGeneration") == budget["metadata"]["generation"]
        return known and status.get("disruptionsAllowed") == 0

    fleet.cluster.wait(forbids, 60, "the budget allows no disruption")
    fleet.cluster.wait(lambda: len(decode_pods(fleet)) == 1, 60, "the pod of one decode group")
    (pod,) = decode_pods(fleet)
    assert "disruption budget" in drain(fleet, pod["spec"]["nodeName"], 5)
    assert [one["metadata"]["uid"] for one in decode_pods(fleet)] == [pod["metadata"]["uid"]]


OTHERWISE = ("--json-model-override-args", '{"routed_scaling_factor": 5.0}')
"""An engine with these is ready like any other, and answers otherwise."""


def test_a_canary_that_answers_otherwise_is_taken_back_and_no_client_is_sent_to_it(fleet: LiveFleet) -> None:
    scaled(fleet, decode=1)
    before, legs = set(fleet.groups("decode")), fleet.legs()
    now = fleet.get("fleets", NAME)["spec"]["images"]["engine"]

    def failed() -> bool:
        pool = fleet.get("expertparallelpools", f"{NAME}-decode")
        return any(one["reason"] == "RevisionFailed" for one in pool.get("status", {}).get("conditions", []))

    with fleet.traffic() as traffic:
        fleet.upgrade(images={"engine": now}, decode={"args": OTHERWISE})
        fleet.cluster.wait(lambda: set(fleet.groups("decode")) > before, SOON, "a canary")
        (canary,) = set(fleet.groups("decode")) - before
        fleet.cluster.wait(failed, SOON, "the change was taken back")
        traffic.progress(50)
        settled(fleet)
    assert set(fleet.groups("decode")) == before
    assert "failed the known prompt: it does not answer as" in described(fleet)
    more = fleet.legs() - legs
    assert set(more) >= {name.removeprefix(f"{NAME}-") for name in before}
    assert canary.removeprefix(f"{NAME}-") not in more
    fleet.upgrade(images={"engine": now})
    settled(fleet)


def test_a_load_step_makes_decode_go_up_within_10_s_and_down_by_itself_without_a_lost_request(fleet: LiveFleet) -> None:
    policy = {"minGroups": 1, "maxGroups": 2, "itlSeconds": 0.001, "upCooldownSeconds": 1, "downCooldownSeconds": 10}
    planning = {"tickSeconds": 1, "fastWindowSeconds": 5, "slowWindowSeconds": 10}

    def wanted() -> int:
        return int(fleet.get("expertparallelpools", f"{NAME}-decode")["spec"]["replicas"])

    def planned() -> bool:
        scaling = fleet.get("expertparallelpools", f"{NAME}-decode")["status"].get("scaling", {})
        return bool(scaling.get("wanted") == 1)

    scaled(fleet, decode=1)
    # One client that asks now and then: one group bears it, also by what is learned of late tokens.
    with fleet.traffic(clients=1, pause_s=12) as traffic:
        fleet.upgrade(decode={"autoscaling": policy}, planning=planning)
        until(fleet, planned, SOON)
        traffic.progress(1)
        with fleet.traffic(clients=4) as step:
            step.progress(40)
            fleet.cluster.wait(lambda: wanted() == 2, 10, "a second group, so long after tokens came too late")
            settled(fleet, decode=2)
            # Which of the two loops is first depends on the machine: one sees the time, one what a group bears.
            assert re.search(r"decode: 2 groups instead of 1: (time between tokens|.* a group bears)", described(fleet))
        settled(fleet, decode=1)
    assert "decode: 1 group instead of 2" in described(fleet)
    fleet.upgrade()


def test_a_group_that_nobody_asked_kubernetes_for_is_drained(fleet: LiveFleet) -> None:
    stray = GroupSpec(group="decode-9", role=Role.DECODE, nodes=1)

    async def groups(*new: GroupSpec) -> set[str]:
        async with fleet.control() as control:
            for spec in new:
                await control.put_group(spec)
            return {one.group for one in (await control.fleet()).desired}

    assert stray.group in asyncio.run(groups(stray))
    fleet.cluster.wait(lambda: stray.group not in asyncio.run(groups()), SOON, "the stray group has gone")
    assert any("OrphanDrained" in one for one in fleet.cluster.events(NAME, fleet.namespace))


def test_children_that_a_fleet_needs_no_more_are_removed(fleet: LiveFleet) -> None:
    nothing = {"name": MISSING_IMAGE}  # its pods never run
    spec = {"device": "cpu", "images": {"engine": nothing, "redis": nothing}}
    other = {"apiVersion": "tandem.dev/v1alpha1", "kind": "Fleet", "metadata": {"name": "other"}, "spec": spec}
    fleet.cluster.apply(other, namespace=fleet.namespace)
    kinds = ("statefulset/other-redis", "service/other-redis")

    def there() -> set[str]:
        return {one for one in kinds if "NotFound" not in fleet.kubectl("get", one, "-o", "name", check=False)}

    fleet.cluster.wait(lambda: there() == set(kinds), SOON)
    elsewhere = {"redis": {"urlSecret": {"name": "state", "key": "url"}}}
    fleet.cluster.apply({**other, "spec": {**spec, **elsewhere}}, namespace=fleet.namespace)
    fleet.cluster.wait(lambda: there() == set(), SOON)
    fleet.kubectl("delete", "fleet", "other", "--timeout=60s")


def test_an_image_that_cannot_be_pulled_stops_the_change_and_the_fleet_answers(fleet: LiveFleet) -> None:
    def taken_back(role: str) -> bool:
        conditions = fleet.get("expertparallelpools", f"{NAME}-{role}").get("status", {}).get("conditions", [])
        return bool({"RevisionFailed", "PartnerFailed"} & {one["reason"] for one in conditions})

    now = fleet.get("fleets", NAME)["spec"]["images"]["engine"]
    missing = {"engine": {"name": MISSING_IMAGE}, "platform": now}  # head and gateways have an image of their own
    quick = {"rollout": {"canarySeconds": 2, "progressSeconds": 15}}
    with fleet.traffic():
        fleet.upgrade(images=missing, prefill=quick, decode=quick)
        fleet.cluster.wait(lambda: taken_back("prefill") and taken_back("decode"), 120, "the change was taken back")
        fleet.upgrade(images={"engine": now})
        settled(fleet)


TWO_PODS = {"nodes": 2}
"""What decode has from the change of both pools to that of the weights."""


def test_a_rolling_change_of_both_pools_loses_no_request(fleet: LiveFleet) -> None:
    scaled(fleet, decode=1)
    # Head and gateways have the engines' image where they have none of their own: they are replaced as well, gateways
    # one at a time.
    with fleet.traffic() as traffic:
        fleet.upgrade(images={"engine": {"name": NEXT_IMAGE}}, decode=TWO_PODS)
        fleet.cluster.wait(lambda: images(fleet) == {NEXT_IMAGE}, 400, "both pools have the new image")
        fleet.cluster.wait(lambda: platform_has(fleet, NEXT_IMAGE), 240, "head and gateways have the new image")
        traffic.progress(50)
        settled(fleet)


def test_a_pod_deleted_by_hand_moves_the_streams_of_its_whole_group_which_comes_back(fleet: LiveFleet) -> None:
    scaled(fleet, decode=2)  # groups of two pods since the change above
    group = min(fleet.groups("decode"))
    epoch, moves, rest = fleet.epoch(group), fleet.migrations(), uid(fleet, f"{group}-0")
    with fleet.traffic() as traffic:
        fleet.kubectl("delete", "pod", f"{group}-1", "--wait=false")
        traffic.progress(100)
        started_anew(fleet, group, epoch)
        settled(fleet, decode=2)
    status = fleet.get("expertparallelgroups", group)["status"]
    assert (status["readyRanks"], {one["pod"] for one in status["ranks"]}) == ("2/2", {f"{group}-0", f"{group}-1"})
    assert uid(fleet, f"{group}-0") == rest  # its pod stays, only its engine starts anew
    assert {why for why, count in fleet.migrations().items() if count > moves[why]} <= {"moved"}


def test_other_weights_roll_group_by_group_and_those_that_are_not_there_change_nothing(
    fleet: LiveFleet, models: Path
) -> None:
    scaled(fleet, decode=1)
    now = {"engine": fleet.get("fleets", NAME)["spec"]["images"]["engine"]}
    gateways = {pod["metadata"]["uid"] for pod in fleet.gateways()}
    (first,) = weights(fleet)
    assert first.startswith(f"{MODEL}-")  # nobody has named it
    with fleet.traffic_of({first: models / MODEL, "second": models / "other"}) as traffic:
        fleet.upgrade(images=now, model=served(models, "other", version="second"))
        until(fleet, lambda: weights(fleet) == {"second"}, 400)
        traffic.progress(50)
        before = groups(fleet)
        fleet.upgrade(images=now, model=served(models, "missing"))
        until(fleet, lambda: "Held" in reasons(fleet), SOON)
        traffic.progress(50)
        fleet.upgrade(images=now, model=served(models, "other", version="second"))
        until(fleet, lambda: "Held" not in reasons(fleet), SOON)
    assert groups(fleet) == before
    assert {one.version for one in traffic.done} == {first, "second"}
    assert {pod["metadata"]["uid"] for pod in fleet.gateways()} == gateways


def test_the_operator_was_refused_nothing_and_has_used_each_of_its_rights(fleet: LiveFleet) -> None:
    # In all tests above. `test_rights.py` takes each of them away.
    roles = roles_of(template(values=values(), namespace=fleet.namespace))
    asked = list(requests(fleet.cluster.control_plane.audit_log, OPERATOR_ACCOUNT, fleet.namespace))
    assert lacking(asked, roles, [fleet.namespace]) == []
    used = {one.right for one in asked if one.status not in (401, 403)}
    assert {str(right) for right in granted(roles) - used} == set()


KEPT = {
    "lease.coordination.k8s.io/tandem-operator",
    "lease.coordination.k8s.io/tandem-fleets",
    f"persistentvolumeclaim/data-{NAME}-head-0",
}
"""What docs/kubernetes.md says that stays."""
OF_ANY_NAMESPACE = re.compile("serviceaccount/default|configmap/kube-root-ca.crt|secret/default-token-.*|event[s./].*")


def test_a_deleted_fleet_leaves_its_claims_and_leases_and_nothing_else(fleet: LiveFleet) -> None:
    uninstall(fleet)
    kinds = fleet.kubectl("api-resources", "--namespaced", "--verbs=list", "-o", "name").split()
    assert {"pods", "endpointslices.discovery.k8s.io", "controllerrevisions.apps", "fleets.tandem.dev"} <= set(kinds)

    def nothing_else() -> bool:
        told = fleet.kubectl("get", ",".join(kinds), "-o", "name").split()
        assert {one for one in told if not OF_ANY_NAMESPACE.fullmatch(one)} == KEPT
        return True

    fleet.cluster.wait(nothing_else, SOON)
