"""A fleet on Kubernetes, end to end: real API server, the chart, the operator's pod, real engines in pods.

The tests share one fleet and follow each other; each leaves it ready, and says how many decode groups it needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from kube.audit import granted, requests
from kube.cluster import Cluster
from kube.live_fleet import MISSING_IMAGE, NAME, NEXT_IMAGE, OPERATOR_ACCOUNT, LiveFleet, install, uninstall, values
from support.helm import helm, template
from tandem.core.types import GroupSpec, Role
from tandem.fleet.control_client import ControlClient

pytestmark = pytest.mark.timeout(900)
START_S = 240
KILLS = 20
BACKOFF_S = 1.0
"""The test kubelet's own."""
OPERATOR_LABEL = "app.kubernetes.io/component=operator"


@pytest.fixture(scope="module")
def fleet(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveFleet]:
    with cluster.namespace("fleet") as namespace:
        live = install(cluster, namespace, tmp_path_factory.mktemp("fleet"))
        try:
            cluster.wait(lambda: phase(live) == "Ready", START_S, "the fleet is ready")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{story(live)}") from None
        yield live


def phase(fleet: LiveFleet) -> str:
    return str(fleet.get("fleets", NAME).get("status", {}).get("phase", ""))


def story(fleet: LiveFleet) -> str:
    """What kubectl and the pods tell."""
    told = [fleet.kubectl("get", "fleets,epp,epg,pods,events", "-o", "wide", check=False)]
    return "\n".join([*told, fleet.cluster.kubelet.tails(fleet.namespace)])


def settled(fleet: LiveFleet, prefill: int = 1, decode: int = 1, within: float = 150) -> None:
    """Wait until each role has exactly so many groups, all ready."""
    try:
        fleet.cluster.wait(
            lambda: fleet.ready("prefill", prefill) and fleet.ready("decode", decode) and phase(fleet) == "Ready",
            within,
        )
    except AssertionError as error:
        raise AssertionError(f"{error}\n{story(fleet)}") from None


def test_a_fleet_that_helm_installed_answers_exactly_through_its_service(fleet: LiveFleet) -> None:
    # Taking the references compares greedy answers with the oracle's.
    assert fleet.references().recipes


def test_kubectl_tells_the_fleets_story(fleet: LiveFleet) -> None:
    told = fleet.kubectl("get", "fleets,epp,epg")
    assert all(word in told for word in (NAME, f"{NAME}-prefill", f"{NAME}-decode-0", "Ready"))


def test_helm_test_gets_an_answer_through_the_service(fleet: LiveFleet) -> None:
    said = helm("test", "tandem", "--namespace", fleet.namespace, kubeconfig=fleet.cluster.kubeconfig)
    assert re.search(r"Phase:\s+Succeeded", said), said


def scaled(fleet: LiveFleet, decode: int) -> None:
    """Have so many decode groups; at once where that is so."""
    fleet.kubectl("scale", "epp", f"{NAME}-decode", f"--replicas={decode}")
    settled(fleet, decode=decode)


def started_anew(fleet: LiveFleet, group: str, epoch: int) -> None:
    """Wait until a group is beyond `epoch`. What was Ready before may be told as Ready for a while after."""
    fleet.cluster.wait(lambda: fleet.epoch(group) > epoch, 150, f"{group} is beyond epoch {epoch}")


def test_scaling_decode_up_and_down_loses_no_request(fleet: LiveFleet) -> None:
    with fleet.traffic() as traffic:
        scaled(fleet, decode=2)
        traffic.progress(100)
        scaled(fleet, decode=1)


def test_the_operator_killed_twenty_times_changes_nothing_for_clients(fleet: LiveFleet) -> None:
    rng = random.Random(8)
    killed: set[int] = set()
    with fleet.traffic() as traffic, quick_restarts(fleet):
        for number in range(KILLS):
            kill_operator(fleet, killed)
            if number == 6:
                fleet.kubectl("scale", "epp", f"{NAME}-decode", "--replicas=2")
                # So the next kill meets one that leads, and is about to bring this group up.
                fleet.cluster.wait(lambda: len(fleet.groups("decode")) == 2, 90, "a second decode group")
            if number == 13:
                fleet.kubectl("scale", "epp", f"{NAME}-decode", "--replicas=1")
            traffic.progress(rng.randrange(5, 60))
        settled(fleet)
    assert len(killed) == KILLS


@contextlib.contextmanager
def quick_restarts(fleet: LiveFleet) -> Iterator[None]:
    """An operator's pod that is back 3 s after a death at the latest, however often it died: else kills hit nothing."""
    fleet.cluster.kubelet.set_backoff(0.1)  # of pods that start from now on
    try:
        fleet.kubectl("delete", "pod", "-l", OPERATOR_LABEL, "--timeout=60s")
        fleet.cluster.wait(lambda: operators(fleet), 60, "a new pod of the operator runs")
        yield
    finally:
        fleet.cluster.kubelet.set_backoff(BACKOFF_S)


def operators(fleet: LiveFleet) -> set[int]:
    """Processes of the operator that run now."""
    kubelet, (key, value) = fleet.cluster.kubelet, OPERATOR_LABEL.split("=")
    pods = [one["metadata"] for one in kubelet.objects("pods", fleet.namespace)]
    return {
        pid
        for pod in pods
        if pod.get("labels", {}).get(key) == value
        for pid in kubelet.pids(pod["name"], fleet.namespace)
    }


def kill_operator(fleet: LiveFleet, killed: set[int]) -> None:
    """SIGKILL to the operator as soon as one runs that is not among `killed`."""

    def hit() -> bool:
        for pid in operators(fleet) - killed:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
                return True
        return False

    fleet.cluster.wait(hit, 30, f"an operator to kill, after {len(killed)}")


def test_an_api_server_that_restarts_and_a_slow_etcd_change_nothing_for_clients(fleet: LiveFleet) -> None:
    with fleet.traffic() as traffic:
        fleet.cluster.restart_api_server(away_s=5)
        traffic.progress(50)
        with fleet.cluster.slow_etcd():
            traffic.progress(150)
        settled(fleet)


def test_a_pod_deleted_by_hand_moves_its_streams_and_comes_back(fleet: LiveFleet) -> None:
    with fleet.traffic() as traffic:
        scaled(fleet, decode=2)
        group = min(fleet.groups("decode"))
        epoch = fleet.epoch(group)
        fleet.kubectl("delete", "pod", f"{group}-0", "--wait=false")
        traffic.progress(100)
        started_anew(fleet, group, epoch)
        settled(fleet, decode=2)


def decode_pods(fleet: LiveFleet) -> list[dict[str, Any]]:
    """Pods of decode groups that have a node and stay."""
    pods = fleet.cluster.kubelet.objects("pods", fleet.namespace)
    mine = [pod for pod in pods if pod["metadata"].get("labels", {}).get("tandem.dev/role") == "decode"]
    return [pod for pod in mine if pod["spec"].get("nodeName") and "deletionTimestamp" not in pod["metadata"]]


def group_of(pod: dict[str, Any]) -> str:
    """The name of the ExpertParallelGroup of an engine's pod."""
    return f"{NAME}-{pod['metadata']['labels']['tandem.dev/group']}"


def decode_pod_alone_on_its_node(fleet: LiveFleet) -> dict[str, Any]:
    """A decode group's pod with nothing else of the fleet beside it: not the only gateway."""
    on = Counter(pod["spec"].get("nodeName") for pod in fleet.cluster.kubelet.objects("pods", fleet.namespace))
    alone = [pod for pod in decode_pods(fleet) if on[pod["spec"]["nodeName"]] == 1]
    assert alone, f"each decode pod shares its node, so none can be lost without more: pods on nodes are {dict(on)}"
    return alone[0]


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


def drain(fleet: LiveFleet, node: str, within_s: int) -> str:
    """`kubectl drain` of the decode pods of a node, which takes pods again afterwards; returns what kubectl said."""
    flags = ("--ignore-daemonsets", "--delete-emptydir-data", "--force", "--pod-selector", "tandem.dev/role=decode")
    try:
        return fleet.kubectl("drain", node, *flags, f"--timeout={within_s}s", check=False)
    finally:
        fleet.kubectl("uncordon", node)


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


def test_the_node_of_the_last_decode_group_cannot_be_drained(fleet: LiveFleet) -> None:
    scaled(fleet, decode=1)

    def forbids() -> bool:
        budget = fleet.cluster.get("poddisruptionbudgets", f"{NAME}-decode", fleet.namespace, group="policy/v1beta1")
        assert budget is not None
        status = budget.get("status", {})
        known = status.get("observedGeneration") == budget["metadata"]["generation"]
        return known and status.get("disruptionsAllowed") == 0

    fleet.cluster.wait(forbids, 60, "the budget allows no disruption")
    fleet.cluster.wait(lambda: len(decode_pods(fleet)) == 1, 60, "one decode pod")
    (pod,) = decode_pods(fleet)
    assert "disruption budget" in drain(fleet, pod["spec"]["nodeName"], 5)
    assert [one["metadata"]["uid"] for one in decode_pods(fleet)] == [pod["metadata"]["uid"]]


def test_a_rolling_change_of_both_pools_loses_no_request(fleet: LiveFleet) -> None:
    scaled(fleet, decode=1)
    # Gateways have the engines' image where they have none of their own, so they are replaced as well, one at a time.
    with fleet.traffic() as traffic:
        fleet.upgrade(images={"engine": {"name": NEXT_IMAGE}})
        fleet.cluster.wait(lambda: images(fleet) == {NEXT_IMAGE}, 240, "both pools have the new image")
        fleet.cluster.wait(lambda: gateways_have(fleet, NEXT_IMAGE), 240, "the gateways have the new image")
        traffic.progress(50)
        settled(fleet)


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
        fleet.cluster.wait(lambda: set(fleet.groups("decode")) > before, 90, "a canary")
        (canary,) = set(fleet.groups("decode")) - before
        fleet.cluster.wait(failed, 150, "the change was taken back")
        traffic.progress(50)
        settled(fleet)
    assert set(fleet.groups("decode")) == before
    assert "failed the known prompt: it does not answer as" in described(fleet)
    more = fleet.legs() - legs
    assert set(more) >= {name.removeprefix(f"{NAME}-") for name in before}
    assert canary.removeprefix(f"{NAME}-") not in more
    fleet.upgrade(images={"engine": now})
    settled(fleet)


def gateways_have(fleet: LiveFleet, image: str) -> bool:
    """Whether all gateways' pods have that image, and are ready."""
    pods = fleet.gateways()
    found = [pod["metadata"]["name"] for pod in pods if pod["spec"]["containers"][0]["image"] == image]
    return len(found) == 2 and all(fleet.cluster.ready(name, fleet.namespace) for name in found)


def images(fleet: LiveFleet) -> set[str]:
    """Images of the groups that there are, once none of them is about to go or to come."""
    found = [fleet.get("expertparallelgroups", name) for role in ("prefill", "decode") for name in fleet.groups(role)]
    if len(found) != 2 or any(one.get("status", {}).get("phase") != "Ready" for one in found):
        return set()
    return {one["spec"]["template"]["image"]["name"] for one in found}


def test_a_load_step_makes_decode_go_up_and_down_by_itself(fleet: LiveFleet) -> None:
    policy = {"minGroups": 1, "maxGroups": 2, "itlSeconds": 0.001, "upCooldownSeconds": 1, "downCooldownSeconds": 10}
    planning = {"tickSeconds": 1, "fastWindowSeconds": 5, "slowWindowSeconds": 15}
    images = {"engine": {"name": NEXT_IMAGE}}
    with fleet.traffic(clients=4):
        fleet.upgrade(images=images, decode={"autoscaling": policy}, planning=planning)
        settled(fleet, decode=2)
        # Which of the two loops was first depends on the machine: one sees the time, the other what a group can bear.
        assert re.search(r"decode: 2 groups instead of 1: (time between tokens|.* a group bears)", described(fleet))
    settled(fleet, decode=1)
    assert "decode: 1 group instead of 2" in described(fleet)
    fleet.upgrade(images=images)


def described(fleet: LiveFleet) -> str:
    return fleet.kubectl("describe", "epp", f"{NAME}-decode")


def test_a_group_that_nobody_asked_kubernetes_for_is_drained(fleet: LiveFleet) -> None:
    head = fleet.cluster.pod(f"{NAME}-head-0", fleet.namespace)
    assert head is not None
    stray = GroupSpec(group="decode-9", role=Role.DECODE, nodes=1)

    async def groups(*new: GroupSpec) -> set[str]:
        async with ControlClient(f"{head['status']['podIP']}:9000") as control:
            for spec in new:
                await control.put_group(spec)
            return {one.group for one in (await control.fleet()).desired}

    assert stray.group in asyncio.run(groups(stray))
    fleet.cluster.wait(lambda: stray.group not in asyncio.run(groups()), 90, "the stray group has gone")
    assert any("OrphanDrained" in one for one in fleet.cluster.events(NAME, fleet.namespace))


def test_children_that_a_fleet_needs_no_more_are_removed(fleet: LiveFleet) -> None:
    nothing = {"name": MISSING_IMAGE}  # its pods never run
    spec = {"device": "cpu", "images": {"engine": nothing, "redis": nothing}}
    other = {"apiVersion": "tandem.dev/v1alpha1", "kind": "Fleet", "metadata": {"name": "other"}, "spec": spec}
    fleet.cluster.apply(other, namespace=fleet.namespace)
    kinds = ("statefulset/other-redis", "service/other-redis")

    def there() -> set[str]:
        return {one for one in kinds if "NotFound" not in fleet.kubectl("get", one, "-o", "name", check=False)}

    fleet.cluster.wait(lambda: there() == set(kinds), 30)
    elsewhere = {"redis": {"urlSecret": {"name": "state", "key": "url"}}}
    fleet.cluster.apply({**other, "spec": {**spec, **elsewhere}}, namespace=fleet.namespace)
    fleet.cluster.wait(lambda: there() == set(), 30)
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


def test_the_operator_was_refused_nothing_and_has_used_each_of_its_rights(fleet: LiveFleet) -> None:
    # In all tests above. `test_rights.py` takes each of them away.
    made = template(values=values(), apis=("policy/v1beta1",))
    roles = [one for one in made if one["kind"] == "Role" and one["metadata"]["name"].startswith(OPERATOR_ACCOUNT)]
    asked = list(requests(fleet.cluster.control_plane.audit_log, OPERATOR_ACCOUNT, fleet.namespace))
    assert {str(right) for right, status in asked if status == 403} == set()
    used = {right for right, status in asked if status not in (401, 403)}
    assert {str(right) for right in granted(roles) - used} == set()


def test_a_deleted_fleet_leaves_nothing(fleet: LiveFleet) -> None:
    uninstall(fleet)

    def left() -> str:
        kinds = "fleets,epp,epg,statefulsets,services,configmaps,pods,poddisruptionbudgets,secrets"
        told = fleet.kubectl("get", kinds, "-o", "name", check=False).split()
        kept = ("configmap/kube-root-ca.crt", "secret/default-token", "No", "resources", "found")
        return " ".join(one for one in told if not one.startswith(kept))

    fleet.cluster.wait(lambda: not left(), 90, "everything is gone")
