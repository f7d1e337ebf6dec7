"""Both pools of a fleet: which groups to make and which to let go (core/rollout.py), and what is told of them.

What a rollout has to remember, and the templates of the revisions that it may need again, are in one ConfigMap of the
fleet, written before anything is done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from tandem.core.rollout import roll, templates_to_keep
from tandem.core.rollout_types import Create, Memory, Phase, Plan, Pool, Remove
from tandem.core.types import GroupState, Role
from tandem_operator.api.fleet import FleetSpec
from tandem_operator.api.pool import GroupSpec, PoolSpec
from tandem_operator.apply import Trouble
from tandem_operator.conditions import told
from tandem_operator.control import FleetLink
from tandem_operator.metrics import READY, STOPPED
from tandem_operator.names import (
    EP_GROUP,
    FLEET,
    FLEET_LABEL,
    GROUP_LABEL,
    MANAGED_BY,
    MANAGER,
    POOL,
    POOL_LABEL,
    Key,
    Object,
    group_name,
    key_of,
    labels,
    leaving,
    owned_by,
    pool_name,
)
from tandem_operator.pod_state import pods_of
from tandem_operator.reconcile.check import alone_will_do
from tandem_operator.reconcile.context import Context
from tandem_operator.reconcile.guest import check_move, is_guest
from tandem_operator.reconcile.members import members_of, rules_of
from tandem_operator.reconcile.remembered import Remembered, Revision, memory_key, remembered
from tandem_operator.reconcile.weights import why_not
from tandem_operator.render.config import SpecError, fleet_spec
from tandem_operator.render.pool import group_object, group_spec, pool_budget
from tandem_operator.revision import kv_format_of, revision_of, weights_in, weights_name, weights_of
from tandem_operator.stored import stored_spec

_AGAIN_S = 2.0
_SLOWLY_S = 10.0
"""While something is under way, whose time limits nobody tells."""


@dataclass(frozen=True)
class _Pool:
    """One pool as it is read."""

    key: Key
    obj: Object
    spec: PoolSpec
    revision: str
    kv_format: str
    groups: tuple[Object, ...]

    @property
    def fleet(self) -> Key:
        """Its fleet."""
        return Key(FLEET, self.key.namespace, self.spec.fleet)


async def reconcile_pools(ctx: Context, key: Key) -> float | None:
    """Bring the groups of a fleet's pools closer to what they should be; return in how many seconds to look again."""
    fleet = ctx.cache.get(Key(FLEET, key.namespace, key.name))
    if fleet is None or leaving(fleet):
        return None
    try:
        fleet_says = fleet_spec(fleet["spec"])
        check_move(ctx, Key(FLEET, key.namespace, key.name), fleet_says)
    except SpecError:
        return None  # told of the Fleet
    pools = {role: pool for role in Role if (pool := _read(ctx, key.namespace, key.name, role)) is not None}
    if len(pools) < len(Role):
        return None  # the Fleet makes them
    link = ctx.links.open(key.namespace, key.name)
    known = remembered(ctx, key)
    held = {role: await _held(ctx, pool, link, known, fleet_says) for role, pool in pools.items()}
    plans = roll([_pool(ctx, pool, link, known, fleet_says, held[role]) for role, pool in pools.items()], ctx.now())
    trouble: dict[Role, str] = {}
    if not fleet_says.paused:
        for pool in pools.values():
            await _adopt(ctx, pool)
        try:
            if link.reachable:  # else nobody knows how the groups are, and a memory of that would be wrong
                known = await _remember(ctx, fleet, known, pools, plans)
        except Trouble as error:  # nothing is done that is not written down
            trouble = dict.fromkeys(pools, str(error))
        for role, pool in pools.items():
            try:
                if role not in trouble and (lost := await _carry_out(ctx, pool, plans[role], known, link)):
                    trouble[role] = lost
            except Trouble as error:
                trouble[role] = str(error)
            try:
                if not is_guest(fleet_says):
                    await _ensure_budget(ctx, pool, link)
            except Trouble as error:
                trouble.setdefault(role, str(error))
    for role, pool in pools.items() if link.known else ():
        await _tell(ctx, pool, plans[role], trouble.get(role, ""), link)
    if trouble:
        return _AGAIN_S
    waits = link.reachable and any(held.values())
    return _SLOWLY_S if waits or any(plan.status.phase is Phase.PROGRESSING for plan in plans.values()) else None


def _read(ctx: Context, namespace: str, fleet: str, role: Role) -> _Pool | None:
    key = Key(POOL, namespace, pool_name(fleet, role))
    obj = ctx.cache.get(key)
    if obj is None or leaving(obj):
        return None
    spec = stored_spec(PoolSpec, obj["spec"])
    revision = revision_of(spec.template, spec.nodes, spec.gpus_per_node)
    kv_format = kv_format_of(spec.template)
    groups = ctx.cache.all(EP_GROUP, namespace, {FLEET_LABEL: fleet, POOL_LABEL: key.name})
    return _Pool(key, obj, spec, revision, kv_format, tuple(groups))


def _pool(ctx: Context, pool: _Pool, link: FleetLink, known: Remembered, fleet: FleetSpec, held: str) -> Pool:
    snapshot = link.snapshot if link.reachable else None
    places = {
        one["spec"]["group"]: pods_of(ctx.cache, key_of(EP_GROUP, one), one["spec"]["nodes"]) for one in pool.groups
    }
    memory = known.memories.get(pool.spec.role, Memory())
    return Pool(
        role=pool.spec.role,
        groups=pool.spec.replicas,
        revision=pool.revision,
        kv_format=pool.kv_format,
        weights=weights_name(weights_of(pool.spec.template)),
        nodes=pool.spec.nodes,
        gpus_per_node=pool.spec.gpus_per_node,
        rules=rules_of(pool.spec.rollout),
        paused=pool.spec.paused or fleet.paused,
        held=held,
        members=members_of(
            pool.groups,
            snapshot,
            link.loads,
            None if is_guest(fleet) else places,
            memory.good,
            trials={one["spec"]["group"]: ctx.checks.trial(one) for one in pool.groups},
            prompt=pool.spec.rollout.canary_prompt,
            alone=alone_will_do(ctx, pool.fleet, pool.spec.role),
        ),
        memory=memory,
    )


async def _adopt(ctx: Context, pool: _Pool) -> None:
    """Take up groups that an earlier object of this pool has left (`kubectl delete epp --cascade=orphan`)."""
    for group in pool.groups:
        meta = group["metadata"]
        if meta.get("ownerReferences") or leaving(group) or meta["labels"].get(MANAGED_BY) != MANAGER:
            continue
        change = {"resourceVersion": meta["resourceVersion"], "ownerReferences": owned_by(POOL, pool.obj)}
        await ctx.applier.patch(key_of(EP_GROUP, group), {"metadata": change})
        name = group["spec"]["group"]
        await ctx.recorder.tell(POOL, pool.obj, "GroupAdopted", f"{name} had no owner, and is this pool's now.")


async def _held(ctx: Context, pool: _Pool, link: FleetLink, known: Remembered, fleet: FleetSpec) -> str:
    """Why no revision may change now; empty = it may."""
    snapshot = link.snapshot
    if not link.reachable or snapshot is None:
        return "the control service cannot be reached"
    loading = [group.group for group in snapshot.groups if group.loading and group.weight_version]
    if snapshot.refreshing or loading:
        who = ", ".join(loading) or "the fleet"
        return f"{who} takes other weights{f' (version {snapshot.refreshing})' if snapshot.refreshing else ''}"
    memory = known.memories.get(pool.spec.role, Memory())
    if pool.spec.paused or fleet.paused or memory.failed == pool.revision:
        return ""
    there = {weights_in(group["spec"]["template"]) for group in pool.groups}
    if (good := known.revisions.get(memory.good)) is not None:
        there.add(weights_in(good.spec["template"]))
    return await why_not(ctx, pool.fleet, link, weights_of(pool.spec.template), there)


async def _carry_out(ctx: Context, pool: _Pool, plan: Plan, known: Remembered, link: FleetLink) -> str:
    """Do what was planned; return why a part of it cannot be done, in one sentence. Raises Trouble."""
    trouble = ""
    for action in plan.actions:
        name = group_name(pool.spec.fleet, action.group)
        key = Key(EP_GROUP, pool.key.namespace, name)
        match action:
            case Create(group=group, revision=revision, canary=canary):
                if (found := _template(pool, revision, known)) is None:
                    trouble = (
                        f"{group} should be made again of revision {revision}, whose template nobody has kept"
                        f" (ConfigMap {memory_key(pool.fleet).name}): give the Fleet a template that serves"
                    )
                    continue
                spec, kv_format = found
                body = group_object(pool.obj, group_spec(pool.obj, spec, group, revision, kv_format, canary=canary))
                if await ctx.applier.ensure(key, body, pool.obj):
                    await ctx.recorder.tell(POOL, pool.obj, "GroupAdded", f"{group} is made (revision {revision}).")
            case Remove(group=group, reason=reason) if link.reachable:
                if await ctx.applier.remove(key, pool.obj):
                    await ctx.recorder.tell(POOL, pool.obj, "GroupRemoved", f"{group} drains and goes: {reason}.")
    return trouble


def _template(pool: _Pool, revision: str, known: Remembered) -> tuple[PoolSpec, str] | None:
    """What a group of a revision is made of; None = nobody knows any more, so none is made under its name."""
    if revision == pool.revision:
        return pool.spec, pool.kv_format
    if (kept := known.revisions.get(revision)) is not None:
        return stored_spec(PoolSpec, kept.spec), kept.kv_format
    for group in pool.groups:
        if group["spec"]["revision"] == revision:
            spec = stored_spec(GroupSpec, group["spec"])
            same = {"nodes": spec.nodes, "gpus_per_node": spec.gpus_per_node, "template": spec.template}
            return pool.spec.model_copy(update=same), spec.template.kv_format
    return None


# -- memory


async def _remember(
    ctx: Context, fleet: Object, before: Remembered, pools: Mapping[Role, _Pool], plans: Mapping[Role, Plan]
) -> Remembered:
    """Write down what the plans build on, if that is other than before."""
    current = {
        pool.revision: Revision(pool.kv_format, pool.spec.model_dump(mode="json", by_alias=True, exclude_none=True))
        for pool in pools.values()
    }
    needed = {revision for plan in plans.values() for revision in templates_to_keep(plan.memory)}
    revisions = {
        name: before.revisions.get(name) or current[name]
        for name in sorted(needed)
        if name in before.revisions or name in current
    }
    memories = {role: plan.memory for role, plan in plans.items()}
    after = Remembered(memories, revisions)
    if after != before:
        meta = fleet["metadata"]
        key = memory_key(Key(FLEET, meta["namespace"], meta["name"]))
        body = {
            "metadata": {"labels": labels(meta["name"], "config"), "ownerReferences": owned_by(FLEET, fleet)},
            "data": {"rollout.json": json.dumps(msgspec.to_builtins(after), sort_keys=True)},
        }
        await ctx.applier.ensure(key, body, fleet)
    return after


# -- evictions


async def _ensure_budget(ctx: Context, pool: _Pool, link: FleetLink) -> None:
    """Hold back evictions while the pool could not bear one.

    One pod may be evicted while another group is ready to take the streams of its group, or while none serves at all.
    """
    if ctx.budget is None or not link.reachable:
        return  # what it said last still holds
    assert link.snapshot is not None, "a reachable fleet has told what it is"
    own = {group["spec"]["group"] for group in pool.groups}
    ready = sum(group.group in own and group.state is GroupState.READY for group in link.snapshot.groups)
    body = pool_budget(pool.obj, pool.spec, 0 if ready == 1 else 1)
    await ctx.applier.ensure(Key(ctx.budget, pool.key.namespace, pool.key.name), body, pool.obj)


# -- status


async def _tell(ctx: Context, pool: _Pool, plan: Plan, trouble: str, link: FleetLink) -> None:
    status = plan.status
    ready = status.ready if link.reachable else int((pool.obj.get("status") or {}).get("ready", 0))
    staying = [group for group in pool.groups if not leaving(group)]
    fleet, name = pool.spec.fleet, pool.key.name
    phase = status.phase
    stopped = phase in (Phase.STOPPED, Phase.ROLLED_BACK)
    if ctx.cache.get(pool.fleet) is not None:
        READY.labels(pool.key.namespace, fleet, pool.spec.role).set(ready)
        STOPPED.labels(pool.key.namespace, fleet, pool.spec.role).set(stopped)
    found = [
        told(
            "Available",
            None if not link.reachable else ready >= pool.spec.replicas,
            "ControlUnreachable" if not link.reachable else "Ready" if ready >= pool.spec.replicas else "Short",
            f"{ready} of {pool.spec.replicas} groups are ready.",
        ),
        told("Progressing", phase is Phase.PROGRESSING, status.reason, status.message),
        told(
            "Degraded",
            bool(trouble) or stopped,
            "Trouble" if trouble else status.reason,
            trouble or status.message,
        ),
    ]
    if stopped and link.reachable:
        await ctx.recorder.tell(POOL, pool.obj, status.reason, status.message, type_="Warning")
    gpus = len(pool.groups) * pool.spec.nodes * pool.spec.gpus_per_node
    body: Object = {
        "replicas": len(staying),
        "ready": ready,
        "updated": status.updated,
        "revision": pool.revision,
        "selector": f"{FLEET_LABEL}={fleet},{POOL_LABEL}={name},{GROUP_LABEL}",
        "gpus": gpus if pool.spec.template.device == "cuda" else 0,
    }
    await ctx.tell_status(pool.key, pool.obj, body, found)
