"""What the tests on a live fleet wait for, and what they look at. All of these take the fleet."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kube.cluster import SOON
from kube.live_fleet import NAME, LiveFleet
from tandem.core.types import FleetSnapshot, GroupState
from tandem.fleet.control_client import ControlError
from tandem.fleet.snapshot import GROUPS
from tandem.state import StoreError, open_store


def phase(fleet: LiveFleet) -> str:
    return str(fleet.get("fleets", NAME).get("status", {}).get("phase", ""))


def story(fleet: LiveFleet) -> str:
    """What kubectl and the pods tell."""
    told = [fleet.kubectl("get", "fleets,epp,epg,pods,events", "-o", "wide", check=False)]
    return "\n".join([*told, fleet.cluster.kubelet.tails(fleet.namespace)])


def until(fleet: LiveFleet, true: Callable[[], bool], within: float) -> None:
    """Wait for it; if it does not come, tell what there is."""
    try:
        fleet.cluster.wait(true, within)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{story(fleet)}") from None


def settled(fleet: LiveFleet, prefill: int = 1, decode: int = 1, within: float = 300) -> None:
    """Wait until each role has exactly so many groups, all ready."""
    until(
        fleet,
        lambda: fleet.ready("prefill", prefill) and fleet.ready("decode", decode) and phase(fleet) == "Ready",
        within,
    )


def scaled(fleet: LiveFleet, decode: int) -> None:
    """Have so many decode groups; at once where that is so."""
    fleet.kubectl("scale", "epp", f"{NAME}-decode", f"--replicas={decode}")
    settled(fleet, decode=decode)


def started_anew(fleet: LiveFleet, group: str, epoch: int) -> None:
    """Wait until a group is beyond `epoch`. What was Ready before may be told as Ready for a while after."""
    fleet.cluster.wait(lambda: fleet.epoch(group) > epoch, 300, f"{group} is beyond epoch {epoch}")


def uid(fleet: LiveFleet, pod: str) -> str:
    """Of a pod; empty = it is not there."""
    found = fleet.cluster.pod(pod, fleet.namespace)
    return str(found["metadata"]["uid"]) if found is not None else ""


def replaced(fleet: LiveFleet, pod: str) -> None:
    """Delete a pod, and wait until another one of its name is ready."""
    before = uid(fleet, pod)
    fleet.kubectl("delete", "pod", pod, "--wait=false")
    until(fleet, lambda: uid(fleet, pod) not in ("", before) and fleet.cluster.ready(pod, fleet.namespace), SOON)


def remembered(fleet: LiveFleet) -> set[str]:
    """The groups that Redis has; an AssertionError when it does not answer."""
    (pod,) = fleet.pods("component", "redis")

    async def groups() -> set[str]:
        store = await open_store(f"redis://{pod['status']['podIP']}:6379/0", fleet=NAME, folder=Path())
        try:
            return {entry.key.removeprefix(GROUPS) for entry in await store.list(GROUPS)}
        finally:
            await store.close()

    try:
        return asyncio.run(groups())
    except StoreError as error:
        raise AssertionError(str(error)) from error


def epochs(fleet: LiveFleet) -> dict[str, int]:
    """Of the groups that are ready, as the head says, by their ids; an AssertionError when it does not answer."""

    async def ask() -> FleetSnapshot:
        async with fleet.control() as control:
            return await control.fleet()

    try:
        found = asyncio.run(ask())
    except ControlError as error:
        raise AssertionError(str(error)) from error
    return {one.group: one.epoch for one in found.groups if one.state is GroupState.READY}


def decode_pods(fleet: LiveFleet) -> list[dict[str, Any]]:
    """Pods of decode groups that have a node and stay."""
    mine = fleet.pods("role", "decode")
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


def drain(fleet: LiveFleet, node: str, within_s: int) -> str:
    """`kubectl drain` of the decode pods of a node, which takes pods again afterwards; returns what kubectl said."""
    flags = ("--ignore-daemonsets", "--delete-emptydir-data", "--force", "--pod-selector", "tandem.dev/role=decode")
    try:
        return fleet.kubectl("drain", node, *flags, f"--timeout={within_s}s", check=False)
    finally:
        fleet.kubectl("uncordon", node)


def platform_has(fleet: LiveFleet, image: str) -> bool:
    """Whether the head's and all gateways' pods have that image, and are ready."""
    pods = fleet.gateways() + fleet.pods("component", "head")
    found = [pod["metadata"]["name"] for pod in pods if pod["spec"]["containers"][0]["image"] == image]
    return len(found) == 3 and all(fleet.cluster.ready(name, fleet.namespace) for name in found)


def images(fleet: LiveFleet) -> set[str]:
    """Images of the groups that there are, once none of them is about to go or to come."""
    found = [fleet.get("expertparallelgroups", name) for role in ("prefill", "decode") for name in fleet.groups(role)]
    if len(found) != 2 or any(one.get("status", {}).get("phase") != "Ready" for one in found):
        return set()
    return {one["spec"]["template"]["image"]["name"] for one in found}


def weights(fleet: LiveFleet) -> set[str]:
    """Versions of the weights that the groups serve, once both roles have one group, ready."""
    found = [fleet.get("expertparallelgroups", name) for role in ("prefill", "decode") for name in fleet.groups(role)]
    if len(found) != 2 or any(one.get("status", {}).get("phase") != "Ready" for one in found):
        return set()
    return {one["status"].get("weightVersion", "") for one in found}


def reasons(fleet: LiveFleet) -> set[str]:
    """Of all conditions of both pools."""
    pools = [fleet.get("expertparallelpools", f"{NAME}-{role}") for role in ("prefill", "decode")]
    return {one["reason"] for pool in pools for one in pool.get("status", {}).get("conditions", [])}


def groups(fleet: LiveFleet) -> set[str]:
    """Of both roles."""
    return {name for role in ("prefill", "decode") for name in fleet.groups(role)}


def described(fleet: LiveFleet) -> str:
    return fleet.kubectl("describe", "epp", f"{NAME}-decode")
