"""A Fleet in a Ray cluster that is somebody else's: Ray places its groups, and it takes them along when it goes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from tandem.core.types import GroupState, Rank, RankState
from tandem_operator.kube import KubeError
from tandem_operator.names import (
    BUDGET,
    CONFIG_MAP,
    EP_GROUP,
    FLEET,
    RAY_FINALIZER,
    SERVICE,
    STATEFUL_SET,
    Key,
    Object,
)
from tandem_operator.reconcile.members import members_of
from unit.operator.world import STAMP, World

HERE = Key(FLEET, "ai", "r1")


def guest(**spec: Any) -> World:
    return World(**{"ray": {"address": "ray.kuberay:6379"}, "model": {"path": "/models/r1"}, **spec})


def found(world: World, kind: object) -> set[str]:
    return {key.name for key in world.server.objects if key.kind is kind}


def config(world: World) -> dict[str, Any]:
    text: str = world.server.objects[Key(CONFIG_MAP, "ai", "r1-config")]["data"]["fleet.json"]
    made: dict[str, Any] = json.loads(text)
    return made


def environment(world: World, part: str) -> dict[str, Any]:
    template = world.server.objects[Key(STATEFUL_SET, "ai", f"r1-{part}")]["spec"]["template"]
    return {one["name"]: one.get("value", one.get("valueFrom")) for one in template["spec"]["containers"][0]["env"]}


def fleet(world: World) -> Object:
    return world.server.objects[HERE]


def deleted(world: World) -> None:
    obj = fleet(world)
    world.server.put(HERE, {**obj, "metadata": {**obj["metadata"], "deletionTimestamp": STAMP}})


async def test_its_groups_are_put_and_get_no_pods() -> None:
    world = guest()
    await world.look()
    assert world.groups() == ["decode-0", "prefill-0"]
    assert {"put decode-0", "put prefill-0"} <= set(world.control.calls)
    assert found(world, STATEFUL_SET) == {"r1-head", "r1-gateway", "r1-redis"}
    assert found(world, SERVICE) == {"r1", "r1-head", "r1-redis"}
    assert found(world, BUDGET) == {"r1-gateway"}


async def test_another_look_writes_nothing() -> None:
    world = guest()
    await world.look()
    world.server.writes.clear()
    await world.look()
    assert world.server.writes == []


async def test_its_processes_are_told_the_cluster_and_how_it_is_called_there() -> None:
    world = guest(ray={"address": "ray.kuberay:6379", "authTokenSecret": {"name": "ray", "key": "auth_token"}})
    await world.look()
    assert config(world)["ray"] == {"address": "ray.kuberay:6379", "namespace": "tandem-ai.r1"}
    gateway = environment(world, "gateway")
    assert (gateway["TANDEM_GCS"], gateway["TANDEM_RAY_NAMESPACE"]) == ("ray.kuberay:6379", "tandem-ai.r1")
    for part in ("head", "gateway"):
        told = environment(world, part)
        assert told["RAY_AUTH_MODE"] == "token"
        assert told["RAY_gcs_rpc_server_reconnect_timeout_s"] == "600"
        assert told["RAY_AUTH_TOKEN"] == {"secretKeyRef": {"name": "ray", "key": "auth_token"}}


async def test_what_is_not_done_there_is_told() -> None:
    world = guest(decode={"pods": {"hostNetwork": True}}, ray={"address": "ray:6379", "storage": "1Gi"})
    await world.look()
    told = world.condition(fleet(world), "PlacedByRay")
    assert (told["status"], told["reason"]) == ("True", "RayCluster")
    assert told["message"].endswith("These settings have no meaning: ray.storage, decode.pods.hostNetwork.")


async def test_a_fleet_with_a_cluster_of_its_own_says_so() -> None:
    world = World()
    await world.look()
    assert world.condition(fleet(world), "PlacedByRay")["status"] == "False"
    assert RAY_FINALIZER not in (fleet(world)["metadata"].get("finalizers") or ())


async def test_another_image_of_the_engine_is_no_reason_to_make_groups_anew() -> None:
    world = guest()
    await world.look()
    before = world.server.objects[Key(EP_GROUP, "ai", "r1-decode-0")]["spec"]["revision"]
    world.say(images={"engine": {"name": "registry/tandem:next"}, "redis": {"name": "redis:7"}})
    await world.look()
    assert world.server.objects[Key(EP_GROUP, "ai", "r1-decode-0")]["spec"]["revision"] == before


async def test_without_a_folder_of_the_model_on_its_nodes_it_is_refused() -> None:
    world = guest(model={})
    await world.look()
    assert list(world.server.objects) == [HERE]
    told = world.condition(fleet(world), "Valid")
    assert (told["status"], told["message"].startswith("spec.model.path")) == ("False", True)


@pytest.mark.parametrize(("before", "after"), [({"address": "ray:6379"}, {}), ({}, {"address": "ray:6379"})])
async def test_it_cannot_move_to_another_cluster(before: dict[str, Any], after: dict[str, Any]) -> None:
    world = guest(ray=before)
    await world.look()
    sets = found(world, STATEFUL_SET)
    world.say(ray=after, model={"path": "/models/r1"})
    await world.look()
    assert found(world, STATEFUL_SET) == sets
    assert "cannot be changed" in world.condition(fleet(world), "Valid")["message"]
    assert config(world)["ray"].get("address") == before.get("address")


async def test_nothing_is_begun_before_the_fleet_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    world = guest()

    async def forbidden(key: Key, change: Object, *, part: str = "") -> Object:
        if part:
            return await patch(key, change, part=part)
        raise KubeError("fleets.tandem.dev is forbidden", 403)

    patch = world.server.patch
    monkeypatch.setattr(world.server, "patch", forbidden)
    await world.look()
    assert list(world.server.objects) == [HERE]
    told = world.condition(fleet(world), "Valid")
    assert (told["reason"], "operator.rayClusters" in told["message"]) == ("NotAllowed", True)


async def test_a_deleted_fleet_stays_until_ray_has_none_of_its_groups() -> None:
    world = guest()
    await world.look()
    deleted(world)
    await world.look()
    assert {"remove decode-0", "remove prefill-0"} <= set(world.control.calls)
    assert HERE in world.server.objects
    for group in ("decode-0", "prefill-0"):
        world.control.gone(group)
    await world.look()
    assert HERE not in world.server.objects


async def test_a_deleted_fleet_waits_for_its_head_which_takes_the_gateways_along() -> None:
    world = guest()
    await world.look()
    head = Key(STATEFUL_SET, "ai", "r1-head")
    world.server.put(head, {**world.server.objects[head], "status": {"replicas": 1}})
    for group in ("decode-0", "prefill-0"):
        world.control.gone(group)
    deleted(world)
    await world.look()
    assert HERE in world.server.objects
    assert world.server.objects[head]["spec"]["replicas"] == 0
    world.server.put(head, {**world.server.objects[head], "status": {"replicas": 0}})
    await world.look()
    assert HERE not in world.server.objects


async def test_groups_of_a_deleted_fleet_are_not_put_again() -> None:
    world = guest()
    await world.look()
    deleted(world)
    await world.look()
    world.control.calls.clear()
    await world.look()
    assert world.control.calls == []


async def test_a_deleted_fleet_whose_head_is_away_goes_in_the_end_and_says_what_it_leaves() -> None:
    world = guest()
    await world.look()
    deleted(world)
    world.link.reachable = False
    world.link.away_s, world.ctx.at = 60.0, world.ctx.at + 60
    await world.look()
    assert HERE in world.server.objects
    world.link.away_s, world.ctx.at = 130.0, world.ctx.at + 70
    await world.look()
    assert HERE not in world.server.objects
    assert "delete Ray Serve's application tandem-gateway-tandem-ai.r1" in world.recorder.told[-1]


@pytest.mark.parametrize(
    ("reason", "rank", "expected"),
    [
        ("waits for nodes: 2 with 8 GPU free on each", "", (True, None)),
        ("its engine starts", "n1", (False, 5.0)),
    ],
    ids=["no room", "placed"],
)
async def test_whether_ray_has_room_is_told_by_the_group(
    reason: str, rank: str, expected: tuple[bool, float | None]
) -> None:
    world = guest()
    await world.look()
    obj = world.server.objects[Key(EP_GROUP, "ai", "r1-decode-0")]
    ranks = (Rank(rank=0, state=RankState.STARTING, node=rank),)
    starting = replace(
        world.control.groups["decode-0"],
        state=GroupState.STARTING,
        reason=reason,
        ranks=ranks,
        since=5.0,
        weight_version="",
    )
    world.control.groups["decode-0"] = starting
    (member,) = members_of([obj], world.control.snapshot, {}, None, trials={})
    assert (member.no_room, member.placed) == expected
    assert world.condition(obj, "PodsReady")["reason"] == "PlacedByRay"
