"""The first group of a revision: kept from serving until it has answered a known prompt, and what is told of that."""

from __future__ import annotations

from dataclasses import dataclass, field

from tandem.core.group_check import CheckVerdict, GroupCheck
from tandem.core.rollout_check import AGAIN_S, Trial, is_due, is_held_back, is_on_trial
from tandem.core.rollout_types import Memory
from tandem.core.types import FleetSnapshot, Group, GroupState, Role
from tandem.fleet.control_client import ControlError
from tandem_operator.api.pool import GroupSpec
from tandem_operator.conditions import Told, told
from tandem_operator.control import FleetLink
from tandem_operator.names import EP_GROUP, FLEET, POOL, POOLS, Key, Object, pool_name
from tandem_operator.reconcile.context import Context
from tandem_operator.reconcile.members import members_of
from tandem_operator.reconcile.remembered import remembered

_LONGEST = 1000


@dataclass(frozen=True)
class Standing:
    """How a group stands to the known prompt."""

    canary: bool = False
    """It is the first of its revision."""
    asked: bool = False
    """It is to be asked, or was: its pool says so."""
    checked: bool = True
    proven: bool = True
    """Its revision has shown that it serves."""
    held: bool = False
    """It must not serve yet."""
    trial: Trial = field(default_factory=Trial)


def standing(ctx: Context, group: Object, spec: GroupSpec, snapshot: FleetSnapshot | None) -> Standing:
    """How a group stands, by what is known now."""
    if not spec.canary:
        return Standing()
    fleet = Key(FLEET, group["metadata"]["namespace"], spec.fleet)
    pool = ctx.cache.get(Key(POOL, fleet.namespace, spec.pool)) or {}
    prompt = bool(((pool.get("spec") or {}).get("rollout") or {}).get("canaryPrompt", True))
    trial = ctx.checks.trial(group)
    alone = alone_will_do(ctx, fleet, spec.role)
    (member,) = members_of([group], snapshot, {}, None, trials={spec.group: trial}, prompt=prompt, alone=alone)
    memory = remembered(ctx, fleet).memories.get(spec.role, Memory())
    return Standing(
        canary=True,
        asked=prompt,
        checked=member.checked,
        proven=not is_on_trial(member, memory),
        # Nobody asks any more, perhaps; what answered wrongly before does not serve for that.
        held=is_held_back(member, memory) or (bool(trial.failure) and spec.revision == memory.failed),
        trial=trial,
    )


def alone_will_do(ctx: Context, fleet: Key, role: Role) -> bool:
    """Whether nobody wants a group of the other role, so that one of this role cannot be asked as a pair."""
    other = Role.DECODE if role is Role.PREFILL else Role.PREFILL
    pool = ctx.cache.get(Key(POOL, fleet.namespace, pool_name(fleet.name, other)))
    return pool is not None and pool["spec"].get("replicas") == 0


def ask(ctx: Context, key: Key, group: Object, spec: GroupSpec, link: FleetLink, stands: Standing) -> float | None:
    """Have a group that is held back asked, if it is due; return in how many seconds to look again."""
    assert link.snapshot is not None, "a reachable fleet has told what it is"
    there = next((one for one in link.snapshot.groups if one.group == spec.group), None)
    if not stands.held or there is None:
        return None
    if not is_due(stands.trial, there.state, ctx.checks.asked_at(group, there.epoch), ctx.now()):
        return None if stands.trial.failure else AGAIN_S

    async def done(before: Trial, trial: Trial) -> None:
        ctx.queue.add(Key(POOLS, key.namespace, spec.fleet))
        ctx.queue.add(key)
        await _tell_event(ctx, group, before, trial)

    ctx.checks.begin(group, there.epoch, ctx.now, lambda: _check(link, there), done)
    return AGAIN_S


async def _check(link: FleetLink, group: Group) -> GroupCheck:
    try:
        async with link.client() as client:
            return await client.check(group.group)
    except ControlError as error:
        why = str(error)
        if error.code == "UNIMPLEMENTED":
            why = "the fleet's head is of an older Tandem, which cannot ask a group: replace its pod"
            why += ", or set canaryPrompt: false in the pool's rollout"
        return GroupCheck(verdict=CheckVerdict.UNKNOWN, message=why, epoch=group.epoch)


async def _tell_event(ctx: Context, group: Object, before: Trial, trial: Trial) -> None:
    name = group["spec"]["group"]
    if trial.failure and not before.failure:
        message = f"{name} failed the known prompt, and serves nobody: {trial.failure}"
        await ctx.recorder.tell(EP_GROUP, group, "AnswersWrongly", message[:_LONGEST], type_="Warning")
    elif trial.verdict is CheckVerdict.OK:
        await ctx.recorder.tell(EP_GROUP, group, "Checked", f"{name} has answered the known prompt, and serves.")


def check_status(trial: Trial) -> Object:
    """Of a GroupStatus."""
    return {
        "epoch": trial.epoch,
        "verdict": trial.verdict.value,
        "message": trial.message[:_LONGEST],
        "silences": trial.silences,
    }


def check_condition(stands: Standing, there: Group | None) -> Told:
    """Whether a canary has answered as it should."""
    trial = stands.trial
    if trial.failure and (stands.asked or stands.held):
        reason = "AnswersWrongly" if trial.verdict is CheckVerdict.WRONG else "NoAnswer"
        return told("Checked", False, reason, f"It serves nobody: {trial.failure}"[:_LONGEST])
    if not stands.asked:
        return told("Checked", None, "NotAsked", "Its pool says canaryPrompt: false.")
    if stands.checked:
        return told("Checked", True, "Answered", "It has answered the known prompt as it should.")
    if stands.proven:
        return told("Checked", True, "RevisionServes", "Its revision has shown that it serves.")
    if there is None or there.state not in (GroupState.READY, GroupState.CORDONED):
        return told(
            "Checked", None, "NotReady", "It is asked a known prompt when it is ready, and serves nobody before."
        )
    reasons = {CheckVerdict.ALONE: "NoPartner", CheckVerdict.SILENT: "NoAnswer"}
    message = trial.message or "It is being asked."
    return told("Checked", None, reasons.get(trial.verdict, "Asking"), f"It serves nobody yet: {message}"[:_LONGEST])
