"""Everything that is rendered is right by the strict schemas of the oldest and the newest Kubernetes."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest

from tandem.core.types import Role
from tandem_operator.names import BUDGET, CONFIG_MAP, SERVICE, STATEFUL_SET, Key, Object
from tandem_operator.render.group import group_children
from tandem_operator.render.platform import platform_children
from tandem_operator.render.pool import pool_budget
from unit.operator.objects import fleet, group, pool, spec_of

PODS: dict[str, Any] = {
    "resources": {"requests": {"cpu": "8"}, "limits": {"memory": "1Ti"}},
    "nodeSelector": {"gpu": "h200"},
    "tolerations": [{"key": "nvidia.com/gpu", "effect": "NoExecute", "tolerationSeconds": 5}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "high",
    "runtimeClassName": "nvidia",
    "schedulerName": "mine",
    "labels": {"team": "a"},
    "annotations": {"note": "b"},
    "runAsUser": 1000,
}
FULL: dict[str, Any] = {
    "model": {"path": "/models/r1", "volume": {"claim": "weights"}},
    "images": {"engine": {"name": "e", "pullPolicy": "Always", "pullSecrets": ["pull"]}},
    "redis": {"storage": "10Gi", "storageClass": "fast", "pods": PODS},
    "ray": {"storage": "10Gi", "pods": PODS},
    "gateway": {"replicas": 3, "tlsSecret": "cert", "serviceType": "LoadBalancer", "pods": PODS},
    "tenantsSecret": "tenants",
    "decode": {
        "nodes": 18,
        "pods": {
            **PODS,
            "rdma": {"rdma/hca": 1},
            "hugePages": {"hugepages-2Mi": "4Gi"},
            "hostNetwork": True,
            "topology": {"key": "rack", "required": True},
            "gang": {"scheduler": "kueue", "queue": "gpus"},
        },
    },
}
FLEETS: dict[str, dict[str, Any]] = {
    "least": {},
    "cpu": {"device": "cpu"},
    "full": FULL,
    "external": {"redis": {"urlSecret": {"name": "s", "key": "k"}}, "model": {"volume": {"hostPath": "/mnt"}}},
}


def rendered(spec: dict[str, Any]) -> dict[Key, Object]:
    made = fleet(**spec)
    parent, pool_spec = pool(made)
    budget = {Key(BUDGET, "ai", "r1-decode"): pool_budget(parent, pool_spec, 1)}
    groups = [group_children(*group(made, role, f"{role}-0")) for role in Role]
    return {**platform_children(made, spec_of(made), BUDGET), **budget, **groups[0], **groups[1]}


@pytest.mark.parametrize("version", ["1.28", "1.37"])
@pytest.mark.parametrize("spec", FLEETS.values(), ids=FLEETS)
def test_what_is_rendered_is_right_by_the_strict_schema(spec: dict[str, Any], version: str) -> None:
    made = rendered(spec)
    assert {key.kind for key in made} == {CONFIG_MAP, SERVICE, STATEFUL_SET, BUDGET}
    for key, body in made.items():
        meta = {**body["metadata"], "name": key.name, "namespace": key.namespace}
        full = {"apiVersion": key.kind.api_version, "kind": key.kind.kind, **body, "metadata": meta}
        kubernetes_validate.validate(full, version, strict=True)
