"""Reconcilers against a server and a control service in memory: what is there decides, not what happened."""

from __future__ import annotations

import json

import pytest
from msgspec.structs import replace

from tandem.core.types import GroupState
from tandem_operator.kube import KubeError
from tandem_operator.names import (
    BUDGET,
    CONFIG_MAP,
    EP_GROUP,
    FLEET,
    POOL,
    SERVICE,
    STATEFUL_SET,
    VOLCANO_GANG,
    Key,
    Object,
    owned,
)
from tandem_operator.reconcile.group import reconcile_group
from unit.operator.world import NOW, STAMP, World


async def test_a_fleet_comes_up() -> None:
    world = World()
    await world.look()
    assert world.groups() == ["decode-0", "prefill-0"]
    assert sorted(world.control.calls) == ["put decode-0", "put prefill-0"]
    found = world.server.objects[Key(FLEET, "ai", "r1")]
    assert found["status"]["summary"] == "1/1 1/1"


async def test_another_look_writes_nothing() -> None:
    world = World()
    await world.look()
    world.server.writes.clear()
    world.control.calls.clear()
    await world.look()
    assert (world.server.writes, world.control.calls) == ([], [])


async def test_another_operator_finds_nothing_to_do() -> None:
    world = World()
    await world.look()
    other = World()
    for key, obj in world.server.objects.items():
        other.server.objects[key] = obj
        other.cache.put(key.kind, {**obj, "metadata": {**obj["metadata"], "resourceVersion": "999999"}})
    other.control.desired, other.control.groups = world.control.desired, world.control.groups
    await other.look()
    assert (other.server.writes, other.control.calls) == ([], [])


async def test_an_operator_that_has_not_yet_reached_the_fleet_tells_nothing_else_than_before() -> None:
    world = World()
    await world.look()
    world.server.writes.clear()
    world.link.reachable = world.link.known = False
    await world.look()
    assert world.server.writes == []


async def test_a_number_that_somebody_set_stands() -> None:
    world = World()
    await world.look()
    world.scale("decode", 3)
    world.say(slo={"ttftSeconds": 9})
    await world.look()
    assert world.server.objects[Key(POOL, "ai", "r1-decode")]["spec"]["replicas"] == 3
    assert world.groups() == ["decode-0", "decode-1", "decode-2", "prefill-0"]


async def test_a_fleet_that_says_another_number_is_heard() -> None:
    world = World()
    await world.look()
    world.scale("decode", 3)
    world.say(decode={"groups": 2, "rollout": {"canarySeconds": 0}})
    await world.look()
    assert world.server.objects[Key(POOL, "ai", "r1-decode")]["spec"]["replicas"] == 2


async def test_a_paused_fleet_is_left_as_it_is() -> None:
    world = World()
    await world.look()
    world.say(paused=True, gateway={"replicas": 5})
    await world.look()
    world.server.drop(Key(STATEFUL_SET, "ai", "r1-head"))
    await world.look()
    assert Key(STATEFUL_SET, "ai", "r1-head") not in world.server.objects
    assert world.server.objects[Key(STATEFUL_SET, "ai", "r1-gateway")]["spec"]["replicas"] == 1


async def test_a_wrong_fleet_is_told_and_nothing_is_made() -> None:
    world = World(planning={"gpuBudget": 1})
    await world.look()
    assert list(world.server.objects) == [Key(FLEET, "ai", "r1")]
    valid = world.condition(world.server.objects[Key(FLEET, "ai", "r1")], "Valid")
    assert (valid["status"], "planning.gpuBudget" in valid["message"]) == ("False", True)


async def test_what_is_not_needed_any_more_is_removed() -> None:
    world = World()
    await world.look()
    world.say(redis={"urlSecret": {"name": "s", "key": "k"}})
    await world.look()
    assert Key(STATEFUL_SET, "ai", "r1-redis") not in world.server.objects


# -- groups


async def test_a_group_that_is_wanted_less_drains_and_then_goes() -> None:
    world = World(decode={"groups": 2, "rollout": {"canarySeconds": 0}})
    await world.look()
    world.scale("decode", 1)
    await world.look()
    drains = [call for call in world.control.calls if call.startswith("drain")]
    assert len(drains) == 1
    leaving = drains[0].split()[1]
    assert world.group(leaving) is not None
    world.control.gone(leaving)
    await world.look()
    world.ctx.at += 5
    await world.look()
    assert world.group(leaving) is None
    assert Key(STATEFUL_SET, "ai", f"r1-{leaving}") in world.server.objects, "what it owned is Kubernetes' to remove"


async def test_a_group_that_its_fleet_does_not_know_for_a_moment_does_not_go_without_a_drain() -> None:
    world = World()
    await world.look()
    desired, groups = dict(world.control.desired), dict(world.control.groups)
    await world.delete("decode-0")
    world.control.gone("decode-0")  # the state came back empty
    await world.look()
    world.link.reachable = False  # and its head once more
    world.ctx.at += 6
    await world.look()
    world.link.reachable = True
    await world.look()
    assert world.group("decode-0") is not None
    world.control.desired, world.control.groups = desired, groups
    await world.look()
    assert "drain decode-0" in world.control.calls
    world.control.gone("decode-0")
    world.ctx.at += 4  # counted anew
    await world.look()
    assert world.group("decode-0") is not None
    world.ctx.at += 5
    await world.look()
    assert world.group("decode-0") is None


async def test_a_group_that_the_fleet_never_had_goes_at_once() -> None:
    world = World()
    world.link.reachable = False
    await world.look()
    await world.delete("decode-0")
    world.link.reachable = True
    await reconcile_group(world.ctx, Key(EP_GROUP, "ai", "r1-decode-0"))
    assert world.group("decode-0") is None


def orphan(world: World, key: Key) -> None:
    """What Kubernetes does to what an object owned, with `--cascade=orphan`."""
    obj = world.server.objects[key]
    meta = {name: value for name, value in obj["metadata"].items() if name != "ownerReferences"}
    world.server.put(key, {**obj, "metadata": meta})


async def test_a_pool_that_is_made_again_takes_up_the_groups_that_the_old_one_has_left() -> None:
    world = World()
    await world.look()
    world.scale("decode", 2)
    await world.look()
    before, calls = world.groups(), list(world.control.calls)
    pool = Key(POOL, "ai", "r1-decode")
    world.server.drop(pool)
    for group in ("decode-0", "decode-1"):
        orphan(world, Key(EP_GROUP, "ai", f"r1-{group}"))
    orphan(world, Key(BUDGET, "ai", "r1-decode"))
    await world.look()
    assert (world.groups(), world.control.calls) == (before, calls)
    made = world.server.objects[pool]
    assert made["spec"]["replicas"] == 2
    for key in (*(Key(EP_GROUP, "ai", f"r1-decode-{number}") for number in range(2)), Key(BUDGET, "ai", "r1-decode")):
        assert owned(world.server.objects[key], made)
    assert "GroupAdopted: decode-1 had no owner, and is this pool's now." in world.recorder.told


async def test_a_group_that_somebody_else_made_without_an_owner_is_left_alone() -> None:
    world = World()
    await world.look()
    key = Key(EP_GROUP, "ai", "r1-decode-0")
    meta = world.server.objects[key]["metadata"]
    orphan(world, key)
    strange = {**meta["labels"], "app.kubernetes.io/managed-by": "somebody"}
    live = world.server.objects[key]
    world.server.put(key, {**live, "metadata": {**live["metadata"], "labels": strange}})
    await world.look()
    assert "ownerReferences" not in world.server.objects[key]["metadata"]


async def test_what_a_group_leaves_without_an_owner_goes_with_it() -> None:
    world = World(decode={"groups": 2, "rollout": {"canarySeconds": 0}})
    await world.look()
    key = Key(EP_GROUP, "ai", "r1-decode-1")
    live = world.server.objects[key]
    held = [*live["metadata"]["finalizers"], "orphan"]
    world.server.put(key, {**live, "metadata": {**live["metadata"], "finalizers": held, "deletionTimestamp": STAMP}})
    await world.look()
    world.control.gone("decode-1")
    world.ctx.at += 6
    await world.look()
    kept = world.group("decode-1")
    assert kept is not None
    assert kept["metadata"]["finalizers"] == held, "Kubernetes is not done with what it owned"
    children = [Key(kind, "ai", "r1-decode-1") for kind in (STATEFUL_SET, SERVICE)]
    for child in children:
        orphan(world, child)
    live = world.server.objects[key]
    world.server.put(key, {**live, "metadata": {**live["metadata"], "finalizers": ["tandem.dev/drain"]}})
    await world.look()
    world.ctx.at += 6
    await world.look()
    assert world.group("decode-1") is None
    assert not [child for child in children if child in world.server.objects]
    assert Key(STATEFUL_SET, "ai", "r1-decode-0") in world.server.objects


async def test_a_group_that_drains_tells_until_when() -> None:
    world = World(decode={"groups": 2, "rollout": {"canarySeconds": 0}})
    await world.look()
    await world.delete("decode-1")
    await world.look()
    found = world.group("decode-1")
    assert found is not None
    assert found["status"]["phase"] == "Draining"
    assert found["status"]["drainDeadline"] == "2027-01-15T08:01:00Z"


async def test_a_group_that_is_still_needed_waits_until_it_is_forced() -> None:
    world = World()
    await world.look()
    world.control.refuses = "decode-0 is the last one."
    await world.delete("decode-0")
    await world.look()
    assert world.condition(world.group("decode-0"), "Drained")["message"] == "decode-0 is the last one."
    assert any(told == "StillNeeded: decode-0 is the last one." for told in world.recorder.told)
    group = world.group("decode-0")
    assert group is not None
    meta = {**group["metadata"], "annotations": {"tandem.dev/force-drain": "true"}}
    world.server.put(Key(EP_GROUP, "ai", "r1-decode-0"), {**group, "metadata": meta})
    await world.look()
    assert "drain decode-0 by force" in world.control.calls


async def test_the_last_group_of_a_pool_that_should_have_none_is_forced() -> None:
    world = World()
    await world.look()
    world.control.refuses = "decode-0 is the last one."
    world.scale("decode", 0)
    await world.look()
    assert "drain decode-0 by force" in world.control.calls


async def test_without_a_control_service_a_group_waits_for_the_drain_deadline_and_then_goes() -> None:
    world = World()
    await world.look()
    await world.delete("decode-0")
    world.link.reachable, world.link.away_s = False, 100.0
    world.ctx.at = NOW + 100
    await world.look()
    assert world.group("decode-0") is not None
    world.link.away_s = 130.0
    world.ctx.at = NOW + 130
    await world.look()
    assert world.group("decode-0") is None
    assert any(told.startswith("NotDrained: ") for told in world.recorder.told)


async def test_a_control_service_that_was_only_just_lost_is_waited_for() -> None:
    world = World()
    await world.look()
    await world.delete("decode-0")
    world.link.reachable, world.link.away_s = False, 5.0
    world.ctx.at = NOW + 3600
    await world.look()
    assert world.group("decode-0") is not None


async def test_groups_of_a_fleet_that_is_gone_let_go_at_once() -> None:
    world = World()
    await world.look()
    world.server.drop(Key(FLEET, "ai", "r1"))
    await world.delete("decode-0")
    await world.look(1)
    assert world.group("decode-0") is None
    assert not any(call.startswith("drain") for call in world.control.calls)


async def test_a_group_that_an_evicted_pod_drained_is_put_again_and_has_no_stand_in() -> None:
    world = World()
    await world.look()
    await world.control.drain("decode-0")
    await world.look()
    assert world.groups() == ["decode-0", "prefill-0"]
    world.control.gone("decode-0")
    await world.look()
    assert world.control.calls.count("put decode-0") == 2


async def test_weights_that_the_fleet_gave_a_group_are_not_taken_back() -> None:
    world = World()
    await world.look()
    spec = world.control.desired["decode-0"]
    world.control.desired["decode-0"] = replace(spec, weights_path="/two", weight_version="2")
    await world.look()
    assert world.control.calls.count("put decode-0") == 1


async def test_while_the_control_service_is_away_groups_are_made_and_none_is_removed() -> None:
    world = World(decode={"groups": 2, "rollout": {"canarySeconds": 0}})
    world.link.reachable = False
    await world.look()
    assert world.groups() == ["decode-0", "decode-1", "prefill-0"]
    world.scale("decode", 1)
    await world.look()
    assert all("deletionTimestamp" not in group["metadata"] for group in world.server.objects.values())


async def test_a_group_without_an_object_drains_but_not_at_once() -> None:
    world = World()
    await world.look()
    lost = replace(world.control.desired["decode-0"], group="decode-9")
    await world.control.put_group(lost)
    await world.look()
    assert "drain decode-9" not in world.control.calls
    world.ctx.at = NOW + 31
    await world.look()
    assert "drain decode-9" in world.control.calls


async def test_nothing_of_a_paused_fleet_drains_for_want_of_an_object() -> None:
    world = World()
    await world.look()
    await world.control.put_group(replace(world.control.desired["decode-0"], group="decode-9"))
    world.say(paused=True)
    await world.look()
    world.ctx.at = NOW + 3600
    await world.look()
    assert "drain decode-9" not in world.control.calls
    world.say(paused=False)
    await world.look()  # and after that it is looked at for as long as any other
    assert "drain decode-9" not in world.control.calls


# -- changes


async def test_another_image_goes_group_by_group_and_the_old_ones_drain() -> None:
    world = World()
    await world.look()
    old = {name: (world.group(name) or {})["spec"]["revision"] for name in world.groups()}
    world.say(images={"engine": {"name": "engine:2"}})
    await world.look(1)
    assert any(call.startswith("put") for call in world.control.calls)
    for step in range(1, 12):
        world.ctx.at = NOW + 60 * step
        for name, group in list(world.control.groups.items()):
            if group.state is GroupState.DRAINING:
                world.control.gone(name)
        await world.look()
    images = {(world.group(name) or {})["spec"]["template"]["image"]["name"] for name in world.groups()}
    assert images == {"engine:2"}
    assert len(world.groups()) == 2
    assert not set(old) & set(world.groups())


async def test_the_templates_that_a_rollback_needs_are_kept() -> None:
    world = World()
    await world.look()
    kept = world.server.objects[Key(CONFIG_MAP, "ai", "r1-rollout")]["data"]["rollout.json"]
    assert (world.group("decode-0") or {})["spec"]["revision"] in kept
    assert "engine:1" in kept


async def test_no_group_is_made_under_the_name_of_a_template_that_nobody_has_kept() -> None:
    world = World()
    await world.look()
    world.link.reachable = False  # so that nothing is written down meanwhile
    remembered = Key(CONFIG_MAP, "ai", "r1-rollout")
    kept = json.loads(world.server.objects[remembered]["data"]["rollout.json"])
    memory = json.dumps({**kept, "revisions": {}})
    world.server.put(remembered, {**world.server.objects[remembered], "data": {"rollout.json": memory}})
    world.say(images={"engine": {"name": "engine:2"}})
    world.server.drop(Key(EP_GROUP, "ai", "r1-decode-0"))
    await world.look()
    assert world.group("decode-0") is None
    told = world.condition(world.server.objects[Key(POOL, "ai", "r1-decode")], "Degraded")
    assert (told["reason"], "whose template nobody has kept" in told["message"]) == ("Trouble", True)


async def test_one_pool_can_be_paused_by_hand() -> None:
    world = World()
    await world.look()
    key = Key(POOL, "ai", "r1-decode")
    pool = world.server.objects[key]
    world.server.put(key, {**pool, "spec": {**pool["spec"], "paused": True}})
    await world.look()
    assert world.server.objects[key]["spec"]["paused"] is True


@pytest.mark.parametrize(("status", "advice"), [(403, "operator.gangSchedulers"), (404, "install that scheduler")])
async def test_a_gang_scheduler_that_cannot_be_told_is_trouble_of_the_group(status: int, advice: str) -> None:
    world = World(decode={"pods": {"gang": {"scheduler": "volcano"}}})
    allowed = world.server.apply

    async def apply(key: Key, obj: Object) -> Object:
        if key.kind is VOLCANO_GANG:
            raise KubeError("refused", status)
        return await allowed(key, obj)

    world.server.apply = apply  # type: ignore[method-assign]
    await world.look()
    told = world.condition(world.group("decode-0"), "Degraded")
    assert (told["status"], advice in told["message"]) == ("True", True)


async def test_no_pod_of_the_only_ready_group_may_be_evicted() -> None:
    world = World()
    await world.look()
    budget = Key(BUDGET, "ai", "r1-decode")
    assert world.server.objects[budget]["spec"]["maxUnavailable"] == 0
    world.scale("decode", 2)
    await world.look()
    assert world.server.objects[budget]["spec"]["maxUnavailable"] == 1
    world.control.groups["decode-0"] = replace(world.control.groups["decode-0"], state=GroupState.FAILED)
    await world.look()
    assert world.server.objects[budget]["spec"]["maxUnavailable"] == 0
