"""Another model.path or version in a Fleet: groups that declare other weights, and what keeps them back."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from tandem.config import TimeoutConfig
from tandem.core.group_check import CheckVerdict, GroupCheck
from tandem.core.types import FleetSnapshot, Group, GroupSpec, GroupState, Role
from tandem.fleet.control_client import ControlError
from tandem_operator.names import POOL, Key, Object
from tandem_operator.reconcile.group import drain_limit
from unit.operator.world import World

CALM: dict[str, Any] = {"rollout": {"canarySeconds": 0}}


async def serving(path: str = "/models/a") -> World:
    world = World(model={"path": path})
    await world.look()
    return world


def change(world: World, path: str = "/models/b", **more: Any) -> None:
    world.say(model={"path": path, **more})


async def gone(world: World, *names: str) -> None:
    """These groups have drained."""
    for name in names:
        world.control.gone(name)
    for _ in range(3):
        await world.look()
        world.ctx.at += 6


def progressing(world: World, role: str = "decode") -> Object:
    return world.condition(world.server.objects[Key(POOL, "ai", f"r1-{role}")], "Progressing")


async def test_groups_declare_what_the_fleet_says_and_the_fleet_says_what_they_serve() -> None:
    world = await serving()
    spec = world.control.desired["decode-0"]
    assert (spec.declared_path, spec.declared_version) == ("/models/a", "a-b6a25830")
    assert (spec.weights_path, spec.weight_version) == ("", "")


async def test_both_pools_move_to_other_weights_by_groups_that_declare_them() -> None:
    world = await serving()
    change(world, version="0528")
    await world.look()
    await gone(world, "prefill-0", "decode-0")
    assert world.groups() == ["decode-1", "prefill-1"]
    assert {spec.declared_version for spec in world.control.desired.values()} == {"0528"}
    assert [call for call in world.control.calls if call.startswith("weights")] == ["weights 0528 in /models/b"]
    assert progressing(world)["reason"] == "AllReady"


async def test_a_refresh_changes_no_revision_and_is_not_undone() -> None:
    world = await serving()
    for name, spec in world.control.desired.items():
        world.control.desired[name] = replace(spec, weights_path="/models/c", weight_version="3")
    world.control.calls.clear()
    world.server.writes.clear()
    await world.look()
    assert (world.control.calls, world.server.writes) == ([], [])


async def test_weights_that_the_fleet_cannot_take_are_told_and_nothing_is_made() -> None:
    world = await serving()
    world.control.bad_weights = "The weights in /models/b cannot be taken: it holds no weights."
    change(world)
    await world.look()
    assert world.groups() == ["decode-0", "prefill-0"]
    for role in Role:
        told = progressing(world, role)
        assert (told["status"], told["reason"]) == ("False", "Held")
        assert told["message"].startswith(
            "The weights in /models/b cannot be taken: it holds no weights; 0 of 1 groups"
        )
    assert len([call for call in world.control.calls if call.startswith("weights")]) == 1
    world.server.writes.clear()
    await world.look()
    assert world.server.writes == []
    world.control.bad_weights = ""
    world.ctx.at += 10
    await world.look()
    assert world.groups() == ["decode-0", "decode-1", "prefill-0", "prefill-1"]


async def test_a_head_of_an_older_tandem_is_not_given_groups_that_it_would_start_with_other_weights() -> None:
    world = await serving()

    async def check_weights(path: str, version: str) -> None:
        raise ControlError("Method not found!", "UNIMPLEMENTED")

    world.control.check_weights = check_weights  # type: ignore[method-assign]
    change(world)
    await world.look()
    assert world.groups() == ["decode-0", "prefill-0"]
    assert "the fleet's head is of an older Tandem" in progressing(world)["message"]


async def test_other_changes_ask_nobody_of_the_weights() -> None:
    world = await serving()
    world.control.bad_weights = "The weights in /models/a cannot be taken: they are gone."
    world.say(model={"path": "/models/a"}, decode={"args": ["--seed=2"], **CALM})
    await world.look()
    assert not any(call.startswith("weights") for call in world.control.calls)
    assert "decode-1" in world.groups()


async def test_while_a_refresh_goes_on_no_change_begins() -> None:
    world = await serving()
    world.control.refreshing = "3"
    change(world)
    await world.look()
    assert world.groups() == ["decode-0", "prefill-0"]
    assert progressing(world)["message"].startswith("the fleet takes other weights (version 3); 0 of 1 groups")
    world.control.refreshing = ""
    await world.look()
    assert "decode-1" in world.groups()


async def test_weights_that_answer_wrongly_are_taken_back_in_both_pools_also_when_their_folder_goes_meanwhile() -> None:
    world = await serving()
    world.control.answers = {
        "decode-1": GroupCheck(verdict=CheckVerdict.WRONG, message="it answered with a token of no finite probability"),
        "prefill-1": GroupCheck(verdict=CheckVerdict.ALONE, message="answers alone"),
    }
    change(world)
    await world.look(2)
    world.control.bad_weights = "The weights in /models/b cannot be taken: they are gone."
    world.ctx.at += 20
    await world.look()
    await gone(world, "prefill-1", "decode-1")
    assert world.groups() == ["decode-0", "prefill-0"]
    assert progressing(world, "decode")["reason"] == "RevisionFailed"
    assert progressing(world, "prefill")["reason"] == "PartnerFailed"
    assert {spec.declared_path for spec in world.control.desired.values()} == {"/models/a"}


async def test_a_lost_group_of_the_old_weights_comes_back_with_what_it_declared() -> None:
    world = await serving()
    world.control.answers = dict.fromkeys(("prefill-1", "decode-1"), GroupCheck(verdict=CheckVerdict.ALONE))
    change(world)
    await world.look()
    await world.delete("decode-0")
    await world.look()
    assert world.control.desired["decode-2"].declared_path == "/models/a"


# -- how long a group may drain

TIMEOUTS = TimeoutConfig(drain_s=120, refresh_drain_s=660)


def fleet(**versions: str) -> FleetSnapshot:
    """Groups that serve with these versions; of one whose version ends in !, the wish drains."""
    groups, specs = [], []
    for name, version in versions.items():
        role = Role(name[:-1])
        groups.append(Group(group=name, role=role, epoch=1, state=GroupState.READY, weight_version=version.rstrip("!")))
        specs.append(GroupSpec(group=name, role=role, nodes=1, draining=version.endswith("!")))
    return FleetSnapshot(groups=tuple(groups), desired=tuple(specs))


@pytest.mark.parametrize(
    ("others", "seconds"),
    [
        ({"prefill1": "b", "decode1": "b"}, 660),
        ({"prefill0": "a", "prefill1": "b", "decode1": "b"}, 660),
        ({"prefill0": "a", "decode2": "a", "prefill1": "b", "decode1": "b"}, 120),
        ({"prefill0": "a", "decode2": "a!", "prefill1": "b", "decode1": "b"}, 660),
        ({"prefill0": "a", "decode2": "a"}, 120),
        ({"prefill0": "a"}, 120),
        ({}, 120),
    ],
)
def test_the_last_group_of_its_weights_has_as_long_as_a_request_may_last(others: dict[str, str], seconds: int) -> None:
    assert drain_limit(TIMEOUTS, fleet(decode0="a", **others), "decode0") == seconds
