"""What the operator calls things: kinds, object names, labels, annotations, ports. One place, so that all agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tandem_operator.api import GROUP, VERSION

MANAGER = "tandem-operator"
"""Field manager of everything that the operator applies, and `app.kubernetes.io/managed-by`."""
MANAGED_BY = "app.kubernetes.io/managed-by"
DRAIN_FINALIZER = f"{GROUP}/drain"
ORPHAN_FINALIZER = "orphan"
"""Kubernetes' own, of `--cascade=orphan`: it goes when what the object owned has no owner any more."""
RAY_FINALIZER = f"{GROUP}/leave-ray"
"""On a Fleet that has its groups in another's Ray cluster."""
FLEET_LABEL, COMPONENT_LABEL = f"{GROUP}/fleet", f"{GROUP}/component"
ROLE_LABEL, POOL_LABEL, GROUP_LABEL = f"{GROUP}/role", f"{GROUP}/pool", f"{GROUP}/group"
FLEET_GROUPS = f"{GROUP}/fleet-groups"
"""Annotation of a pool: the number of groups that its Fleet said when the operator last took it from there."""
GANG_SIZE = f"{GROUP}/gang-size"
"""Annotation of a group's pods: how many of them have to run at once."""
FORCE_DRAIN = f"{GROUP}/force-drain"
"""Annotation that a person sets to "true" on a group that is being deleted: it leaves though it is the last one."""

CLAIM = "tandem-fleets"
"""Name of the Lease, in each namespace with a Fleet, that says which release's operator acts there."""

GCS_PORT, CONTROL_PORT, READY_PORT, REDIS_PORT = 6380, 9000, 8090, 6379


@dataclass(frozen=True)
class Kind:
    """One kind of object in the API. `group` is empty for the core API."""

    group: str
    version: str
    plural: str
    kind: str

    @property
    def api_version(self) -> str:
        """As objects say it."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def path(self) -> str:
        """Where its version of the API begins."""
        return f"/apis/{self.group}/{self.version}" if self.group else f"/api/{self.version}"


FLEET = Kind(GROUP, VERSION, "fleets", "Fleet")
POOL = Kind(GROUP, VERSION, "expertparallelpools", "ExpertParallelPool")
EP_GROUP = Kind(GROUP, VERSION, "expertparallelgroups", "ExpertParallelGroup")
STATEFUL_SET = Kind("apps", "v1", "statefulsets", "StatefulSet")
SERVICE = Kind("", "v1", "services", "Service")
CONFIG_MAP = Kind("", "v1", "configmaps", "ConfigMap")
POD = Kind("", "v1", "pods", "Pod")
EVENT = Kind("", "v1", "events", "Event")
LEASE = Kind("coordination.k8s.io", "v1", "leases", "Lease")
BUDGET = Kind("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget")
BUDGET_BETA = Kind("policy", "v1beta1", "poddisruptionbudgets", "PodDisruptionBudget")
VOLCANO_GANG = Kind("scheduling.volcano.sh", "v1beta1", "podgroups", "PodGroup")
COSCHEDULING_GANG = Kind("scheduling.x-k8s.io", "v1alpha1", "podgroups", "PodGroup")

POOLS = Kind(GROUP, "", "", "Pools")
"""No kind of the API: the work on both pools of a fleet together, under the fleet's name."""

OWN = (FLEET, POOL, EP_GROUP)
"""Kinds that are the operator's own; of all others it looks only at objects of fleets (`watched_label`)."""


def watched_label(kind: Kind) -> str | None:
    """Which label an object must have to be looked at; of pods only those of engines are."""
    return None if kind in OWN else GROUP_LABEL if kind is POD else FLEET_LABEL


Object = dict[str, Any]
"""A Kubernetes object, as JSON has it."""


@dataclass(frozen=True)
class Key:
    """Which object, of those in a namespace."""

    kind: Kind
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind.kind} {self.namespace}/{self.name}"


def key_of(kind: Kind, obj: Object) -> Key:
    """The key of an object of that kind."""
    return Key(kind, obj["metadata"].get("namespace", ""), obj["metadata"]["name"])


def labels(fleet: str, component: str, **more: str) -> dict[str, str]:
    """Labels of a child of a fleet. `more`: role, pool and group of an engine's."""
    named = {f"{GROUP}/{name}": value for name, value in more.items()}
    return {
        "app.kubernetes.io/name": "tandem",
        MANAGED_BY: MANAGER,
        FLEET_LABEL: fleet,
        COMPONENT_LABEL: component,
        **named,
    }


def owned_by(kind: Kind, parent: Object) -> list[Object]:
    """Owner reference to a child's parent. Without blockOwnerDeletion, which would ask for rights on finalizers."""
    meta = parent["metadata"]
    return [
        {
            "apiVersion": kind.api_version,
            "kind": kind.kind,
            "name": meta["name"],
            "uid": meta["uid"],
            "controller": True,
        }
    ]


def owner(obj: Object) -> Object | None:
    """Reference to the controller of an object."""
    references = obj["metadata"].get("ownerReferences") or ()
    return next((reference for reference in references if reference.get("controller")), None)


def owned(obj: Object, parent: Object) -> bool:
    """Whether `parent` is the object's controller."""
    reference = owner(obj)
    return reference is not None and reference["uid"] == parent["metadata"]["uid"]


def leaving(obj: Object) -> bool:
    """Whether it is being deleted."""
    return obj["metadata"].get("deletionTimestamp") is not None


def pool_name(fleet: str, role: str) -> str:
    """Name of a fleet's pool."""
    return f"{fleet}-{role}"


def group_name(fleet: str, group: str) -> str:
    """Name of the objects of a group, by its id in the fleet."""
    return f"{fleet}-{group}"
