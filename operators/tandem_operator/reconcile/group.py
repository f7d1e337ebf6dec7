"""A group: its pods, its wish in the fleet, its status; and its drain before it goes."""

from __future__ import annotations

import msgspec

from tandem.config import TimeoutConfig
from tandem.core.refresh import some_pair
from tandem.core.types import EngineSettings, FleetSnapshot, Group, GroupState, Rank
from tandem.core.types import GroupSpec as Wish
from tandem.fleet.control_client import ControlError
from tandem_operator.api.fleet import FleetSpec
from tandem_operator.api.pool import GroupSpec
from tandem_operator.apply import Trouble
from tandem_operator.conditions import Told, told
from tandem_operator.control import FleetLink
from tandem_operator.kube import KubeError
from tandem_operator.names import (
    COSCHEDULING_GANG,
    DRAIN_FINALIZER,
    EP_GROUP,
    FLEET,
    FORCE_DRAIN,
    ORPHAN_FINALIZER,
    POOL,
    SERVICE,
    STATEFUL_SET,
    VOLCANO_GANG,
    Key,
    Kind,
    Object,
    leaving,
)
from tandem_operator.pod_state import PodsState, pods_of
from tandem_operator.reconcile.check import Standing, ask, check_condition, check_status, standing
from tandem_operator.reconcile.context import Context, rfc3339, unix
from tandem_operator.reconcile.guest import check_move, is_guest
from tandem_operator.render.config import SpecError, fleet_spec
from tandem_operator.render.group import group_children
from tandem_operator.revision import weights_of
from tandem_operator.stored import stored_spec

_AGAIN_S = 2.0
_ABSENT_S = 5.0
"""A fleet that has lost its state does not know its groups either, for seconds: one that it had is missed so long."""
_LONGEST_REASON = 500
_SERVED = {"weights_path": "", "weight_version": ""}
"""What the operator does not say of a group."""
_PHASES = {
    GroupState.STARTING: "Starting",
    GroupState.READY: "Ready",
    GroupState.CORDONED: "Cordoned",
    GroupState.DRAINING: "Draining",
    GroupState.FAILED: "Failed",
    GroupState.GONE: "Gone",
}


async def reconcile_group(ctx: Context, key: Key) -> float | None:
    """Bring a group closer to its spec; return in how many seconds to look again, None = when something changes."""
    group = ctx.cache.get(key)
    if group is None:
        ctx.absent.pop(key, None)
        ctx.checks.forget({one["metadata"]["uid"] for one in ctx.cache.all(EP_GROUP)})
        return None
    spec = stored_spec(GroupSpec, group["spec"])
    if leaving(group):
        return await _leave(ctx, key, group, spec)
    fleet = ctx.fleet_of(group)
    if fleet is None:
        return None  # its pool goes, and this one with it
    try:
        fleet_says = fleet_spec(fleet["spec"])
        check_move(ctx, Key(FLEET, key.namespace, spec.fleet), fleet_says)
    except SpecError:
        return None  # told of the Fleet
    link = ctx.links.open(key.namespace, spec.fleet)
    trouble: list[str] = []
    if not fleet_says.paused:
        children = {} if is_guest(fleet_says) else group_children(group, spec)
        for child, body in children.items():
            try:
                await ctx.applier.ensure(child, body, group)
            except Trouble as error:
                trouble.append(str(error))
            except KubeError as error:
                if error.status not in (403, 404) or child.kind not in (VOLCANO_GANG, COSCHEDULING_GANG):
                    raise
                trouble.append(_no_gang(child.kind, spec.template.pods.gang.scheduler, error.status))
    again = _AGAIN_S if trouble else None
    stands = standing(ctx, group, spec, link.snapshot if link.reachable else None)
    if link.reachable and not fleet_says.paused:
        asked = ask(ctx, key, group, spec, link, stands)
        again = again or asked
        try:
            if not await _put(link, spec, held=stands.held, going=pods_of(ctx.cache, key, spec.nodes).going):
                again = again or _AGAIN_S
        except ControlError as error:
            trouble.append(f"the fleet does not take it: {error}")
            await ctx.recorder.tell(EP_GROUP, group, "Refused", str(error), type_="Warning")
            again = _AGAIN_S
    if link.known:
        await _tell(ctx, key, group, spec, link, trouble, stands, guest=is_guest(fleet_says))
    return again


def _no_gang(kind: Kind, scheduler: str, status: int) -> str:
    """Why a group has no object for its gang scheduler, and what to do."""
    what = f"{kind.plural}.{kind.group}"
    if status == 404:
        return f"the cluster has no {what}: install that scheduler"
    return f"the operator may not make {what}: add {scheduler} to operator.gangSchedulers in its chart's values"


def wish_of(spec: GroupSpec, *, held: bool = False) -> Wish:
    """What the fleet is told of a group. `held`: it must not serve yet, whatever people say."""
    template, weights = spec.template, weights_of(spec.template)
    return Wish(
        group=spec.group,
        role=spec.role,
        nodes=spec.nodes,
        gpus_per_node=spec.gpus_per_node,
        cordoned=spec.cordoned or held,
        revision=spec.revision,
        kv_format=template.kv_format,
        engine=EngineSettings(
            args=template.args,
            env=dict(template.env),
            redundant_experts=template.redundant_experts,
            max_total_tokens=template.max_total_tokens,
        ),
        declared_path=weights.path,
        declared_version=weights.version,
    )


async def _put(link: FleetLink, spec: GroupSpec, *, held: bool, going: str) -> bool:
    """Let the fleet have the group as it should be; False = not yet. One that drains (its pod was evicted) is put again
    once it is gone, and the pod (`going`) with it: its engines would begin there, and end with the pod.

    It declares weights; whether it serves these, or what a refresh has put in their place, is the fleet's business.
    """
    assert link.snapshot is not None, "a reachable fleet has told what it is"
    wanted = wish_of(spec, held=held)
    known = next((wish for wish in link.snapshot.desired if wish.group == spec.group), None)
    if known is not None and (known.draining or msgspec.structs.replace(known, **_SERVED) == wanted):
        return True
    if known is None and going:
        return False
    async with link.client() as client:
        await client.put_group(wanted)
    return True


# -- leaving


async def _leave(ctx: Context, key: Key, group: Object, spec: GroupSpec) -> float | None:
    """Drain, and let the object go when the fleet does not have the group any more."""
    absent_since = ctx.absent.pop(key, None)
    if DRAIN_FINALIZER not in (group["metadata"].get("finalizers") or ()):
        return None  # others still hold it
    fleet = ctx.fleet_of(group)
    if fleet is None:
        # The whole fleet goes, its head perhaps first: nobody is left to serve.
        await _let_go(ctx, key, group, "")
        return None
    try:
        fleet_says = fleet_spec(fleet["spec"])
    except SpecError:
        fleet_says = None
    timeouts = fleet_says.timeouts if fleet_says else TimeoutConfig()
    link = ctx.links.open(key.namespace, spec.fleet)
    asked_at = unix(group["metadata"]["deletionTimestamp"])
    if not link.known:
        return _AGAIN_S
    if not link.reachable:
        away = min(link.away_s, ctx.now() - asked_at)
        if away > timeouts.drain_s:
            why = f"The control service has been away for {away:.0f} s ({link.why}): it goes without a drain."
            await _let_go(ctx, key, group, why)
            return None
        wait = told("Drained", False, "ControlUnreachable", f"Waits for the control service: {link.why}")
        await _tell_leaving(ctx, key, group, spec, None, wait)
        return _AGAIN_S
    try:
        async with link.client() as client:
            snapshot = await client.fleet()  # fresh: it must not be older than our own wish for the group
            wish = next((wish for wish in snapshot.desired if wish.group == spec.group), None)
            there = next((found for found in snapshot.groups if found.group == spec.group), None)
            if wish is None and there is None:
                now = ctx.now()
                if _had(group) and (more := (absent_since or now) + _ABSENT_S - now) > 0:
                    ctx.absent[key] = absent_since or now
                    return min(_AGAIN_S, more)
                await _let_go(ctx, key, group, "")
                return None
            if wish is not None and not wish.draining:
                drain_s = drain_limit(timeouts, snapshot, spec.group)
                wish = await client.drain(spec.group, drain_s, force=_forced(ctx, group, fleet_says))
                message = f"{spec.group} drains: its streams end or move to other groups within {drain_s:g} s."
                await ctx.recorder.tell(EP_GROUP, group, "Draining", message)
    except ControlError as error:
        reason = "StillNeeded" if error.code == "FAILED_PRECONDITION" else "ControlError"
        await ctx.recorder.tell(EP_GROUP, group, reason, str(error), type_="Warning")
        await _tell_leaving(ctx, key, group, spec, link.snapshot, told("Drained", False, reason, str(error)))
        return _AGAIN_S
    message = there.reason if there is not None else "is about to leave"
    deadline = wish.drain_deadline if wish is not None else 0.0
    wait = told("Drained", False, "Draining", message)
    await _tell_leaving(ctx, key, group, spec, snapshot, wait, deadline)
    return _AGAIN_S


def drain_limit(timeouts: TimeoutConfig, fleet: FleetSnapshot, group: str) -> float:
    """Seconds that a group has to be empty.

    A stream keeps its weights. If pairs serve, and none but those of this group has its weights, its streams can go
    nowhere: then it has as long as for other weights in place.
    """
    stays = {wish.group for wish in fleet.desired if not wish.draining and wish.group != group}
    serve = [one for one in fleet.groups if one.routable and one.group in stays]
    own = _found(fleet, group)
    elsewhere = [one for one in serve if own is not None and one.weight_version == own.weight_version]
    if own is None or not own.weight_version or some_pair(elsewhere) or not some_pair(serve):
        return timeouts.drain_s
    return max(timeouts.drain_s, timeouts.refresh_drain_s)


def _had(group: Object) -> bool:
    """Whether the fleet ever had it, as far as its status says."""
    status = group.get("status") or {}
    return bool(status.get("state") or status.get("firstEpoch"))


def _forced(ctx: Context, group: Object, fleet: FleetSpec | None) -> bool:
    """Whether it leaves although it is the last one of its role: nobody wants that role, or somebody says so."""
    if (group["metadata"].get("annotations") or {}).get(FORCE_DRAIN) == "true":
        return True
    pool = ctx.cache.get(Key(POOL, group["metadata"]["namespace"], group["spec"]["pool"]))
    return pool is not None and not leaving(pool) and pool["spec"].get("replicas") == 0


async def _let_go(ctx: Context, key: Key, group: Object, why: str) -> None:
    """Take our finalizer off: the object goes, and its pods after it, whatever was said of them: no other group could
    use them, and they hold its GPUs."""
    meta = group["metadata"]
    if ORPHAN_FINALIZER in meta["finalizers"]:
        return  # that it is gone is news, and another look
    if why:
        await ctx.recorder.tell(EP_GROUP, group, "NotDrained", why, type_="Warning")
    for kind in (STATEFUL_SET, SERVICE):
        if await ctx.applier.sweep(Key(kind, key.namespace, key.name)):
            message = f"{kind.kind} {key.name} goes as well: it is of no use without its group."
            await ctx.recorder.tell(EP_GROUP, group, "Removed", message)
    rest = [name for name in meta["finalizers"] if name != DRAIN_FINALIZER]
    change = {"metadata": {"resourceVersion": meta["resourceVersion"], "finalizers": rest or None}}
    await ctx.applier.patch(key, change)


async def _tell_leaving(
    ctx: Context,
    key: Key,
    group: Object,
    spec: GroupSpec,
    snapshot: FleetSnapshot | None,
    wait: Told,
    deadline: float = 0.0,
) -> None:
    there = _found(snapshot, spec.group)
    known = group.get("status") or {}
    # What was known last stays: that the fleet had it says how it may go.
    last = known if there is None and _had(group) else _status(group, spec, there)
    status = {**last, "phase": "Draining"}
    status["drainDeadline"] = rfc3339(deadline) if deadline else ""
    await ctx.tell_status(key, group, status, [told("Ready", False, "Leaving", "It is being deleted."), wait])


# -- status


async def _tell(
    ctx: Context,
    key: Key,
    group: Object,
    spec: GroupSpec,
    link: FleetLink,
    trouble: list[str],
    stands: Standing,
    *,
    guest: bool,
) -> None:
    there = _found(link.snapshot, spec.group) if link.reachable else None
    status = _status(group, spec, there)
    placed = pods_of(ctx.cache, key, spec.nodes)
    if placed.waits:
        status["reason"] = placed.waits[:_LONGEST_REASON]  # the fleet only says that it waits for nodes
    stateful = ctx.cache.get(Key(STATEFUL_SET, key.namespace, key.name)) or {}
    joined = int((stateful.get("status") or {}).get("readyReplicas") or 0)
    pods = told("PodsReady", True, "PlacedByRay", "Ray places it; it has no pods.")
    if not guest:
        pods = _pods_ready(spec, joined, placed)
    if not link.reachable:
        ready = told("Ready", None, "ControlUnreachable", link.why)
        if (known := group.get("status")) and known.get("state"):
            status = {**known, "readyRanks": known.get("readyRanks", "")}  # the last that was known
    elif there is None:
        until = (
            f"It starts when pod {placed.going} has gone." if placed.going else "The fleet has not begun to start it."
        )
        ready = told("Ready", False, "NotStarted", until)
    else:
        is_ready = there.state is GroupState.READY
        ready = told("Ready", is_ready, _PHASES[there.state], there.reason)
    found = [ready, pods]
    if stands.canary and link.reachable:
        status["check"] = check_status(stands.trial)
        found.append(check_condition(stands, there))
    found.append(told("Degraded", bool(trouble), "Trouble" if trouble else "AsExpected", "; ".join(trouble)[:1000]))
    await ctx.tell_status(key, group, status, found)


def _pods_ready(spec: GroupSpec, joined: int, placed: PodsState) -> Told:
    message = f"{joined} of {spec.nodes} pods have joined the Ray cluster"
    if joined >= spec.nodes:
        return told("PodsReady", True, "Joined", f"{message}.")
    message += f"; {placed.waits}" if placed.waits else f", {placed.scheduled} have a node."
    return told("PodsReady", False, "Waiting", message[:1000])


def _found(snapshot: FleetSnapshot | None, group: str) -> Group | None:
    return next((found for found in (snapshot.groups if snapshot else ()) if found.group == group), None)


def _status(group: Object, spec: GroupSpec, there: Group | None) -> Object:
    ranks = there.ranks if there is not None else ()
    ready = sum(rank.state == "ready" for rank in ranks)
    status: Object = {
        "phase": _PHASES[there.state] if there is not None else "Pending",
        "reason": there.reason if there is not None else "",
        "epoch": there.epoch if there is not None else 0,
        "firstEpoch": _first_epoch(group, there),
        "weightVersion": there.weight_version if there is not None else "",
        "readyRanks": f"{ready}/{spec.nodes}",
        "ranks": [_rank(rank) for rank in ranks],
        "drainDeadline": "",
    }
    if there is not None:
        status["state"] = there.state.value
    if (check := (group.get("status") or {}).get("check")) is not None:
        status["check"] = check
    return status


def _first_epoch(group: Object, there: Group | None) -> int:
    """The epoch that the fleet began this group with: a group that had its id before may have left it any number."""
    if there is None:
        return 0
    return int((group.get("status") or {}).get("firstEpoch") or there.epoch)


def _rank(rank: Rank) -> Object:
    return {
        "rank": rank.rank,
        "pod": rank.pod,
        "node": rank.kube_node or rank.node,
        "state": rank.state.value,
        "detail": rank.detail,
    }
