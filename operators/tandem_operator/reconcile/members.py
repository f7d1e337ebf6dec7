"""What a rollout has to know of a pool's groups: from their objects, their pods, and what the fleet says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tandem.core.rollout_types import Member, Rules
from tandem.core.types import DpLoad, FleetSnapshot, Group, GroupState, Role
from tandem_operator.api.pool import Rollout
from tandem_operator.names import Object, leaving
from tandem_operator.pod_state import PodsState


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
) -> tuple[Member, ...]:
    """The groups of a pool.

    `pods`: how the pods of each are, by its id; None = they have no pods of ours. `good`: the revision that is known to
    serve: its groups have the time to get ready anew at each restart, which one that still has to show it has not.
    """
    told = {group.group: group for group in (snapshot.groups if snapshot else ())}
    return tuple(_member(group, told, loads, pods, good) for group in groups)


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
    if pods is not None:
        placed = own.placed
    else:  # the ranks of a group get their nodes together, and tell them when they are started
        placed = there.since if there is not None and any(rank.node for rank in there.ranks) else None
    if there is not None and served and placed is not None and spec["revision"] == good:
        placed = max(placed, there.since)
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
        no_room=own.no_room,
        failures=0 if served or there is None else _failures(group, there),
        # Its pods stay through a failure of its engine: one that is missing went with its node, or was evicted.
        lost=pods is not None and state is GroupState.FAILED and own.scheduled < spec["nodes"],
        # One that an evicted pod has drained is put again: it is away, and not on its way out.
        leaving=leaving(group),
        running=sum(rank.running for rank in ranks),
        waiting=sum(rank.waiting for rank in ranks),
        reason=own.waits or (there.reason if there is not None else ""),
    )


def _failures(group: Object, there: Group) -> int:
    """Failures in a row of a group that has never been ready: each of its epochs that ended was one.

    Counted from the epoch that its object saw first. The fleet does not tell the number itself; for a group that has
    served it is therefore not known, and taken for 0.
    """
    first = int((group.get("status") or {}).get("firstEpoch") or there.epoch)
    return max(0, there.epoch - first) + (there.state is GroupState.FAILED)
