"""The first group of a revision serves nobody before it has answered a known prompt."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace
from prometheus_client import REGISTRY

from tandem.core.group_check import CheckVerdict, GroupCheck
from tandem.core.rollout_check import Trial
from tandem.core.types import GroupState
from tandem.fleet.control_client import ControlError
from tandem_operator.names import EP_GROUP, POOL, STATEFUL_SET, Key, Object
from tandem_operator.reconcile.members import members_of
from unit.operator.world import World

CALM: dict[str, Any] = {"rollout": {"canarySeconds": 30}}
WRONG = GroupCheck(verdict=CheckVerdict.WRONG, message="it says Rome")
SILENT = GroupCheck(verdict=CheckVerdict.SILENT, message="the canary on decode-1 gave no answer within 40 s")
ALONE = GroupCheck(verdict=CheckVerdict.ALONE, message="no prefill group has its KV format")


async def changed(answer: GroupCheck | None = None, **rollout: Any) -> World:
    """Decode gets other flags, and its first new group, decode-1, is up. It is asked when somebody looks."""
    world = World(decode=CALM)
    await world.look()
    if answer is not None:
        world.control.answers["decode-1"] = answer
    world.say(decode={"args": ["--seed=2"], "rollout": {**CALM["rollout"], **rollout}})
    await world.look(1)
    return world


def checked(world: World, name: str = "decode-1") -> tuple[str, str]:
    condition = world.condition(world.group(name), "Checked")
    return condition["status"], condition["reason"]


def degraded(world: World) -> Object:
    return world.condition(world.server.objects[Key(POOL, "ai", "r1-decode")], "Degraded")


def stopped(role: str) -> float | None:
    labels = {"namespace": "ai", "fleet": "r1", "role": role}
    return REGISTRY.get_sample_value("tandem_operator_pool_change_stopped", labels)


async def test_the_first_group_of_a_revision_is_cordoned_until_it_has_answered() -> None:
    world = await changed()
    assert world.control.desired["decode-1"].cordoned
    assert world.control.groups["decode-1"].state is GroupState.CORDONED
    await world.look()
    assert world.control.calls.count("check decode-1") == 1
    assert not world.control.desired["decode-1"].cordoned
    assert stopped("decode") == 0
    assert checked(world) == ("True", "Answered")
    assert "Checked: decode-1 has answered the known prompt, and serves." in world.recorder.told


async def test_the_first_revision_of_a_pool_is_not_asked() -> None:
    world = World()
    await world.look()
    assert not any(call.startswith("check") for call in world.control.calls)
    assert all(not spec.cordoned for spec in world.control.desired.values())


async def test_groups_that_follow_the_first_are_not_asked() -> None:
    world = World(decode={"groups": 2, **CALM})
    await world.look()
    world.say(decode={"groups": 2, "args": ["--seed=2"], **CALM})
    await world.look()
    world.ctx.at += 31
    for name, group in world.control.groups.items():
        world.control.groups[name] = replace(group, since=world.ctx.at - 31)
    await world.look()
    assert [call for call in world.control.calls if call.startswith("check")] == ["check decode-2"]
    assert not any(spec.cordoned for spec in world.control.desired.values())


async def test_a_wrong_answer_ends_the_change_and_nobody_is_sent_there() -> None:
    world = await changed(WRONG)
    held = [world.control.desired["decode-1"].cordoned]
    for _ in range(4):
        await world.look(1)
        held.append("decode-1" in world.control.desired and world.control.desired["decode-1"].cordoned)
    assert all(held)
    assert "drain decode-1" in world.control.calls
    world.control.gone("decode-1")
    await world.look()
    world.ctx.at += 6
    await world.look()
    assert world.groups() == ["decode-0", "prefill-0"]
    told = degraded(world)
    assert (told["status"], told["reason"]) == ("True", "RevisionFailed")
    assert (stopped("decode"), stopped("prefill")) == (1, 0)
    assert "decode-1 failed the known prompt: it says Rome" in told["message"]
    warned = "AnswersWrongly: decode-1 failed the known prompt, and serves nobody: it says Rome"
    assert world.recorder.told.count(warned) == 1


async def test_without_rollback_the_wrong_group_stays_and_serves_nobody() -> None:
    world = await changed(WRONG, rollback=False)
    await world.look()
    assert world.groups() == ["decode-0", "decode-1", "prefill-0"]
    assert world.control.desired["decode-1"].cordoned
    assert checked(world) == ("False", "AnswersWrongly")
    assert world.control.calls.count("check decode-1") == 1
    world.server.writes.clear()
    await world.look()
    assert world.server.writes == []


async def test_a_group_that_answered_wrongly_does_not_serve_because_nobody_is_asked_any_more() -> None:
    world = await changed(WRONG, rollback=False)
    await world.look()
    world.say(decode={"args": ["--seed=2"], "rollout": {**CALM["rollout"], "rollback": False, "canaryPrompt": False}})
    await world.look()
    assert world.control.desired["decode-1"].cordoned
    assert checked(world) == ("False", "AnswersWrongly")
    assert degraded(world)["reason"] == "RevisionFailed"


async def test_another_revision_that_nobody_asks_goes_on_after_one_that_answered_wrongly() -> None:
    world = await changed(WRONG, rollback=False)
    await world.look()
    world.say(decode={"args": ["--seed=3"], "rollout": {**CALM["rollout"], "canaryPrompt": False}})
    await world.look()
    assert "drain decode-1" in world.control.calls
    assert checked(world, "decode-2") == ("Unknown", "NotAsked")
    assert not world.control.desired["decode-2"].cordoned


async def test_another_operator_knows_what_was_answered() -> None:
    world = await changed(WRONG, rollback=False)
    await world.look()
    world.ctx.checks = type(world.ctx.checks)()
    await world.look()
    assert world.control.calls.count("check decode-1") == 1
    assert checked(world) == ("False", "AnswersWrongly")


async def test_a_group_that_never_answers_has_failed_after_three_tries() -> None:
    world = await changed(SILENT, rollback=False)
    for tries in range(1, 6):
        await world.look(2)
        group = world.group("decode-1")
        assert group is not None
        assert group["status"]["check"]["silences"] == min(tries, 3)
        world.ctx.at += 5
    assert world.control.calls.count("check decode-1") == 3
    assert checked(world) == ("False", "NoAnswer")
    assert "no answer in 3 tries; the canary on decode-1 gave no answer within 40 s" in degraded(world)["message"]


async def test_a_group_without_a_partner_is_asked_again_and_again_and_serves_nobody() -> None:
    world = await changed(ALONE)
    await world.look()
    assert world.control.calls.count("check decode-1") == 1
    world.ctx.at += 5
    await world.look()
    assert world.control.calls.count("check decode-1") == 2
    assert checked(world) == ("Unknown", "NoPartner")
    assert world.control.desired["decode-1"].cordoned


async def test_a_check_that_took_long_is_not_made_again_at_once() -> None:
    world = await changed(ALONE)
    answer = world.control.check

    async def check(group: str) -> GroupCheck:
        world.ctx.at += 100
        return await answer(group)

    world.control.check = check  # type: ignore[method-assign]
    await world.look()
    assert world.control.calls.count("check decode-1") == 1


async def test_where_nobody_wants_a_partner_an_answer_alone_will_do() -> None:
    world = await changed(ALONE)
    world.scale("prefill", 0)
    await world.look()
    assert checked(world) == ("True", "Answered")
    assert not world.control.desired["decode-1"].cordoned


@pytest.mark.parametrize("alone", [True, False])
async def test_one_whose_answer_alone_was_enough_has_served(alone: bool) -> None:
    world = await changed(ALONE)
    groups, trials = [world.group("decode-1")], {"decode-1": Trial(epoch=1, verdict=CheckVerdict.ALONE)}
    (member,) = members_of(groups, world.control.snapshot, {}, None, trials=trials, alone=alone)  # type: ignore[arg-type]
    assert member.served is alone


async def test_a_group_that_starts_again_is_asked_again() -> None:
    world = await changed()
    await world.look()
    there = world.control.groups["decode-1"]
    world.control.groups["decode-1"] = replace(there, epoch=2, state=GroupState.STARTING)
    await world.look()
    assert world.control.desired["decode-1"].cordoned
    assert checked(world) == ("Unknown", "NotReady")
    world.control.groups["decode-1"] = replace(there, epoch=2, state=GroupState.CORDONED)
    await world.look()
    assert world.control.calls.count("check decode-1") == 2
    assert not world.control.desired["decode-1"].cordoned


async def test_once_its_revision_serves_it_starts_again_without_being_asked() -> None:
    world = await changed()
    await world.look()
    world.ctx.at += 31
    there = replace(world.control.groups["decode-1"], since=world.ctx.at - 31)
    world.control.groups["decode-1"] = there
    await world.look()
    world.control.groups["decode-1"] = replace(there, epoch=2, state=GroupState.STARTING)
    await world.look()
    assert not world.control.desired["decode-1"].cordoned
    assert checked(world) == ("True", "RevisionServes")
    assert world.control.calls.count("check decode-1") == 1


async def test_what_people_cordon_stays_cordoned() -> None:
    world = await changed()
    group = world.group("decode-1")
    assert group is not None
    world.server.put(Key(EP_GROUP, "ai", "r1-decode-1"), {**group, "spec": {**group["spec"], "cordoned": True}})
    await world.look()
    assert checked(world) == ("True", "Answered")
    assert world.control.desired["decode-1"].cordoned


async def test_a_pool_may_say_that_nobody_is_asked() -> None:
    world = await changed(WRONG, canaryPrompt=False)
    await world.look()
    assert checked(world) == ("Unknown", "NotAsked")
    assert not world.control.desired["decode-1"].cordoned
    assert "check decode-1" not in world.control.calls


@pytest.mark.parametrize(
    ("code", "sentence"), [("UNIMPLEMENTED", "the fleet's head is of an older Tandem"), ("UNAVAILABLE", "it is away")]
)
async def test_a_check_that_cannot_be_made_says_nothing_of_the_group(code: str, sentence: str) -> None:
    world = await changed()

    async def check(group: str) -> GroupCheck:
        raise ControlError("it is away", code)

    world.control.check = check  # type: ignore[method-assign]
    await world.look()
    assert checked(world) == ("Unknown", "Asking")
    assert sentence in world.condition(world.group("decode-1"), "Checked")["message"]
    assert world.control.desired["decode-1"].cordoned


async def test_another_revision_meanwhile_does_not_let_the_first_one_serve() -> None:
    world = await changed(ALONE)
    await world.look()
    world.control.refuses = "not now"  # decode-1 stays
    world.say(decode={"args": ["--seed=3"], **CALM})
    for _ in range(4):
        await world.look(1)
        assert world.control.desired["decode-1"].cordoned


async def test_a_group_is_asked_whatever_else_is_the_matter_with_it() -> None:
    world = await changed()
    world.server.put(Key(STATEFUL_SET, "ai", "r1-decode-1"), {"metadata": {}})  # somebody else's
    await world.look()
    assert world.condition(world.group("decode-1"), "Degraded")["status"] == "True"
    assert checked(world) == ("True", "Answered")


def progressing(world: World) -> tuple[str, str]:
    condition = world.condition(world.server.objects[Key(POOL, "ai", "r1-decode")], "Progressing")
    return condition["status"], condition["reason"]


async def test_a_canary_that_waits_for_its_answer_for_long_is_told_as_stalled_also_by_another_operator() -> None:
    world = await changed(ALONE, progressSeconds=600)
    await world.look()
    assert progressing(world) == ("True", "Canary")
    world.ctx.at += 300
    world.ctx.checks = type(world.ctx.checks)()  # another operator
    await world.look()
    assert progressing(world) == ("True", "Canary")
    world.ctx.at += 300
    await world.look()
    assert progressing(world) == ("False", "Stalled")
    assert degraded(world)["reason"] == "Stalled"
    (event,) = {told for told in world.recorder.told if told.startswith("Stalled: ")}
    assert "it serves nobody until it has answered a known prompt: no prefill group has its KV format" in event
    assert "it has waited for more than 600 s. It goes on by itself when that is over" in event
    assert world.groups() == ["decode-0", "decode-1", "prefill-0"]
    world.server.writes.clear()
    world.ctx.at += 1
    await world.look()
    assert world.server.writes == []
    world.control.answers["decode-1"] = GroupCheck(verdict=CheckVerdict.OK)
    world.ctx.at += 5
    await world.look()
    assert progressing(world)[1] != "Stalled"
    assert not world.control.desired["decode-1"].cordoned
