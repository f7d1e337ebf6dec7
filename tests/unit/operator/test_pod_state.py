"""What engines' pods tell of their group, and what of it a rollout is told."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from tandem.core.rollout_types import Member
from tandem.core.types import Group, GroupState, Role
from tandem_operator.cache import Cache
from tandem_operator.names import EP_GROUP, POD, POOL, STATEFUL_SET, Key, Object
from tandem_operator.pod_state import PodsState, pods_of, same, slim
from tandem_operator.reconcile.context import unix
from tandem_operator.reconcile.members import members_of
from unit.operator.world import NOW, STAMP, World

LABELS = {"tandem.dev/fleet": "r1", "tandem.dev/group": "decode-0"}
GROUP = Key(EP_GROUP, "ai", "r1-decode-0")
PULL = {"reason": "ErrImagePull", "message": 'Back-off pulling image "engine:2"'}
NO_NODE = {"status": "False", "reason": "Unschedulable", "message": "0/3 nodes are available"}


def pod(
    ordinal: int, group: str = "decode-0", *, uid: str = "", scheduled: Object | None = None, **waiting: str
) -> Object:
    """A pod as the API server has it; scheduled at `STAMP`, if not said otherwise."""
    name = f"r1-{group}-{ordinal}"
    parent = {"kind": "StatefulSet", "name": f"r1-{group}", "uid": uid or f"uid-r1-{group}", "controller": True}
    told = scheduled or {"status": "True"}
    return {
        "metadata": {
            "name": name,
            "namespace": "ai",
            "uid": f"uid-{name}",
            "resourceVersion": "5",
            "labels": {**LABELS, "tandem.dev/group": group, "further": "label"},
            "ownerReferences": [parent],
            "managedFields": [{"much": "more"}],
        },
        "spec": {"nodeName": "node-1", "containers": [{"name": "engine"}]},
        "status": {
            "phase": "Pending",
            "conditions": [{"type": "PodScheduled", "lastTransitionTime": STAMP, **told}, {"type": "Ready"}],
            "containerStatuses": [
                {"name": "engine", "image": "engine:2", "state": {"waiting": waiting} if waiting else {"running": {}}}
            ],
        },
    }


def state(*pods: Object, nodes: int = 2) -> PodsState:
    cache = Cache()
    meta = {"name": "r1-decode-0", "namespace": "ai", "uid": "uid-r1-decode-0", "resourceVersion": "4"}
    cache.put(STATEFUL_SET, {"metadata": {**meta, "labels": LABELS}})
    for one in pods:
        cache.put(POD, slim(one))
    return pods_of(cache, GROUP, nodes)


def test_little_is_kept_of_a_pod() -> None:
    kept = slim(pod(0, **PULL))
    assert "managedFields" not in kept["metadata"]
    assert "containers" not in kept["spec"]
    assert [entry["type"] for entry in kept["status"]["conditions"]] == ["PodScheduled"]


def test_a_report_that_changes_nothing_of_interest_is_the_same() -> None:
    before, after = pod(0), pod(0)
    after["metadata"]["resourceVersion"], after["status"]["podIP"] = "6", "10.0.0.1"
    assert same(slim(before), slim(after))
    assert not same(slim(before), slim(pod(0, **PULL)))
    assert not same(None, slim(before))


def test_a_group_is_placed_when_the_last_of_its_pods_has_a_node() -> None:
    later = pod(1, scheduled={"status": "True", "lastTransitionTime": "2027-01-15T08:01:00Z"})
    assert state(pod(0), later).placed == NOW + 60
    assert state(pod(0)).placed is None


def test_a_group_whose_image_cannot_be_pulled_is_placed_and_says_what_it_waits_for() -> None:
    found = state(pod(0), pod(1, **PULL))
    assert found.placed == unix(STAMP)
    assert found.waits == "r1-decode-0-1: ErrImagePull: the image engine:2 cannot be pulled"


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (PULL, {"reason": "ImagePullBackOff", "message": "something else"}),
        (
            {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting"},
            {"reason": "CrashLoopBackOff", "message": "back-off 20s restarting"},
        ),
    ],
)
def test_a_kubelet_that_tries_again_tells_nothing_new(first: dict[str, str], then: dict[str, str]) -> None:
    assert same(slim(pod(0, **first)), slim(pod(0, **then)))


def test_what_every_container_waits_for_at_first_is_not_told() -> None:
    assert state(pod(0, reason="ContainerCreating")).waits == ""


def test_a_pod_without_a_node_means_that_there_is_no_room() -> None:
    found = state(pod(0), pod(1, scheduled=NO_NODE))
    assert (found.scheduled, found.placed, found.no_room) == (1, None, True)
    assert found.waits == "r1-decode-0-1: Unschedulable: 0/3 nodes are available"


def test_of_many_pods_some_are_named() -> None:
    found = state(*(pod(number, **PULL) for number in range(18)), nodes=18)
    assert found.waits.count("ErrImagePull") == 3
    assert found.waits.endswith("; and 15 more")


@pytest.mark.parametrize("change", [{"deletionTimestamp": STAMP}, {"ownerReferences": []}])
def test_a_pod_that_goes_or_is_of_an_earlier_stateful_set_does_not_count(change: dict[str, Any]) -> None:
    other = pod(1)
    other["metadata"].update(change)
    assert state(pod(0), other).scheduled == 1


def test_an_evicted_pod_that_is_still_listed_does_not_count() -> None:
    evicted = pod(1)
    evicted["status"]["phase"] = "Failed"
    assert state(pod(0), evicted).scheduled == 1


# -- members


def member(there: Group, pods: PodsState, good: str = "") -> Member:
    spec = {"group": "decode-0", "role": "decode", "revision": "abc", "nodes": 2, "template": {}}
    obj = {"metadata": {}, "spec": spec}
    world = World()
    snapshot = replace(world.control.snapshot, groups=(there,))
    return members_of([obj], snapshot, {}, {"decode-0": pods}, good, trials={})[0]


FAILED = Group(group="decode-0", role=Role.DECODE, epoch=7, state=GroupState.FAILED, reason="rank 0 ended")


@pytest.mark.parametrize(("scheduled", "lost"), [(2, False), (1, True)])
def test_a_failed_group_is_lost_only_where_a_pod_is_gone(scheduled: int, lost: bool) -> None:
    assert member(FAILED, PodsState(scheduled=scheduled)).lost is lost


def test_failures_in_a_row_are_those_that_the_fleet_tells() -> None:
    assert member(replace(FAILED, failures=3), PodsState()).failures == 3


@pytest.mark.parametrize(("good", "placed"), [("abc", NOW), ("other", NOW - 9000)])
def test_a_group_of_the_good_revision_has_its_time_anew_when_it_restarts(good: str, placed: float) -> None:
    again = replace(FAILED, state=GroupState.STARTING, weight_version="1", since=NOW)
    assert member(again, PodsState(scheduled=2, placed=NOW - 9000), good=good).placed == placed


def test_what_pods_wait_for_is_told_rather_than_that_the_fleet_waits_for_them() -> None:
    assert member(FAILED, PodsState(waits="no image")).reason == "no image"
    assert member(FAILED, PodsState()).reason == "rank 0 ended"


# -- the whole


async def test_an_image_that_cannot_be_pulled_is_taken_back() -> None:
    world = World()
    await world.look()
    old = set(world.groups())
    quick = {"rollout": {"canarySeconds": 0, "progressSeconds": 15}}
    world.say(images={"engine": {"name": "engine:2"}}, prefill=quick, decode=quick)
    await world.look(1)
    new = set(world.groups()) - old
    assert len(new) == 2
    for name in new:
        there = world.control.groups[name]
        world.control.groups[name] = replace(there, state=GroupState.STARTING, weight_version="", since=NOW)
        stuck = pod(0, name, **PULL)
        world.server.put(Key(POD, "ai", stuck["metadata"]["name"]), slim(stuck))
        stuck = pod(1, name, **PULL)
        world.server.put(Key(POD, "ai", stuck["metadata"]["name"]), slim(stuck))
    await world.look()
    assert set(world.groups()) == old | new
    group = world.group(next(iter(new)))
    assert "ErrImagePull" in world.condition(group, "PodsReady")["message"]
    assert group is not None
    assert "ErrImagePull" in group["status"]["reason"]
    world.ctx.at = NOW + 16
    await world.look()
    for name in new:
        world.control.gone(name)
    await world.look()
    world.ctx.at += 5
    await world.look()
    assert set(world.groups()) == old
    for role in Role:
        told = world.condition(world.server.objects[Key(POOL, "ai", f"r1-{role}")], "Degraded")
        assert told["reason"] in ("RevisionFailed", "PartnerFailed")
    assert any("ErrImagePull" in event for event in world.recorder.told)


async def test_a_revision_whose_engines_end_three_times_fails_before_its_time() -> None:
    world = World()
    await world.look()
    world.say(decode={"args": ["--seed=2"], "rollout": {"canarySeconds": 30}})
    await world.look(1)
    for number in range(2):
        there = pod(number, "decode-1")
        world.server.put(Key(POD, "ai", there["metadata"]["name"]), slim(there))
    failed = replace(world.control.groups["decode-1"], state=GroupState.FAILED, failures=3, reason="rank 0 ended")
    world.control.groups["decode-1"] = failed
    await world.look(1)
    assert "drain decode-1" in world.control.calls
    told = world.condition(world.server.objects[Key(POOL, "ai", "r1-decode")], "Progressing")
    assert "decode-1 failed 3 times in a row: rank 0 ended" in told["message"]


def test_a_pod_on_its_way_out_is_named_until_it_is_over() -> None:
    going, over = pod(1), pod(1)
    for one in (going, over):
        one["metadata"]["deletionTimestamp"] = STAMP
    over["status"]["phase"] = "Succeeded"
    told = state(pod(0), going)
    assert (told.going, told.scheduled) == ("r1-decode-0-1", 1)
    assert state(pod(0), over).going == state(pod(0), pod(1)).going == ""


async def test_a_group_that_a_pod_drained_is_put_again_only_when_that_pod_has_gone() -> None:
    world = World()
    await world.look()
    one = pod(0, uid=world.server.objects[Key(STATEFUL_SET, "ai", "r1-decode-0")]["metadata"]["uid"])
    one["metadata"]["deletionTimestamp"] = STAMP
    world.ctx.cache.put(POD, slim(one))
    await world.control.drain("decode-0")
    world.control.gone("decode-0")
    await world.look()
    assert world.control.calls.count("put decode-0") == 1
    assert world.condition(world.group("decode-0"), "Ready")["message"] == "It starts when pod r1-decode-0-0 has gone."
    world.ctx.cache.remove(POD, slim(one))
    await world.look()
    assert world.control.calls.count("put decode-0") == 2
