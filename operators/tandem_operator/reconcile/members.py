"""What a rollout has to know of a pool's groups: from their objects, their pods, and what the fleet says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from tandem.core.group_check import CheckVerdict
from tandem.core.rollout_check import Trial, is_checked
from tandem.core.rollout_types import Member, Rules
from tandem.core.types import NO_NODES, DpLoad, FleetSnapshot, Group, GroupState, Role
from tandem_operator.api.pool import Rollout
from tandem_operator.names import Object, leaving
from tandem_operator.pod_state import PodsState
from tandem_operator.revision import weights_in, weights_name


def rules_of(rollout: Rollout) -> Rules:
    """A pool's rules as core has them."""
    return Rules(
        max_surge=rollout.max_surge,
        max_unavailable=rollout.max_unavailable,
        canary_s=rollout.canary_s,
        progress_s=rollout.progress_s,
        rollback=rollout.rollback,
    )


def members_of(
    groups: Sequence[Object],
    snapshot: FleetSnapshot | None,
    loads: Mapping[str, Sequence[DpLoad]],
    pods: Mapping[str, PodsState] | None,
    good: str = "",
    *,
    trials: Mapping[str, Trial],
    prompt: bool = True,
    alone: bool = False,
) -> tuple[Member, ...]:
    """The groups of a pool.

    `pods`: how the pods of each are, by its id; None = they have no pods of ours. `good`: the revision that is known to
    serve: its groups have the time to get ready anew at each restart, which one that still has to show it has not.
    `trials`: what is known of the checks of each. `prompt`: canaries are asked at all; `alone`: an answer without a
    partner will do.
    """
    told = {group.group: group for group in (snapshot.groups if snapshot else ())}
    members = (_member(group, told, loads, pods, good) for group in groups)
    if not prompt:
        return tuple(members)
    canaries = {group["spec"]["group"] for group in groups if group["spec"].get("canary")}
    return tuple(
        _asked(one, told.get(one.group), trials.get(one.group, Trial()), alone=alone) if one.group in canaries else one
        for one in members
    )


def _asked(member: Member, there: Group | None, trial: Trial, *, alone: bool) -> Member:
    """A canary, with what it has answered. One that was not asked yet has served nobody."""
    right = trial.verdict is CheckVerdict.OK or (alone and trial.verdict is CheckVerdict.ALONE)
    checked = there is not None and is_checked(trial, there.epoch, member.state, alone=alone)
    waits = member.state is GroupState.CORDONED and not checked and trial.message
    return replace(
        member,
        canary=True,
        checked=checked,
        canary_failed=trial.failure,
        served=member.served and right,
        reason=trial.message if waits else member.reason,
    )


def _member(
    group: Object,
    told: Mapping[str, Group],
    loads: Mapping[str, Sequence[DpLoad]],
    pods: Mapping[str, PodsState] | None,
    good: str,
) -> Member:
    spec = group["spec"]
    name = spec["group"]
    there = told.get(name)
    ranks = loads.get(name, ())
    state = there.state if there is not None else GroupState.STARTING
    served = there is not None and bool(there.weight_version)
    own = pods.get(name, PodsState()) if pods is not None else PodsState()
    placed, no_room = own.placed, own.no_room
    if pods is None and there is not None:  # its ranks get their nodes together, and tell them when they are started
        placed = there.since if any(rank.node for rank in there.ranks) else None
        no_room = state is GroupState.STARTING and there.reason.startswith(NO_NODES)
    if there is not None and served and placed is not None and spec["revision"] == good:
        placed = max(placed, there.since)
    return Member(
        group=name,
        role=Role(spec["role"]),
        revision=spec["revision"],
        state=state,
        kv_format=spec["template"].get("kvFormat", ""),
        weights=weights_name(weights_in(spec["template"])),
        weight_version=there.weight_version if there is not None else "",
        ready_since=there.since if there is not None and state is GroupState.READY else None,
        served=served,
        placed=placed,
        no_room=no_room,
        failures=there.failures if there is not None else 0,
        # Its pods stay through a failure of its engine: one that is missing went with its node, or was evicted.
        lost=pods is not None and state is GroupState.FAILED and own.scheduled < spec["nodes"],
        # One that an evicted pod has drained is put again: it is away, and not on its way out.
        leaving=leaving(group),
        running=sum(rank.running for rank in ranks),
        waiting=sum(rank.waiting for rank in ranks),
        reason=own.waits or (there.reason if there is not None else ""),
    )
