"""A fleet in a Ray cluster that is somebody else's (`ray.address`): what is other there, and how it leaves.

Ray places its groups on nodes that are there already, so nothing that the Fleet says of engines' pods matters. What the
fleet has in that cluster would outlive it: a finalizer keeps the Fleet, and with it head and gateways, until the groups
are gone; the head takes the rest along when it ends.
"""

from __future__ import annotations

from tandem.config import RayConfig
from tandem.core.types import Role
from tandem.fleet.control_client import ControlError
from tandem_operator.api.fleet import FleetSpec
from tandem_operator.api.pods import EnginePodOptions
from tandem_operator.conditions import Told, told
from tandem_operator.kube import KubeError
from tandem_operator.names import CONFIG_MAP, FLEET, RAY_FINALIZER, STATEFUL_SET, Key, Object
from tandem_operator.reconcile.context import Context, unix
from tandem_operator.render.config import SpecError, config_in, ray_namespace
from tandem_operator.render.pool import pool_of

_AGAIN_S = 2.0
_GIVEN_UP_S = 120.0
"""A Fleet that is being deleted waits so long for a control service that is away."""
NOT_ALLOWED = "NotAllowed"
"""Reason of a SpecError that says what the operator lacks, not what the Fleet does."""
_HOW_TO_ALLOW = (
    "spec.ray.address needs a finalizer on the Fleet, and the operator may not change Fleets: set"
    " operator.rayClusters to true in its chart's values"
)


def is_guest(spec: FleetSpec) -> bool:
    """Whether the fleet's Ray cluster is somebody else's."""
    return spec.ray.address is not None


def check_move(ctx: Context, key: Key, spec: FleetSpec) -> None:
    """A fleet stays in the Ray cluster in which it began: its groups cannot be moved. Raises SpecError."""
    if (known := ctx.cache.get(Key(CONFIG_MAP, key.namespace, f"{key.name}-config"))) is None:
        return
    before: RayConfig | None = config_in(known)
    if before is not None and before.address != spec.ray.address:
        was = f"it was {before.address}" if before.address else "there was none"
        raise SpecError(f"spec.ray.address cannot be changed ({was}): make another Fleet, and delete this one")


async def hold(ctx: Context, key: Key, fleet: Object) -> None:
    """Put our finalizer on a Fleet, before it has anything in another's cluster. Raises SpecError, KubeError."""
    meta = fleet["metadata"]
    held = meta.get("finalizers") or []
    if RAY_FINALIZER in held:
        return
    try:
        change = {"resourceVersion": meta["resourceVersion"], "finalizers": [*held, RAY_FINALIZER]}
        await ctx.applier.patch(key, {"metadata": change})
    except KubeError as error:
        if error.status != 403:
            raise
        raise SpecError(_HOW_TO_ALLOW, NOT_ALLOWED) from error


async def leave(ctx: Context, key: Key, fleet: Object) -> float | None:
    """Let a Fleet that is being deleted go as soon as it has no group in Ray any more; return when to look again."""
    if RAY_FINALIZER not in (fleet["metadata"].get("finalizers") or ()):
        return None
    head = ctx.cache.get(_head(key))
    if head is not None and head["spec"].get("replicas") == 0:
        return await _when_the_head_has_gone(ctx, key, fleet, head)
    link = ctx.links.open(key.namespace, key.name)
    if not link.known:
        return _AGAIN_S
    if not link.reachable:
        away = min(link.away_s, ctx.now() - unix(fleet["metadata"]["deletionTimestamp"]))
        if away <= _GIVEN_UP_S:
            return _AGAIN_S
        address = (fleet["spec"].get("ray") or {}).get("address")
        scope = ray_namespace(key.name, key.namespace)
        message = (
            f"The control service has been away for {away:.0f} s ({link.why}). What the fleet still has in the Ray"
            f" cluster at {address} stays there: end the actors of the Ray namespace {scope}, remove its placement"
            f" groups (group/…), and delete Ray Serve's application tandem-gateway-{scope}."
        )
        await ctx.recorder.tell(FLEET, fleet, "LeftBehind", message, type_="Warning")
        await _let_go(ctx, key, fleet)
        return None
    try:
        async with link.client() as client:
            snapshot = await client.fleet()
            for wish in snapshot.desired:
                await client.remove(wish.group)
    except ControlError as error:
        await ctx.recorder.tell(FLEET, fleet, "ControlError", str(error), type_="Warning")
        return _AGAIN_S
    if snapshot.desired or snapshot.groups:
        return _AGAIN_S
    if head is None:
        await _let_go(ctx, key, fleet)
        return None
    # It takes the rest along as it ends, for which it needs the store: so it ends before that goes too.
    await ctx.applier.patch(_head(key), {"spec": {"replicas": 0}})
    return _AGAIN_S


async def _when_the_head_has_gone(ctx: Context, key: Key, fleet: Object, head: Object) -> float | None:
    asked_at = unix(fleet["metadata"]["deletionTimestamp"])
    if (head.get("status") or {}).get("replicas") and ctx.now() - asked_at < 2 * _GIVEN_UP_S:
        return _AGAIN_S
    await _let_go(ctx, key, fleet)
    return None


def _head(key: Key) -> Key:
    return Key(STATEFUL_SET, key.namespace, f"{key.name}-head")


def placed_by_ray(spec: FleetSpec) -> Told:
    """Who places the groups, and what of the Fleet has no meaning then."""
    if not is_guest(spec):
        return told("PlacedByRay", False, "OwnCluster", "Each group has pods of its own.")
    message = (
        f"Ray at {spec.ray.address} places the groups on its own nodes, whose image must have this Tandem and its"
        " SGLang, and the model under spec.model.path. Not done there: pods for groups, disruption budgets, the drain"
        " of a group before its node goes, changes of the engine's image."
    )
    if ignored := _ignored(spec):
        message += f" These settings have no meaning: {', '.join(ignored)}."
    return told("PlacedByRay", True, "RayCluster", message[:1000])


def _ignored(spec: FleetSpec) -> list[str]:
    """Settings that somebody has made and that only pods of ours could have."""
    storage = {"ray.storage": spec.ray.storage, "ray.storageClass": spec.ray.storage_class}
    found = [name for name, value in storage.items() if value is not None]
    for role in Role:
        pods = pool_of(spec, role).pods
        usual = EnginePodOptions()
        fields = type(pods).model_fields
        found += [
            f"{role}.pods.{fields[name].alias or name}"
            for name in fields
            if getattr(pods, name) != getattr(usual, name)
        ]
    return found


async def _let_go(ctx: Context, key: Key, fleet: Object) -> None:
    meta = fleet["metadata"]
    rest = [name for name in meta["finalizers"] if name != RAY_FINALIZER]
    change = {"metadata": {"resourceVersion": meta["resourceVersion"], "finalizers": rest or None}}
    await ctx.applier.patch(key, change)
