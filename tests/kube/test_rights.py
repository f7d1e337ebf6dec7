"""Each right of the chart's operator is taken away for real: what needs it does not happen until it is given back.

Operators as processes, with the role alone; no pod of the fleets runs, and control services stand for them. Rights to
lead, to claim and to list are needed before anything begins, those to watch when it begins: for these there are
operators of their own. All are started at once.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import pytest

from kube.cluster import Cluster
from kube.fleet_control import FleetControl
from kube.kubelet.rest import path
from kube.operator_world import World, pool, serve_kinds
from kube.rights import Grant, Release, Stage, chart_roles, grant, granted
from kube.rights_story import NEWS, STEPS, fleet
from tandem.core.types import GroupSpec, Role

pytestmark = pytest.mark.timeout(900)

LEASES = "leases.coordination.k8s.io"
LEAD, CLAIM = (
    [grant(f"create {LEASES}"), grant(f"get {LEASES} {name}"), grant(f"update {LEASES} {name}")]
    for name in ("tandem-operator", "tandem-fleets")
)
LIST = [grant(right.replace("watch", "list")) for right in NEWS]
GET_GROUP = grant("get expertparallelgroups.tandem.dev")
PATCH_EVENT = grant("patch events")
PODGROUPS = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "podgroups.scheduling.volcano.sh"},
    "spec": {
        "group": "scheduling.volcano.sh",
        "scope": "Namespaced",
        "names": {"plural": "podgroups", "singular": "podgroup", "kind": "PodGroup", "listKind": "PodGroupList"},
        "versions": [
            {
                "name": "v1beta1",
                "served": True,
                "storage": True,
                "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}},
            }
        ],
    },
}
"""No Volcano is here, only its kind."""


@dataclass(frozen=True)
class Stages:
    """Operators, each with namespaces of its own and one for itself."""

    working: Stage
    beginner: Stage
    """It has no right to lead yet."""
    deaf: Mapping[Grant, Stage]
    """By the right that will be taken away when it is started anew."""
    strays: Stage
    """Its fleet has a group that nobody asked Kubernetes for."""


@pytest.fixture(scope="module")
def stages(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    serve_kinds(cluster)
    cluster.kubectl("apply", "-f", "-", input=json.dumps(PODGROUPS))
    with ExitStack() as stack:

        def begin(*rights: Grant | None, lead: Sequence[Grant] = ()) -> list[Stage]:
            """One operator, and for each right a namespace: without it, or with all (None)."""
            place, *places = (stack.enter_context(cluster.namespace("rights")) for _ in ("its own", *rights))
            control, folder = FleetControl(), tmp_path_factory.mktemp("operator")
            worlds = [World(cluster, place, folder, control) for place in places]
            for world in worlds:
                stack.callback(world.close)
            release = Release(cluster, place, worlds)
            release.account.lose(place, *lead)
            for world, right in zip(worlds, rights, strict=True):
                if right is not None:
                    release.account.lose(world.namespace, right)
            release.start()
            return [Stage(world, release) for world in worlds]

        (strays,) = begin(GET_GROUP)
        strays.world.control.put(GroupSpec(group="decode-9", role=Role.DECODE, nodes=1))
        (working,), (beginner,) = begin(None), begin(None, lead=LEAD)
        later = [*map(grant, NEWS), PATCH_EVENT]
        deaf = begin(*[None] * len(later))
        fleet(working.world)
        for one in (strays, beginner, *deaf):
            fleet(one.world, decode=pool())
        yield Stages(working, beginner, dict(zip(later, deaf, strict=True)), strays)


@pytest.fixture(scope="module")
def stage(stages: Stages) -> Stage:
    """A fleet that is there, and an operator that works."""
    stages.working.world.ready("1/1 2/2")
    return stages.working


@pytest.mark.parametrize("right", [grant(right) for right in STEPS], ids=str)
def test_without_a_right_its_part_of_the_story_does_not_happen(stage: Stage, right: Grant) -> None:
    step, world = STEPS[str(right)], stage.world
    since = stage.without(right)
    step.provoke(world)
    stage.refused(right, since)
    assert not step.done(world)
    stage.without()
    if step.at_once:
        step.provoke(world)
    world.wait(lambda: step.done(world), f"it may {right}")
    if step.after is not None:
        step.after(world)


# -- to begin


@pytest.mark.parametrize("right", LEAD, ids=str)
def test_without_a_right_no_operator_leads(stages: Stages, right: Grant) -> None:
    stage, release = stages.beginner, stages.beginner.release
    release.account.lose(release.namespace, *LEAD)
    lease_there(stage.world, release.namespace, right)
    release.account.lose(release.namespace, right)
    stage.refused(right, len(release.operator.written()), release.namespace)
    assert release.operator.counted("tandem_operator_leader") == 0


@pytest.fixture(scope="module")
def beginner(stages: Stages) -> Stage:
    """An operator that leads and has done nothing, and a Fleet of which nothing is there."""
    found = stages.beginner
    found.without(*LIST)
    found.release.account.lose(found.release.namespace)
    return found


@pytest.mark.parametrize("right", LIST, ids=str)
def test_without_the_right_to_list_nothing_is_begun(beginner: Stage, right: Grant) -> None:
    beginner.refused(right, beginner.without(right))
    assert set(beginner.world.all()) == {"Fleet/f"}


@pytest.mark.parametrize("right", CLAIM, ids=str)
def test_without_a_claim_nothing_is_done(beginner: Stage, right: Grant) -> None:
    beginner.without(*CLAIM)
    lease_there(beginner.world, beginner.world.namespace, right)
    beginner.refused(right, beginner.without(right))
    assert set(beginner.world.all()) == {"Fleet/f"}


def test_with_all_rights_it_begins(beginner: Stage) -> None:
    beginner.without()
    beginner.world.ready()


def lease_there(world: World, namespace: str, right: Grant) -> None:
    """A Lease that nobody holds, unless the right to create it is the one that matters."""
    name = right.name or ("tandem-operator" if namespace != world.namespace else "tandem-fleets")
    if right.verb == "create":
        world.cluster.kubectl("-n", namespace, "delete", "lease", name, "--ignore-not-found")
    else:
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}}
        world.cluster.apply(lease, namespace=namespace)


# -- to watch


@dataclass(frozen=True)
class Deaf:
    """Fleets that are there, and an operator that was started anew, with one right missing in each namespace."""

    stages: Mapping[Grant, Stage]
    since: int
    """Length of its log when there was news."""


@pytest.fixture(scope="module")
def deaf(stages: Stages) -> Deaf:
    for one in stages.deaf.values():
        one.world.ready()
    bad = stages.deaf[PATCH_EVENT].world
    bad.fleet("bad", planning={"gpuBudget": 1})
    bad.wait(lambda: any("Invalid" in event for event in bad.cluster.events("bad", bad.namespace)))
    release = stages.deaf[PATCH_EVENT].release
    release.operator.kill(signal.SIGTERM)
    for right, one in stages.deaf.items():
        one.without(right)
    release.start()
    for right, one in stages.deaf.items():
        one.refused(right)
    since = len(release.operator.written())
    for right, step in NEWS.items():
        step.provoke(stages.deaf[grant(right)].world)
    return Deaf(stages.deaf, since)


@pytest.mark.parametrize("right", [grant(right) for right in NEWS], ids=str)
def test_without_the_right_to_watch_nothing_is_noticed(deaf: Deaf, right: Grant) -> None:
    stage, step = deaf.stages[right], NEWS[str(right)]
    stage.refused(right, deaf.since)
    assert not step.done(stage.world)
    stage.without()
    stage.world.wait(lambda: step.done(stage.world), f"it may {right}")


def test_without_the_right_to_patch_events_an_old_one_is_not_told_again(deaf: Deaf) -> None:
    stage = deaf.stages[PATCH_EVENT]
    where = path("events", stage.world.namespace)
    events = stage.world.cluster.rest.persist("GET", where, fieldSelector="reason=Invalid")["items"]
    assert [one["firstTimestamp"] == one["lastTimestamp"] for one in events] == [True]


# -- to look before a drain


def test_without_the_right_to_get_a_group_no_stray_one_is_drained(stages: Stages) -> None:
    stage = stages.strays
    stage.refused(GET_GROUP)  # 30 s after the operator has begun
    assert stage.world.control.asked("drain") == []
    stage.without()
    stage.world.kubectl("annotate", "fleet", "f", "tandem.dev/touched=now")  # or it waits for its next try
    stage.world.wait(lambda: stage.world.control.asked("drain") == ["decode-9"])


def test_each_right_of_the_chart_is_taken_away_in_a_test() -> None:
    roles = [one for one in chart_roles("operators", ["fleets"]) if one["kind"] == "Role"]
    found = {one for role in roles for one in granted(role)}
    assert found == {*map(grant, STEPS), *map(grant, NEWS), *LEAD, *CLAIM, *LIST, GET_GROUP, PATCH_EVENT}
