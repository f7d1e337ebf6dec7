"""Pools from a Fleet, groups from a pool, and the budget of disruptions of a pool's pods."""

from __future__ import annotations

from tandem.core.types import Role
from tandem_operator.api.fleet import FleetPool, FleetSpec
from tandem_operator.api.pods import EnginePodOptions
from tandem_operator.api.pool import EngineTemplate, GroupSpec, Image, ModelVolume, PoolSpec
from tandem_operator.apply import without_empty
from tandem_operator.names import DRAIN_FINALIZER, FLEET, FLEET_GROUPS, POOL, Object, labels, owned_by
from tandem_operator.render import pods
from tandem_operator.revision import UNNAMED


def pool_of(spec: FleetSpec, role: Role) -> FleetPool:
    """What a Fleet says of one role."""
    return spec.prefill if role is Role.PREFILL else spec.decode


def pool_object(fleet: Object, spec: FleetSpec, role: Role) -> Object:
    """A pool, without `replicas`: those belong to whoever scales it.

    `paused` is only said when the whole Fleet is paused: else it belongs to whoever pauses this pool alone.
    """
    name = fleet["metadata"]["name"]
    pool = pool_of(spec, role)
    path = pods.model_path(str(spec.model.path) if spec.model.path else None, spec.model.volume)
    template = EngineTemplate(
        image=spec.images.engine,
        device=spec.device,
        model_path=path,
        model_version=None if spec.model.version == UNNAMED else spec.model.version,
        model_volume=spec.model.volume,
        redundant_experts=pool.redundant_experts,
        max_total_tokens=pool.max_total_tokens,
        args=pool.args,
        env=pool.env,
        pods=pool.pods,
    )
    if spec.ray.address is not None:
        # What only pods of ours would have must not make another revision.
        of_ray = {"image": Image(name="of-the-ray-cluster"), "model_volume": ModelVolume(), "pods": EnginePodOptions()}
        template = template.model_copy(update=of_ray)
    wanted = PoolSpec(
        fleet=name,
        role=role,
        nodes=pool.nodes,
        gpus_per_node=pool.gpus_per_node,
        paused=spec.paused,
        autoscaling=pool.autoscaling,
        rollout=pool.rollout,
        template=template,
    )
    body = body_of(wanted)
    del body["replicas"]
    if not spec.paused:
        del body["paused"]
    return {
        "metadata": {
            "labels": labels(name, "engine", role=role),
            "annotations": {FLEET_GROUPS: str(pool.groups)},
            "ownerReferences": owned_by(FLEET, fleet),
        },
        "spec": body,
    }


def body_of(spec: PoolSpec | GroupSpec) -> Object:
    """A spec as JSON."""
    body: Object = without_empty(spec.model_dump(mode="json", by_alias=True, exclude_none=True))
    return body


def group_spec(pool: Object, spec: PoolSpec, group: str, revision: str, kv_format: str, *, canary: bool) -> GroupSpec:
    """A new group of a pool."""
    return GroupSpec(
        fleet=spec.fleet,
        pool=pool["metadata"]["name"],
        role=spec.role,
        group=group,
        nodes=spec.nodes,
        gpus_per_node=spec.gpus_per_node,
        revision=revision,
        canary=canary,
        template=spec.template.model_copy(update={"kv_format": kv_format}),
    )


def group_object(pool: Object, spec: GroupSpec) -> Object:
    """A group as its pool makes it. The finalizer lets it drain before it is gone."""
    return {
        "metadata": {
            "labels": labels(spec.fleet, "engine", role=spec.role, pool=spec.pool, group=spec.group),
            "finalizers": [DRAIN_FINALIZER],
            "ownerReferences": owned_by(POOL, pool),
        },
        "spec": body_of(spec),
    }


def pool_budget(pool: Object, spec: PoolSpec, evictable: int) -> Object:
    """Budget of disruptions of all pods of a pool: `evictable` of them may be evicted at a time.

    One budget for the pool, not one for each group: evicting any pod takes its whole group out of service, so two pods
    of two groups at a time would be two groups.
    """
    name = pool["metadata"]["name"]
    own = labels(spec.fleet, "engine", role=spec.role, pool=name)
    return {
        "metadata": {"labels": own, "ownerReferences": owned_by(POOL, pool)},
        "spec": {"maxUnavailable": evictable, "selector": {"matchLabels": own}},
    }
