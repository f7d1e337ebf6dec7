"""What is told of a fleet whose children cannot be as they should, and who may write which part of a status."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY

from tandem_operator.kube import KubeError
from tandem_operator.metrics import ATTAINMENT, WANTED
from tandem_operator.names import CONFIG_MAP, EP_GROUP, FLEET, POOL, STATEFUL_SET, Key, Kind, Object
from unit.operator.world import World


def refuse(world: World, kind: Kind, sentence: str) -> None:
    """From now on the server takes objects of this kind for wrong."""
    allowed = world.server.apply

    async def apply(key: Key, obj: Object) -> Object:
        if key.kind is kind:
            raise KubeError(f"PATCH: 422: {sentence}", 422, said=sentence, causes=(sentence,))
        return await allowed(key, obj)

    world.server.apply = apply  # type: ignore[method-assign]


async def test_what_the_server_takes_for_wrong_is_told_and_nothing_is_deleted() -> None:
    world = World()
    await world.look()
    refuse(world, STATEFUL_SET, "spec.template.labels: Invalid value")
    world.say(gateway={"pods": {"labels": {"a": "b c"}}})
    world.server.writes.clear()
    await world.look()
    told = world.condition(world.server.objects[Key(FLEET, "ai", "r1")], "Degraded")
    assert (told["status"], "labels: Invalid value" in told["message"]) == ("True", True)
    assert not any(write.startswith("delete") for write in world.server.writes)


async def test_what_a_rollout_has_to_remember_in_a_foreign_object_is_trouble_of_both_pools() -> None:
    world = World()
    world.server.objects[Key(CONFIG_MAP, "ai", "r1-rollout")] = {"metadata": {"name": "r1-rollout"}, "data": {}}
    await world.look()
    assert world.groups() == []
    for role in ("prefill", "decode"):
        told = world.condition(world.server.objects[Key(POOL, "ai", f"r1-{role}")], "Degraded")
        assert "r1-rollout was not made by tandem-operator" in told["message"]


# -- the head


def head_is(world: World, **status: int) -> None:
    key = Key(STATEFUL_SET, "ai", "r1-head")
    world.server.put(key, {**world.server.objects[key], "status": status})


@pytest.mark.parametrize(("updated", "reason"), [({}, "HeadOutdated"), ({"updatedReplicas": 1}, "Starting")])
async def test_a_head_that_runs_an_old_template_is_told_with_what_to_do(updated: dict[str, int], reason: str) -> None:
    world = World()
    await world.look()
    head_is(world, replicas=1, **updated)
    gateway = Key(STATEFUL_SET, "ai", "r1-gateway")
    world.server.put(gateway, {**world.server.objects[gateway], "status": {"readyReplicas": 1}})
    await world.look()
    told = world.condition(world.server.objects[Key(FLEET, "ai", "r1")], "Progressing")
    assert ("kubectl delete pod r1-head-0" in told["message"]) == (reason == "HeadOutdated")
    assert (told["reason"] == "HeadOutdated") == (reason == "HeadOutdated")


async def test_a_head_with_storage_is_replaced_by_kubernetes() -> None:
    world = World(ray={"storage": "10Gi"})
    await world.look()
    head_is(world, replicas=1)
    await world.look()
    told = world.condition(world.server.objects[Key(FLEET, "ai", "r1")], "Progressing")
    assert "old template" not in told["message"]


# -- status


@pytest.mark.parametrize("meanwhile", [{"new": 1}, None])
@pytest.mark.parametrize(
    ("key", "field"),
    [
        (Key(FLEET, "ai", "r1"), "slo"),
        (Key(POOL, "ai", "r1-decode"), "scaling"),
        (Key(EP_GROUP, "ai", "r1-decode-0"), "load"),
    ],
)
async def test_what_the_planner_tells_meanwhile_is_not_overwritten(
    key: Key, field: str, meanwhile: Object | None
) -> None:
    world = World()
    await world.look()
    old = world.cache.get(key)
    assert old is not None
    live = world.server.objects[key]
    now = {field: meanwhile} if meanwhile else {}  # what autoscaling told goes when it ends
    world.server.put(key, {**live, "status": {**live["status"], **now}})
    await world.ctx.tell_status(key, old, {**old["status"], field: {"old": 1}}, [])
    await world.look()
    assert world.server.objects[key]["status"].get(field) == meanwhile


@pytest.mark.parametrize(
    ("least", "said"),
    [
        (0, ("True", "NobodyAsks", "Nobody asks, so no decode group is wanted; the next request brings one, and")),
        (1, ("False", "Unavailable", "no decode group is ready")),
    ],
)
async def test_a_fleet_whose_last_group_went_while_nobody_asks_is_there(least: int, said: tuple[str, str, str]) -> None:
    world = World(decode={"autoscaling": {"minGroups": least}, "rollout": {"canarySeconds": 0}})
    await world.look()
    gateway = Key(STATEFUL_SET, "ai", "r1-gateway")
    world.server.put(gateway, {**world.server.objects[gateway], "status": {"readyReplicas": 1}})
    world.scale("decode", 0)
    await world.look()
    assert "drain decode-0 by force" in world.control.calls
    world.control.gone("decode-0")
    world.ctx.at += 6
    await world.look()
    found = world.condition(world.server.objects[Key(FLEET, "ai", "r1")], "Available")
    assert (found["status"], found["reason"]) == said[:2]
    assert found["message"].startswith(said[2])


async def test_a_fleet_that_is_gone_is_taken_out_of_the_metrics() -> None:
    world = World()
    await world.look()
    sample = {"namespace": "ai", "fleet": "r1", "role": "decode"}
    assert REGISTRY.get_sample_value("tandem_operator_pool_groups_ready", sample) == 1
    WANTED.labels("ai", "r1", "decode").set(1)
    ATTAINMENT.labels("ai", "r1").set(1)
    world.server.drop(Key(FLEET, "ai", "r1"))
    await world.look(1)
    for gauge in ("groups_ready", "groups_wanted", "change_stopped"):
        assert REGISTRY.get_sample_value(f"tandem_operator_pool_{gauge}", sample) is None
    del sample["role"]
    assert REGISTRY.get_sample_value("tandem_operator_slo_attainment", sample) is None
