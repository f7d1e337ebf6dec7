"""Objects that the operator's tests begin with."""

from __future__ import annotations

from typing import Any

from tandem.core.types import Role
from tandem_operator.api.fleet import FleetSpec
from tandem_operator.api.pool import GroupSpec, PoolSpec
from tandem_operator.names import BUDGET, STATEFUL_SET, Key, Kind, Object
from tandem_operator.render.config import fleet_spec
from tandem_operator.render.group import group_children
from tandem_operator.render.platform import platform_children
from tandem_operator.render.pool import group_object, group_spec, pool_object
from tandem_operator.revision import kv_format_of

IMAGE = {"name": "engine:1"}


def fleet(**spec: Any) -> Object:
    """A Fleet with defaults but for `spec`."""
    return {
        "metadata": {"name": "r1", "namespace": "ai", "uid": "fleet-uid", "resourceVersion": "7", "generation": 1},
        "spec": {"images": {"engine": IMAGE}, **spec},
    }


def spec_of(obj: Object) -> FleetSpec:
    return fleet_spec(obj["spec"])


def pool(obj: Object, role: Role = Role.DECODE, replicas: int = 1) -> tuple[Object, PoolSpec]:
    """The pool that the operator makes of a Fleet, as it would be on the server."""
    rendered = pool_object(obj, spec_of(obj), role)
    live = {
        **rendered,
        "metadata": {**rendered["metadata"], "name": f"r1-{role}", "namespace": "ai", "uid": f"{role}-uid"},
        "spec": {**rendered["spec"], "replicas": replicas},
    }
    live["metadata"]["resourceVersion"] = "8"
    return live, PoolSpec.model_validate(live["spec"])


def group(obj: Object, role: Role = Role.DECODE, name: str = "decode-0") -> tuple[Object, GroupSpec]:
    """A group of that pool, as it would be on the server."""
    parent, spec = pool(obj, role)
    wanted = group_spec(parent, spec, name, "abc", kv_format_of(spec.template), canary=False)
    rendered = group_object(parent, wanted)
    meta = {**rendered["metadata"], "name": f"r1-{name}", "namespace": "ai", "uid": f"{name}-uid"}
    meta["resourceVersion"] = "9"
    return {**rendered, "metadata": meta}, wanted


def platform(**spec: Any) -> dict[tuple[Kind, str], Object]:
    """What a fleet has besides its pools."""
    made = platform_children(fleet(**spec), spec_of(fleet(**spec)), BUDGET)
    return {(key.kind, key.name): body for key, body in made.items()}


def engine(**pods: Any) -> Object:
    """The pod template of a decode group."""
    made, spec = group(fleet(decode={"pods": pods}))
    template: Object = group_children(made, spec)[Key(STATEFUL_SET, "ai", "r1-decode-0")]["spec"]["template"]
    return template
