"""The chart on a real API server: Helm 3 and Helm 4 install, upgrade, roll back and uninstall it; kinds work there.

The operator is scaled to nothing here: what it does is tested elsewhere.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kube.cluster import SOON, Cluster
from kube.control_plane import has_cel
from kube.kubelet.rest import MERGE
from support.fleets import LEAST, REFUSED_BY_SCHEMA, UNKNOWN
from support.helm import CHART, EXAMPLES, helm
from support.helm4 import helm4
from support.structural import with_defaults
from tandem_operator import crds

pytestmark = pytest.mark.timeout(600)

API = "tandem.dev/v1alpha1"
AWAY = {"operator": {"replicas": 0}}
WITH_FLEET = AWAY | {"fleet": {"create": True, "spec": LEAST | {"decode": {"groups": 2}}}}
POOL = {"fleet": "r1", "role": "decode", "template": {"image": {"name": "engine:1"}}}
FAMILY = "fleets,expertparallelpools,expertparallelgroups"


def established(cluster: Cluster, plural: str) -> bool:
    found = cluster.get("customresourcedefinitions", f"{plural}.tandem.dev", group="apiextensions.k8s.io/v1") or {}
    conditions = found.get("status", {}).get("conditions") or ()
    return any(one["type"] == "Established" and one["status"] == "True" for one in conditions)


@pytest.fixture(scope="module")
def kinds(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The cluster with the chart's CustomResourceDefinitions, applied server-side as the chart's notes say."""
    folder = CHART / "crds"
    if not has_cel():  # and as the chart's README says for such a server
        folder = tmp_path_factory.mktemp("crds")
        assert crds.main(["--no-cel", str(folder)]) == 0
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(folder))
    for kind in crds.KINDS:
        cluster.wait(lambda name=kind.plural: established(cluster, name), 120, f"{kind.plural} are established")
    return cluster


def resource(kind: str, name: str, spec: dict[str, Any]) -> str:
    return json.dumps({"apiVersion": API, "kind": kind, "metadata": {"name": name}, "spec": spec})


def deployed(cluster: Cluster, namespace: str, name: str) -> dict[str, Any]:
    return dict(cluster.get("deployments", name, namespace, group="apps/v1") or {})


# -- both Helms


class Helm3:
    """The executable."""

    def __init__(self, cluster: Cluster, namespace: str, folder: Path) -> None:
        self.run = functools.partial(helm, "--namespace", namespace, kubeconfig=cluster.kubeconfig)
        self.values = folder / "values.json"

    def install(self, values: dict[str, Any]) -> str:
        self.values.write_text(json.dumps(values))
        return self.run("install", "tandem", CHART, "-f", self.values)

    def upgrade(self, values: dict[str, Any]) -> None:
        self.values.write_text(json.dumps(values))
        self.run("upgrade", "tandem", CHART, "-f", self.values)

    def rollback(self, revision: int) -> None:
        self.run("rollback", "tandem", str(revision))

    def history(self) -> list[int]:
        return [entry["revision"] for entry in json.loads(self.run("history", "tandem", "-o", "json"))]

    def uninstall(self) -> None:
        self.run("uninstall", "tandem")


class Helm4:
    """The library."""

    def __init__(self, cluster: Cluster, namespace: str, folder: Path) -> None:
        self.run = functools.partial(helm4, cluster.kubeconfig, namespace)
        self.chart = str(CHART)
        if not has_cel():  # the library cannot leave a chart's CRDs out (--skip-crds)
            self.chart = str(shutil.copytree(CHART, folder / "chart"))
            assert crds.main(["--no-cel", f"{self.chart}/crds"]) == 0

    def install(self, values: dict[str, Any]) -> None:
        self.run("install", self.chart, "tandem", values, timeout=60)

    def upgrade(self, values: dict[str, Any]) -> None:
        self.run("upgrade", self.chart, "tandem", values, timeout=60)

    def rollback(self, revision: int) -> None:
        self.run("rollback", "tandem", version=revision, timeout=60)

    def history(self) -> list[int]:
        return [entry["revision"] for entry in self.run("history", "tandem")]

    def uninstall(self) -> None:
        self.run("uninstall", "tandem", timeout=60)


@pytest.fixture(params=[Helm3, Helm4], ids=["helm 3", "helm 4"])
def release(request: pytest.FixtureRequest, kinds: Cluster, namespace: str, tmp_path: Path) -> Helm3 | Helm4:
    made: Helm3 | Helm4 = request.param(kinds, namespace, tmp_path)
    return made


def test_a_release_is_installed_upgraded_rolled_back_and_uninstalled(
    release: Helm3 | Helm4, kinds: Cluster, namespace: str
) -> None:
    release.install(AWAY)
    assert deployed(kinds, namespace, "tandem-operator")["spec"]["replicas"] == 0
    # The Deployment of none needs no budget.
    release.upgrade({"operator": {"replicas": 0, "watchNamespaces": ["*"]}})
    assert f"{namespace}-tandem-operator" in kinds.kubectl("get", "clusterroles", "-o", "name")
    release.rollback(1)
    assert f"{namespace}-tandem-operator" not in kinds.kubectl("get", "clusterroles", "-o", "name")
    assert release.history() == [1, 2, 3]
    release.uninstall()
    assert deployed(kinds, namespace, "tandem-operator") == {}
    # What belongs to a Deployment is collected afterwards.
    what = "all,roles,rolebindings,serviceaccounts,networkpolicies"
    kinds.wait(
        lambda: set(kinds.kubectl("get", what, "-n", namespace, "-o", "name").split()) <= {"serviceaccount/default"},
        SOON,
        "nothing is left of the release",
    )
    assert "fleets.tandem.dev" in kinds.kubectl("get", "crd", "-o", "name"), "uninstalling took everybody's fleets away"


def test_the_fleet_of_a_release_survives_it_and_is_taken_up_again(
    release: Helm3 | Helm4, kinds: Cluster, namespace: str
) -> None:
    release.install(WITH_FLEET)
    fleet = kinds.get("fleets", "r1", namespace, group=API)
    assert fleet is not None
    assert fleet["spec"]["decode"]["groups"] == 2
    release.upgrade(AWAY)
    release.uninstall()
    kept = kinds.get("fleets", "r1", namespace, group=API)
    assert kept is not None
    assert kept["metadata"]["uid"] == fleet["metadata"]["uid"]
    # Helm 3 compares what it installed with what it installs, not with what is there: it takes the Fleet up as it is.
    release.install(WITH_FLEET)
    release.upgrade(WITH_FLEET | {"fleet": WITH_FLEET["fleet"] | {"spec": LEAST | {"decode": {"groups": 3}}}})
    again = kinds.get("fleets", "r1", namespace, group=API)
    assert again is not None
    assert (again["metadata"]["uid"], again["spec"]["decode"]["groups"]) == (fleet["metadata"]["uid"], 3)


def test_the_notes_say_what_to_do_next(kinds: Cluster, namespace: str, tmp_path: Path) -> None:
    notes = Helm3(kinds, namespace, tmp_path).install(WITH_FLEET)
    assert f"kubectl -n {namespace} wait fleet/r1 --for=condition=Available" in notes
    assert "exec r1-head-0 -- tandem keys create --tenant" in notes
    assert notes.index("scale epp/r1-prefill epp/r1-decode --replicas=0") < notes.index("delete fleet/r1")


def test_a_budget_is_made_in_the_version_that_the_server_has(kinds: Cluster, namespace: str, tmp_path: Path) -> None:
    chart = Helm3(kinds, namespace, tmp_path)
    # Two replicas of a pod that nobody can start.
    chart.install({"operator": {"replicas": 2, "nodeSelector": {"nobody": "has"}}})
    assert "tandem-operator" in kinds.kubectl("get", "poddisruptionbudgets", "-n", namespace, "-o", "name")


# -- the kinds


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_server_takes_every_example_and_adds_the_defaults_that_we_foresee(
    path: Path, kinds: Cluster, namespace: str
) -> None:
    values = yaml.safe_load(path.read_text())["fleet"]
    body = resource("Fleet", values["name"], values["spec"])
    kinds.kubectl("apply", "--server-side", "-n", namespace, "-f", "-", input=body)
    fleet = kinds.get("fleets", values["name"], namespace, group=API)
    assert fleet is not None
    schema = crds.definition(crds.KINDS[0])["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    assert fleet["spec"] == with_defaults(schema["properties"]["spec"], values["spec"])


@pytest.mark.parametrize("wrong", REFUSED_BY_SCHEMA)
def test_the_server_refuses(wrong: str, kinds: Cluster, namespace: str) -> None:
    body = resource("Fleet", "r1", {**LEAST, **REFUSED_BY_SCHEMA[wrong]})
    said = kinds.kubectl("create", "--validate=false", "-n", namespace, "-f", "-", input=body, check=False)
    assert "is invalid" in said, said


@pytest.mark.parametrize("wrong", UNKNOWN)
def test_the_server_drops_unknown_fields(wrong: str, kinds: Cluster, namespace: str) -> None:
    body = resource("Fleet", "r1", {**LEAST, **UNKNOWN[wrong]})
    kinds.kubectl("create", "--validate=false", "-n", namespace, "-f", "-", input=body)
    fleet = kinds.get("fleets", "r1", namespace, group=API)
    assert fleet is not None
    assert not set(_names(UNKNOWN[wrong])) & {"prefil", "gpus_per_node", "hugepages-1Mi"} & set(_names(fleet["spec"]))


def _names(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _names(inner)


@pytest.mark.parametrize(("name", "valid"), [("a" * 32, True), ("a" * 33, False), ("1r", False)])
def test_the_server_holds_fleets_to_names_that_leave_room(
    name: str, valid: bool, kinds: Cluster, namespace: str
) -> None:
    body = resource("Fleet", name, LEAST)
    said = kinds.kubectl("create", "--validate=false", "-n", namespace, "-f", "-", input=body, check=False)
    assert ("created" in said) is valid, said


def test_null_is_taken_where_a_field_may_be_without_a_value(kinds: Cluster, namespace: str) -> None:
    spec = {
        "images": {"engine": {"name": "e", "pullPolicy": None}},
        "oidc": None,
        "decode": {"autoscaling": None, "pods": {"tolerations": [{"effect": None}]}},
    }
    body = resource("Fleet", "r1", spec)
    kinds.kubectl("create", "--validate=false", "-n", namespace, "-f", "-", input=body)


def test_a_pool_is_scaled_by_kubectl(kinds: Cluster, namespace: str) -> None:
    kinds.kubectl("create", "-n", namespace, "-f", "-", input=resource("ExpertParallelPool", "r1-decode", POOL))
    kinds.kubectl("scale", "epp/r1-decode", "--replicas=3", "-n", namespace)
    pool = kinds.get("expertparallelpools", "r1-decode", namespace, group=API)
    assert pool is not None
    assert pool["spec"]["replicas"] == 3


def test_both_pools_are_scaled_to_nothing_as_the_notes_say(kinds: Cluster, namespace: str) -> None:
    for role in ("prefill", "decode"):
        body = resource("ExpertParallelPool", f"r1-{role}", POOL | {"role": role})
        kinds.kubectl("create", "-n", namespace, "-f", "-", input=body)
    kinds.kubectl("scale", "epp/r1-prefill", "epp/r1-decode", "--replicas=0", "-n", namespace)
    for role in ("prefill", "decode"):
        pool = kinds.get("expertparallelpools", f"r1-{role}", namespace, group=API)
        assert pool is not None
        assert pool["spec"]["replicas"] == 0


SHOWN: list[tuple[str, Callable[[Cluster, str], None], list[str]]] = [
    ("flt", lambda cluster, where: _make(cluster, where, "Fleet", "r1", LEAST), ["PHASE", "GROUPS", "SLO"]),
    (
        "epp",
        lambda cluster, where: _make(cluster, where, "ExpertParallelPool", "r1-decode", POOL),
        ["ROLE", "WANTED", "READY"],
    ),
    (
        "epg",
        lambda cluster, where: _make(
            cluster,
            where,
            "ExpertParallelGroup",
            "r1-decode-0",
            POOL | {"pool": "r1-decode", "group": "decode-0", "nodes": 2, "gpusPerNode": 8, "revision": "a"},
        ),
        ["PHASE", "RANKS", "EPOCH"],
    ),
]


def _make(cluster: Cluster, namespace: str, kind: str, name: str, spec: dict[str, Any]) -> None:
    cluster.kubectl("create", "-n", namespace, "-f", "-", input=resource(kind, name, spec))


@pytest.mark.parametrize(("short", "make", "columns"), SHOWN, ids=[short for short, _, _ in SHOWN])
def test_kubectl_shows_what_matters(
    short: str, make: Callable[[Cluster, str], None], columns: list[str], kinds: Cluster, namespace: str
) -> None:
    make(kinds, namespace)
    assert set(columns) <= set(kinds.kubectl("get", short, "-n", namespace).split())
    assert kinds.kubectl("get", "tandem", "-n", namespace, "-o", "name").strip() != ""


def test_status_is_written_apart_from_the_spec(kinds: Cluster, namespace: str) -> None:
    _make(kinds, namespace, "Fleet", "r1", LEAST)
    condition = {"type": "Ready", "status": "True", "reason": "Ready", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    change = {"spec": {"paused": True}, "status": {"summary": "1/1 2/2", "conditions": [condition]}}
    where = f"/apis/{API}/namespaces/{namespace}/fleets/r1/status"
    kinds.rest.persist("PATCH", where, change, content=MERGE)
    fleet = kinds.get("fleets", "r1", namespace, group=API)
    assert fleet is not None
    assert fleet["status"]["summary"] == "1/1 2/2"
    assert fleet["spec"].get("paused") is False
    assert "1/1 2/2" in kinds.kubectl("get", "fleets", "-n", namespace)


def test_explain_tells_what_fields_are(kinds: Cluster) -> None:
    asked = ("explain", "fleet.spec.decode.rollout.maxSurge")
    kinds.wait(lambda: "Groups above" in kinds.kubectl(*asked, check=False), 30, "the server explains the kinds")
