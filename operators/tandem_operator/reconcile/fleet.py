"""A Fleet: its own pods, its two pools, its connection to the control service, and what is told of it."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter

from tandem.core.types import GroupState, Role
from tandem.fleet.control_client import ControlError
from tandem_operator.api.fleet import FleetSpec
from tandem_operator.apply import Trouble
from tandem_operator.conditions import Told, told
from tandem_operator.control import FleetLink
from tandem_operator.metrics import ATTAINMENT, READY, STOPPED, WANTED
from tandem_operator.names import (
    CONTROL_PORT,
    EP_GROUP,
    FLEET,
    FLEET_GROUPS,
    FLEET_LABEL,
    POOL,
    POOL_LABEL,
    STATEFUL_SET,
    Key,
    Object,
    group_name,
    key_of,
    leaving,
    pool_name,
)
from tandem_operator.reconcile import guest
from tandem_operator.reconcile.context import Context
from tandem_operator.render.config import SpecError, fleet_spec
from tandem_operator.render.platform import passing_names, platform_children
from tandem_operator.render.pool import pool_object, pool_of

_log = logging.getLogger(__name__)
_ORPHAN_S = 30.0
"""A group without its object is drained after this: its object may just have been made."""
_AGAIN_S = 2.0
_ALLOWED_S = 5.0
"""Nothing tells the operator that it has been given a right."""


async def reconcile_fleet(ctx: Context, key: Key) -> float | None:
    """Bring a Fleet closer to its spec; return in how many seconds to look again, None = when something changes."""
    fleet = ctx.cache.get(key)
    if fleet is None:
        await ctx.links.close(key.namespace, key.name)
        _forget(key)
        return None
    if leaving(fleet):  # its children follow by their owner references; groups see that it is leaving and let go
        return await guest.leave(ctx, key, fleet)
    try:
        spec = fleet_spec(fleet["spec"])
        guest.check_move(ctx, key, spec)
        if guest.is_guest(spec):
            await guest.hold(ctx, key, fleet)
        children = platform_children(fleet, spec, ctx.budget)
    except SpecError as error:
        await ctx.recorder.tell(FLEET, fleet, error.reason, str(error), type_="Warning")
        invalid = [told("Valid", False, error.reason, f"{error}. What runs already goes on as it is.")]
        await ctx.tell_status(key, fleet, fleet.get("status") or {"phase": "Pending"}, invalid)
        return _ALLOWED_S if error.reason == guest.NOT_ALLOWED else None
    link = ctx.links.open(key.namespace, key.name)
    again: float | None = None
    trouble: list[str] = []
    if not spec.paused:
        for child, body in children.items():
            try:
                await ctx.applier.ensure(child, body, fleet)
            except Trouble as error:
                trouble.append(str(error))
                again = _AGAIN_S
        for child in passing_names(key.name, key.namespace):
            if child not in children and await ctx.applier.remove(child, fleet):
                await ctx.recorder.tell(
                    FLEET, fleet, "Removed", f"{child.kind.kind} {child.name} is not needed any more."
                )
    for role in Role:  # also while it is paused: the pools have to know
        try:
            await _ensure_pool(ctx, fleet, spec, role)
        except Trouble as error:
            trouble.append(str(error))
            again = _AGAIN_S
    if link.reachable and await _drain_orphans(ctx, fleet, link, paused=spec.paused):
        again = _AGAIN_S
    if link.known:
        await _tell(ctx, key, fleet, spec, link, trouble)
    return again


async def _ensure_pool(ctx: Context, fleet: Object, spec: FleetSpec, role: Role) -> None:
    """A pool as the Fleet says; its replicas only when it is new, or when the Fleet says another number than before."""
    namespace, name = fleet["metadata"]["namespace"], fleet["metadata"]["name"]
    key = Key(POOL, namespace, pool_name(name, role))
    groups = pool_of(spec, role).groups
    live = ctx.cache.get(key)
    replicas = groups if live is not None else await _left(ctx, key, name) or groups
    if live is not None and (live["metadata"].get("annotations") or {}).get(FLEET_GROUPS) == str(groups):
        replicas = live["spec"].get("replicas", groups)
    # With the pool's resourceVersion: a `kubectl scale` at the same moment is not undone.
    await ctx.applier.ensure(key, pool_object(fleet, spec, role), fleet, keep={"replicas": replicas})


async def _left(ctx: Context, pool: Key, fleet: str) -> int:
    """How many groups an earlier object of a pool has left without an owner: the new one begins with as many."""
    known = ctx.cache.all(EP_GROUP, pool.namespace, {FLEET_LABEL: fleet, POOL_LABEL: pool.name})
    # As they are now: those that still have their owner go with it.
    found = [await ctx.kube.get(key_of(EP_GROUP, group)) for group in known]
    return sum(one is not None and not leaving(one) and not one["metadata"].get("ownerReferences") for one in found)


def _forget(key: Key) -> None:
    """Take a fleet that is gone out of the metrics."""
    for gauge in (READY, WANTED, STOPPED):
        for role in Role:
            with contextlib.suppress(KeyError):
                gauge.remove(key.namespace, key.name, role)
    with contextlib.suppress(KeyError):
        ATTAINMENT.remove(key.namespace, key.name)


async def _drain_orphans(ctx: Context, fleet: Object, link: FleetLink, *, paused: bool) -> bool:
    """Let groups go that the fleet has and Kubernetes has not; return whether some are waited for."""
    namespace, name = fleet["metadata"]["namespace"], fleet["metadata"]["name"]
    snapshot, now = link.snapshot, ctx.now()
    assert snapshot is not None, "a reachable fleet has told what it is"
    found = {
        spec.group
        for spec in (() if paused else snapshot.desired)
        if not spec.draining and ctx.cache.get(Key(EP_GROUP, namespace, group_name(name, spec.group))) is None
    }
    for known in [known for known in ctx.orphans if known[:2] == (namespace, name) and known[2] not in found]:
        del ctx.orphans[known]
    for group in sorted(found):
        if now - ctx.orphans.setdefault((namespace, name, group), now) < _ORPHAN_S:
            continue
        if await ctx.kube.get(Key(EP_GROUP, namespace, group_name(name, group))) is not None:
            continue
        try:
            async with link.client() as client:
                await client.drain(group)
            await ctx.recorder.tell(
                FLEET, fleet, "OrphanDrained", f"{group} drains: the fleet has it, but it has no ExpertParallelGroup."
            )
        except ControlError as error:
            message = f"{group} has no ExpertParallelGroup and should drain: {error}"
            await ctx.recorder.tell(FLEET, fleet, "OrphanStays", message, type_="Warning")
    return bool(found)


async def _tell(ctx: Context, key: Key, fleet: Object, spec: FleetSpec, link: FleetLink, trouble: list[str]) -> None:
    namespace, name = key.namespace, key.name
    scheme = "https" if spec.gateway.tls_secret else "http"
    pools = {role: ctx.cache.get(Key(POOL, namespace, pool_name(name, role))) for role in Role}
    wanted = {role: pool["spec"].get("replicas", 0) if pool else 0 for role, pool in pools.items()}
    states = _states(link)
    ready = {role: states[f"{role}/ready"] for role in Role}
    gateways = int(_status_of(ctx, key, "gateway").get("readyReplicas") or 0)
    conditions = _conditions(ctx, key, spec, link, trouble, wanted, ready, gateways)
    by_type = {entry.type: entry.status == "True" for entry in conditions}
    phase = "Ready" if by_type["Available"] else "Starting"
    if by_type["Degraded"]:
        phase = "Degraded"
    groups = ctx.cache.all(EP_GROUP, namespace, {FLEET_LABEL: name})
    gpus = sum(group["spec"]["nodes"] * group["spec"]["gpusPerNode"] for group in groups)
    status: Object = {
        "phase": phase,
        "endpoints": {
            "http": f"{scheme}://{name}.{namespace}.svc:{spec.gateway.http_port}",
            "grpc": f"{name}.{namespace}.svc:{spec.gateway.grpc_port}",
            "control": f"{name}-head.{namespace}.svc:{CONTROL_PORT}",
        },
        "gateways": gateways,
        "groups": dict(sorted(states.items())),
        "gpus": gpus if spec.device == "cuda" else 0,
        "summary": f"{ready[Role.PREFILL]}/{wanted[Role.PREFILL]} {ready[Role.DECODE]}/{wanted[Role.DECODE]}",
    }
    await ctx.tell_status(key, fleet, status, conditions)


def _states(link: FleetLink) -> Counter[str]:
    snapshot = link.snapshot if link.reachable else None
    return Counter(f"{group.role}/{group.state}" for group in (snapshot.groups if snapshot else ()))


def _status_of(ctx: Context, key: Key, part: str) -> Object:
    """What Kubernetes says of a fleet's StatefulSet."""
    stateful = ctx.cache.get(Key(STATEFUL_SET, key.namespace, f"{key.name}-{part}")) or {}
    return stateful.get("status") or {}


def _old_head(ctx: Context, key: Key, spec: FleetSpec) -> str:
    """That the head's pod is not of the template that there is now, and what to do; empty = it is, or there is none."""
    status = _status_of(ctx, key, "head")
    # Not by currentRevision: Kubernetes never moves that on for a StatefulSet that is OnDelete.
    if (
        spec.ray.storage
        or guest.is_guest(spec)
        or (status.get("updatedReplicas") or 0) >= (status.get("replicas") or 0)
    ):
        return ""
    return (
        "the head still runs the old template; it is replaced when its pod is deleted: kubectl delete pod"
        f" {key.name}-head-0 -n {key.namespace}, which restarts all groups, as there is no ray.storage"
    )


def _conditions(
    ctx: Context,
    key: Key,
    spec: FleetSpec,
    link: FleetLink,
    trouble: list[str],
    wanted: dict[Role, int],
    ready: dict[Role, int],
    gateways: int,
) -> list[Told]:
    asleep = [role for role in Role if not wanted[role] and _may_sleep(spec, role)]
    missing = [f"no {role} group is ready" for role in Role if not ready[role] and role not in asleep]
    if not gateways:
        missing.append("no gateway is ready")
    lacking = [
        f"{ready[role]} of {wanted[role]} {role} groups are ready" for role in Role if ready[role] < wanted[role]
    ]
    if gateways < spec.gateway.replicas:
        lacking.append(f"{gateways} of {spec.gateway.replicas} gateways are ready")
    failed = []
    if link.reachable and link.snapshot is not None:
        failed = [
            f"{group.group}: {group.reason}" for group in link.snapshot.groups if group.state is GroupState.FAILED
        ]
    found = [
        told("Valid", True, "Valid"),
        told("ControlReachable", link.reachable, "Connected" if link.reachable else "Unreachable", link.why),
        guest.placed_by_ray(spec),
    ]
    if not link.reachable:
        found.append(told("Available", None if gateways else False, "ControlUnreachable", _unknown(gateways)))
    else:
        message = "; ".join(missing) or ("Requests are answered." if not asleep else _asleep(asleep))
        reason = "Unavailable" if missing else "NobodyAsks" if asleep else "Available"
        found.append(told("Available", not missing, reason, message))
    old = _old_head(ctx, key, spec)
    reason = "Starting" if lacking else "HeadOutdated" if old else "Complete"
    message = "; ".join(filter(None, (*lacking, old))) or "All is there."
    found.append(told("Progressing", bool(lacking or old), reason, message))
    bad = [*trouble, *failed]
    found.append(told("Degraded", bool(bad), "Trouble" if bad else "AsExpected", "; ".join(bad)[:1000]))
    if spec.paused:
        found.append(told("Paused", True, "Paused", "spec.paused is true: nothing of this fleet is changed."))
    else:
        found.append(told("Paused", False, "NotPaused"))
    return found


def _may_sleep(spec: FleetSpec, role: Role) -> bool:
    """Whether its last group goes while nobody asks."""
    autoscaling = pool_of(spec, role).autoscaling
    return autoscaling is not None and autoscaling.min_groups == 0


def _asleep(roles: list[Role]) -> str:
    return (
        f"Nobody asks, so no {' and no '.join(roles)} group is wanted; the next request brings one, and waits for it."
    )


def _unknown(gateways: int) -> str:
    if gateways:
        return "The control service does not answer; gateways go on with the groups that they know."
    return "No gateway is ready, and the control service does not answer."
