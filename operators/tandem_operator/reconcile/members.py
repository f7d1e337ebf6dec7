"""What a rollout has to know of a pool's groups: from their objects, their pods, and what the fleet says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tandem.core.rollout_types import Member, Rules
from tandem.core.types import DpLoad, FleetSnapshot, Group, GroupState, Role
from tandem_operator.api.pool import Rollout
from tandem_operator.names import Object, leaving
from tandem_operator.reconcile.context import unix


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
    groups: Sequence[Object], snapshot: FleetSnapshot | None, loads: Mapping[str, Sequence[DpLoad]], pods: bool
) -> tuple[Member, ...]:
    """The groups of a pool. `pods`: whether they have pods of ours, which tell when a group was placed."""
    told = {group.group: group for group in (snapshot.groups if snapshot else ())}
    return tuple(_member(group, told, loads, pods) for group in groups)


def _member(group: Object, told: Mapping[str, Group], loads: Mapping[str, Sequence[DpLoad]], pods: bool) -> Member:
    spec = group["spec"]
    name = spec["group"]
    there = told.get(name)
    ranks = loads.get(name, ())
    conditions = {entry["type"]: entry for entry in (group.get("status") or {}).get("conditions") or ()}
    joined = conditions.get("PodsReady", {})
    has_nodes = joined.get("status") == "True"
    if not pods:
        placed = there.since if there is not None and any(rank.node for rank in there.ranks) else None
    else:
        placed = unix(joined["lastTransitionTime"]) if has_nodes else None
    state = there.state if there is not None else GroupState.STARTING
    served = there is not None and bool(there.weight_version)
    epochs = there.epoch if there is not None else 0
    return Member(
        group=name,
        role=Role(spec["role"]),
        revision=spec["revision"],
        state=state,
        kv_format=spec["template"].get("kvFormat", ""),
        weight_version=there.weight_version if there is not None else "",
        ready_since=there.since if there is not None and state is GroupState.READY else None,
        served=served,
        placed=placed,
        # The fleet does not tell how often in a row: before it has served, every epoch that ended was a failure.
        failures=0 if served else epochs - (state is not GroupState.FAILED) if epochs else 0,
        lost=pods and state is GroupState.FAILED and not has_nodes,
        # One that an evicted pod has drained is put again: it is away, and not on its way out.
        leaving=leaving(group),
        running=sum(rank.running for rank in ranks),
        waiting=sum(rank.waiting for rank in ranks),
        reason=there.reason if there is not None else "",
    )
