"""What the operator does with each of its rights, and how one sees that it was done."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any, NamedTuple

from kube.kubelet.rest import MERGE, Object, path
from kube.operator_world import NOWHERE, World, pool
from tandem.core.types import GroupState

GROUP = "tandem.dev/v1alpha1"
NUMBERS = itertools.count()


def fleet(world: World, **spec: Any) -> None:
    """Apply a Fleet: one prefill group, with a PodGroup, and two decode groups."""
    base: Object = {"prefill": pool(pods={**NOWHERE, "gang": {"scheduler": "volcano"}}), "decode": pool(groups=2)}
    base |= {part: {"pods": NOWHERE} for part in ("gateway", "ray", "redis")}
    world.fleet(**{**base, **spec})


# -- what happens, and with which right


class Step(NamedTuple):
    """Something that the operator does with a right."""

    provoke: Callable[[World], object]
    """Give it a reason."""
    done: Callable[[World], object]
    after: Callable[[World], object] | None = None
    """Put the fleet back to where it was."""
    at_once: bool = False
    """Whether it is not tried again by itself."""


def comes_back(what: str) -> Step:
    """A child that somebody deletes."""
    return Step(lambda world: world.kubectl("delete", what), lambda world: world.got(what))


def spoiled(what: str, change: Object, as_before: Callable[[Object], bool]) -> Step:
    """A child that somebody changes."""
    return Step(lambda world: spoil(world, what, change), lambda world: (now := world.got(what)) and as_before(now))


def spoil(world: World, what: str, change: Object) -> None:
    world.kubectl("patch", what, "--type=merge", "-p", json.dumps(change))


def scale(replicas: int) -> Callable[[World], object]:
    return lambda world: world.kubectl("scale", "epp", "f-decode", f"--replicas={replicas}")


def decodes(count: int) -> Callable[[World], bool]:
    def told(world: World) -> bool:
        names = [name for name in world.all() if name.startswith("ExpertParallelGroup/f-decode-")]
        return sum(world.got(f"expertparallelgroups/{name.partition('/')[2]}") is not None for name in names) == count

    return told


def with_two(world: World) -> None:
    """As it was: two decode groups, ready."""
    scale(2)(world)
    world.ready("1/1 2/2")


def cordoned(kind: str, field: str, value: Any) -> Step:
    """The fleet says that its prefill group is cordoned."""

    def said(world: World) -> bool:
        status = (world.got(kind) or {}).get("status") or {}
        for name in field.split("."):
            status = status.get(name, {}) if isinstance(status, dict) else {}
        return bool(status == value)

    def ready_again(world: World) -> None:
        world.control.change("prefill-0", state=GroupState.READY)
        world.ready("1/1 2/2")

    return Step(lambda world: world.control.change("prefill-0", state=GroupState.CORDONED), said, ready_again)


def touched(what: str, change: Object | None, done: Callable[[Object], bool]) -> Step:
    """A PodGroup that is deleted or changed: nobody watches those, so its group is touched."""

    def provoke(world: World) -> None:
        if change is None:
            world.kubectl("delete", what)
        else:
            spoil(world, what, change)
        world.kubectl("annotate", "epg", "f-prefill-0", "--overwrite", f"tandem.dev/touched={next(NUMBERS)}")

    def calm_again(world: World) -> None:
        """Else the next of these steps would take what the operator said in this one for its own."""

        def said() -> str:
            return str(world.condition("ExpertParallelGroup/f-prefill-0", "Degraded").get("message", ""))

        world.wait(lambda: "the operator may not make" not in said(), "the group is well again")

    return Step(provoke, lambda world: (now := world.got(what)) and done(now), calm_again)


TOLD: list[str] = []


def tell(world: World) -> None:
    TOLD.append(f"bad-{next(NUMBERS)}")
    world.fleet(TOLD[-1], planning={"gpuBudget": 1})


def told(world: World) -> bool:
    return any("Invalid" in event for event in world.cluster.events(TOLD[-1], world.namespace))


def without_redis(world: World) -> None:
    fleet(world, redis={"urlSecret": {"name": "state", "key": "url"}})


def with_redis(world: World) -> None:
    fleet(world)
    world.wait(lambda: world.got("statefulsets/f-redis") and world.got("services/f-redis"))


def gone(what: str) -> Callable[[World], bool]:
    return lambda world: world.got(what) is None


def at_least_three(world: World) -> None:
    fleet(world, decode=pool(groups=2, autoscaling={"minGroups": 3, "maxGroups": 3}))


def by_hand_again(world: World) -> None:
    fleet(world)
    world.wait(lambda: "autoscaling" not in (world.got("expertparallelpools/f-decode") or {}).get("spec", {}))
    with_two(world)


def to_a_ray_cluster(world: World) -> None:
    """A Fleet that is paused, so that nothing else is done for it than to hold it."""
    world.fleet("guest", ray={"address": "nowhere.test:6379"}, model={"path": "/models/r1"}, paused=True)


def without_guest(world: World) -> None:
    world.kubectl("delete", "fleet", "guest", "--wait=false")
    spoil(world, "fleets/guest", {"metadata": {"finalizers": None}})
    world.wait(lambda: world.got("fleets/guest") is None)
    world.ready("1/1 2/2")


STEPS: dict[str, Step] = {
    "patch fleets.tandem.dev": Step(
        to_a_ray_cluster,
        lambda world: (world.got("fleets/guest") or {})["metadata"].get("finalizers"),
        without_guest,
    ),
    "create statefulsets.apps": comes_back("statefulsets/f-redis"),
    "create services": comes_back("services/f-redis"),
    "create configmaps": comes_back("configmaps/f-config"),
    "create poddisruptionbudgets.policy": comes_back("poddisruptionbudgets/f-gateway"),
    "create podgroups.scheduling.volcano.sh": touched("podgroups/f-prefill-0", None, bool),
    "create expertparallelgroups.tandem.dev": Step(scale(3), decodes(3), with_two),
    "create events": Step(tell, told, at_once=True),
    "patch statefulsets.apps": spoiled(
        "statefulsets/f-redis", {"spec": {"replicas": 0}}, lambda now: now["spec"]["replicas"] == 1
    ),
    "patch services": spoiled(
        "services/f-redis",
        {"spec": {"publishNotReadyAddresses": False}},
        lambda now: bool(now["spec"].get("publishNotReadyAddresses")),
    ),
    "patch configmaps": spoiled(
        "configmaps/f-config", {"data": {"fleet.json": "{}"}}, lambda now: now["data"]["fleet.json"] != "{}"
    ),
    "patch poddisruptionbudgets.policy": spoiled(
        "poddisruptionbudgets/f-gateway",
        {"spec": {"maxUnavailable": 2}},
        lambda now: now["spec"]["maxUnavailable"] == 1,
    ),
    "patch podgroups.scheduling.volcano.sh": touched(
        "podgroups/f-prefill-0", {"spec": {"minMember": 7}}, lambda now: now["spec"]["minMember"] == 1
    ),
    "get podgroups.scheduling.volcano.sh": touched("podgroups/f-prefill-0", None, bool),
    "patch expertparallelpools.tandem.dev": spoiled(
        "expertparallelpools/f-decode",
        {"spec": {"rollout": {"maxSurge": 7}}},
        lambda now: now["spec"]["rollout"].get("maxSurge") != 7,
    ),
    "patch fleets/status.tandem.dev": cordoned("fleets/f", "groups", {"prefill/cordoned": 1, "decode/ready": 2}),
    "patch expertparallelpools/status.tandem.dev": cordoned("expertparallelpools/f-prefill", "ready", 0),
    "patch expertparallelgroups/status.tandem.dev": cordoned("expertparallelgroups/f-prefill-0", "phase", "Cordoned"),
    "delete statefulsets.apps": Step(without_redis, gone("statefulsets/f-redis"), with_redis),
    "delete services": Step(without_redis, gone("services/f-redis"), with_redis),
    "delete expertparallelgroups.tandem.dev": Step(scale(1), decodes(1), with_two),
    "patch expertparallelpools/scale.tandem.dev": Step(
        at_least_three,
        lambda world: (world.got("expertparallelpools/f-decode") or {})["spec"]["replicas"] == 3,
        by_hand_again,
    ),
    "patch expertparallelgroups.tandem.dev": Step(  # its finalizer is taken off when it has drained
        lambda world: world.kubectl("delete", "epg", "f-prefill-0", "--wait=false"),
        lambda world: world.cluster.get("expertparallelgroups", "f-prefill-0", world.namespace, group=GROUP) is None,
        lambda world: world.ready("1/1 2/2"),
    ),
    "create expertparallelpools.tandem.dev": Step(
        lambda world: world.kubectl("delete", "expertparallelpools/f-prefill"),
        lambda world: world.got("expertparallelpools/f-prefill"),
        lambda world: world.ready("1/1 2/2"),
    ),
}
"""By the right that is taken away."""


# -- news, for which the right to watch is needed


MARK = "a word of the scheduler"


def unschedulable(world: World) -> None:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": MARK}
    stamp = "2026-01-01T00:00:00Z"
    body = {"status": {"conditions": [{**condition, "lastTransitionTime": stamp}]}}
    world.cluster.rest.persist("PATCH", path("pods/status", world.namespace, "f-decode-0-0"), body, content=MERGE)


def lose_phase(world: World) -> None:
    where = path("expertparallelgroups/status", world.namespace, "f-decode-0", group=GROUP)
    world.cluster.rest.persist("PATCH", where, {"status": {"phase": "Pending"}}, content=MERGE)


NEWS: dict[str, Step] = {
    "watch fleets.tandem.dev": Step(
        lambda world: fleet(world, slo={"ttftSeconds": 9}, decode=pool()),
        lambda world: '"ttft_s": 9' in (world.got("configmaps/f-config") or {})["data"]["fleet.json"],
    ),
    "watch expertparallelpools.tandem.dev": STEPS["patch expertparallelpools.tandem.dev"],
    "watch expertparallelgroups.tandem.dev": Step(
        lose_phase,
        lambda world: (world.got("expertparallelgroups/f-decode-0") or {})["status"]["phase"] == "Ready",
    ),
    "watch statefulsets.apps": STEPS["create statefulsets.apps"],
    "watch services": STEPS["create services"],
    "watch configmaps": STEPS["create configmaps"],
    "watch poddisruptionbudgets.policy": STEPS["create poddisruptionbudgets.policy"],
    "watch pods": Step(
        unschedulable, lambda world: MARK in world.condition("ExpertParallelGroup/f-decode-0", "PodsReady")["message"]
    ),
}
"""What is not noticed without a watch, unless all is listed anew."""
