"""Rules between fields: a server that knows CEL refuses at once what breaks one, and takes what keeps it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from kubernetes.client.exceptions import ApiException

from kube.cluster import Cluster
from kube.control_plane import has_cel, release
from kube.kubelet.rest import MERGE, path
from kube.operator_world import serve_kinds
from support.fleets import LEAST
from tandem_operator.cel import RULES

pytestmark = pytest.mark.timeout(600)

API = "tandem.dev/v1alpha1"
PLURALS = {
    "Fleet": "fleets",
    "ExpertParallelPool": "expertparallelpools",
    "ExpertParallelGroup": "expertparallelgroups",
}
POOL = {"fleet": "r1", "role": "decode", "template": {"image": {"name": "engine:1"}}}
GROUP = POOL | {"pool": "r1-decode", "group": "decode-0", "nodes": 2, "gpusPerNode": 8, "revision": "a"}


def decode(**more: Any) -> dict[str, Any]:
    return LEAST | {"decode": more}


def window(groups: int) -> dict[str, Any]:
    return {"begin": "08:00", "end": "18:00", "minGroups": groups}


KEPT = [
    ("Fleet", LEAST),
    ("Fleet", decode(autoscaling=None)),
    ("Fleet", decode(autoscaling={"minGroups": 2, "maxGroups": 2})),
    ("Fleet", decode(autoscaling={"maxGroups": 3, "schedule": [window(2), window(3)]})),
    ("Fleet", decode(rollout={"maxSurge": 0, "maxUnavailable": 1})),
    ("Fleet", LEAST | {"model": {"volume": {"claim": "weights"}}}),
    ("Fleet", LEAST | {"model": {"volume": {"hostPath": "/weights"}}}),
    ("Fleet", LEAST | {"model": {"volume": {"claim": None, "hostPath": "/weights"}}}),
    ("ExpertParallelPool", POOL | {"autoscaling": {"minGroups": 0, "maxGroups": 1}}),
    ("ExpertParallelGroup", GROUP),
]
BOTH = {"claim": "weights", "hostPath": "/weights"}
BROKEN = [
    ("Fleet", decode(autoscaling={"minGroups": 3, "maxGroups": 2}), "minGroups is above maxGroups"),
    (
        "Fleet",
        decode(autoscaling={"maxGroups": 2, "schedule": [window(2), window(3)]}),
        "a schedule asks for more groups than maxGroups",
    ),
    (
        "Fleet",
        decode(rollout={"maxSurge": 0, "maxUnavailable": 0}),
        "maxSurge and maxUnavailable cannot both be 0: no group could be replaced",
    ),
    ("Fleet", LEAST | {"model": {"volume": BOTH}}, "give claim or hostPath, not both"),
    ("ExpertParallelPool", POOL | {"autoscaling": {"minGroups": 3, "maxGroups": 2}}, "minGroups is above maxGroups"),
    (
        "ExpertParallelGroup",
        GROUP | {"template": {"image": {"name": "engine:1"}, "modelVolume": BOTH}},
        "give claim or hostPath, not both",
    ),
]
FIXED = {
    "ExpertParallelPool": {"fleet": "r2", "role": "prefill"},
    "ExpertParallelGroup": {
        "fleet": "r2",
        "pool": "r2-decode",
        "role": "prefill",
        "group": "decode-1",
        "nodes": 3,
        "gpusPerNode": 4,
    },
}
"""Fields that never change, with other values than those of `POOL` and `GROUP`."""


def test_every_rule_is_broken_here() -> None:
    broken = {message for _, _, message in BROKEN}
    broken |= {f"{field} cannot be changed: make another" for fields in FIXED.values() for field in fields}
    assert broken == {rule.message for rules in RULES.values() for rule in rules}


@pytest.fixture(scope="module")
def ruled(cluster: Cluster) -> Cluster:
    """The cluster, if its server knows rules."""
    if not has_cel():
        pytest.skip(f"Kubernetes {release()[0]}.{release()[1]} has no CEL; these tests need 1.25 or later")
    serve_kinds(cluster)
    return cluster


@pytest.fixture
def there(ruled: Cluster, namespace: str) -> str:
    """A namespace with a pool and a group."""
    for kind, spec in (("ExpertParallelPool", POOL), ("ExpertParallelGroup", GROUP)):
        create(ruled, namespace, kind, spec)
    return namespace


def create(cluster: Cluster, namespace: str, kind: str, spec: dict[str, Any], **query: str) -> None:
    """Create an object named x. Raises ApiException."""
    body = {"apiVersion": API, "kind": kind, "metadata": {"name": "x"}, "spec": spec}
    cluster.rest.persist("POST", path(PLURALS[kind], namespace, group=API), body, **query)


def refusal(error: ApiException) -> str:
    """Everything that the server finds wrong, in one line. The message alone is cut short."""
    told = json.loads(error.body)
    return " ".join([told["message"], *(cause["message"] for cause in told.get("details", {}).get("causes", ()))])


@pytest.mark.parametrize(("kind", "spec"), KEPT)
def test_what_keeps_the_rules_is_taken(ruled: Cluster, kind: str, spec: dict[str, Any]) -> None:
    create(ruled, "default", kind, spec, dryRun="All")


@pytest.mark.parametrize(("kind", "spec", "says"), BROKEN)
def test_what_breaks_a_rule_is_refused(ruled: Cluster, kind: str, spec: dict[str, Any], says: str) -> None:
    with pytest.raises(ApiException) as error:
        create(ruled, "default", kind, spec, dryRun="All")
    assert error.value.status == 422
    assert says in refusal(error.value)


@pytest.mark.parametrize(("kind", "field"), [(kind, field) for kind, fields in FIXED.items() for field in fields])
def test_what_never_changes_cannot_be_changed(ruled: Cluster, there: str, kind: str, field: str) -> None:
    where = path(PLURALS[kind], there, "x", group=API)
    with pytest.raises(ApiException) as error:
        ruled.rest.persist("PATCH", where, {"spec": {field: FIXED[kind][field]}}, content=MERGE)
    assert error.value.status == 422
    assert f"{field} cannot be changed: make another" in refusal(error.value)
    ruled.rest.persist("PATCH", where, {"spec": {field: (POOL | GROUP)[field]}}, content=MERGE)
