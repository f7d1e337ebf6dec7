"""What Helm 3 and Helm 4 make of the chart: valid for every Kubernetes, and no more rights than are needed."""

from __future__ import annotations

import base64
import functools
import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helm_python import Chart, HelmError, lint
from kubernetes_validate import utils as validation

from kube.kubelet.volumes import Volumes
from support.helm import CHART, EXAMPLES, documents, helm, template
from support.helm import HelmError as Helm3Error
from tandem_operator import names
from tandem_operator.api.fleet import FleetSpec

pytestmark = pytest.mark.timeout(300)

VERSIONS = ("1.28", "1.29", "1.30", "1.31", "1.32", "1.33", "1.34", "1.35", "1.36", "1.37")
PROMETHEUS = ("monitoring.coreos.com/v1/PodMonitor", "monitoring.coreos.com/v1/PrometheusRule")
MONITORED = {"monitoring": dict.fromkeys(("podMonitors", "rules", "dashboards"), "always")}
FLEET = {"fleet": {"create": True, "spec": {"images": {"engine": {"name": "engine:1"}}}}}
EVERYWHERE = {"operator": {"watchNamespaces": ["*"], "gangSchedulers": ["volcano", "coscheduling"]}}

Object = dict[str, Any]


def kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [obj for obj in objects if obj["kind"] in kinds]


def only(objects: list[Object], kind_: str, **labels: str) -> Object:
    found = [
        obj
        for obj in kind(objects, kind_)
        if all(obj["metadata"].get("labels", {}).get(f"app.kubernetes.io/{key}") == labels[key] for key in labels)
    ]
    assert len(found) == 1, f"{len(found)} of {kind_} {labels}"
    return found[0]


def example(name: str) -> Path:
    return CHART / "examples" / f"{name}.yaml"


@functools.cache
def everything() -> tuple[str, ...]:
    """Every object, as JSON, that some values make, once."""
    cases: list[list[Object]] = [template(crds=True), template(values=MONITORED | EVERYWHERE | FLEET)]
    cases += [template(example=path) for path in EXAMPLES]
    return tuple(sorted({json.dumps(obj, sort_keys=True) for case in cases for obj in case}))


# -- lint and schemas


@pytest.mark.parametrize("path", [None, *EXAMPLES], ids=lambda path: path.stem if path else "default")
def test_helm_3_finds_nothing(path: Path | None) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", CHART, *(["-f", path] if path else []))


@pytest.mark.parametrize("path", [None, *EXAMPLES], ids=lambda path: path.stem if path else "default")
def test_helm_4_finds_nothing(path: Path | None) -> None:
    report = lint(CHART, yaml.safe_load(path.read_text()) if path else None, strict=True, kube_version="v1.34.0")
    assert report["errors"] == []


@pytest.fixture
def read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each schema is read once, not for each object."""
    monkeypatch.setattr(validation, "schema_contents", _schema_contents)


_schema_contents = functools.cache(validation.schema_contents)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.usefixtures("read_once")
def test_every_object_is_valid_by_the_strict_schemas_of_kubernetes(version: str) -> None:
    own = set()
    for text in everything():
        obj = json.loads(text)
        try:
            kubernetes_validate.validate(obj, version, strict=True)
        except kubernetes_validate.SchemaNotFoundError:
            own.add((obj["apiVersion"], obj["kind"]))
    prometheus = {("monitoring.coreos.com/v1", kind_) for kind_ in ("PodMonitor", "PrometheusRule")}
    assert own == {("tandem.dev/v1alpha1", "Fleet")} | prometheus


@pytest.mark.usefixtures("read_once")
def test_a_mistake_would_be_found() -> None:
    deployment = only(template(), "Deployment")
    deployment["spec"]["template"]["spec"]["containers"][0]["readinessProb"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, "1.34", strict=True)


@pytest.mark.parametrize("path", [None, *EXAMPLES], ids=lambda path: path.stem if path else "default")
def test_helm_3_and_helm_4_make_the_same(path: Path | None) -> None:
    with Chart.load(CHART) as chart:
        values = yaml.safe_load(path.read_text()) if path else {}
        rendered = chart.render(values, name="tandem", namespace="inference")
    by_4 = [obj for name, text in rendered.items() if name.endswith(".yaml") for obj in documents(text)]
    by_3 = template(example=path)

    def as_text(objects: list[Object]) -> list[str]:
        return sorted(json.dumps(obj, sort_keys=True).replace("Helm 4", "Helm") for obj in objects)

    assert as_text(by_4) == as_text(by_3)


def test_the_crds_are_installed_first() -> None:
    assert {obj["metadata"]["name"] for obj in kind(template(crds=True), "CustomResourceDefinition")} == {
        "fleets.tandem.dev",
        "expertparallelpools.tandem.dev",
        "expertparallelgroups.tandem.dev",
    }


# -- values


WRONG = [
    ({"operatr": {}}, "operatr"),
    ({"operator": {"replica": 2}}, "replica"),
    ({"fleet": {"spec": {"prefill": {"node": 4}}}}, "node"),
    ({"monitoring": {"rules": "sometimes"}}, "rules"),
]


@pytest.mark.parametrize(("values", "says"), WRONG)
def test_helm_3_refuses_typing_errors(values: Object, says: str) -> None:
    with pytest.raises(Helm3Error, match=says):
        template(values=values)


@pytest.mark.parametrize(("values", "says"), WRONG)
def test_helm_4_refuses_typing_errors(values: Object, says: str) -> None:
    with Chart.load(CHART) as chart, pytest.raises(HelmError, match=says):
        chart.render(values, name="tandem", namespace="inference")


def test_a_fleet_without_an_image_is_refused_and_the_error_says_which_value() -> None:
    with pytest.raises(Helm3Error, match=r"fleet\.spec\.images\.engine\.name is needed"):
        template(values={"fleet": {"create": True}})


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_fleet_is_what_the_values_say_and_survives_the_release(path: Path) -> None:
    fleet = only(template(example=path), "Fleet")
    wanted = yaml.safe_load(path.read_text())["fleet"]
    assert fleet["metadata"]["name"] == wanted["name"]
    assert FleetSpec.model_validate(fleet["spec"]) == FleetSpec.model_validate(wanted["spec"])
    assert fleet["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


# -- rights


def rules(objects: list[Object], *kinds: str) -> list[Object]:
    return [rule for role in kind(objects, *kinds) for rule in role["rules"]]


def operators(objects: list[Object]) -> list[Object]:
    return [obj for obj in objects if obj["metadata"]["labels"].get("app.kubernetes.io/component") == "operator"]


@pytest.mark.parametrize(
    ("watched", "where"), [([], ["inference"]), (["a", "b"], ["a", "b"])], ids=["its own", "those that are named"]
)
def test_the_operator_has_rights_in_the_namespaces_that_it_looks_at(watched: list[str], where: list[str]) -> None:
    objects = operators(template(values={"operator": {"watchNamespaces": watched}}))
    assert kind(objects, "ClusterRole", "ClusterRoleBinding") == []
    fleets = [role for role in kind(objects, "Role") if not role["metadata"]["name"].endswith("-leader")]
    assert [role["metadata"]["namespace"] for role in fleets] == where
    environment = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "TANDEM_OPERATOR_NAMESPACES", "value": ",".join(where)} in environment


def test_a_cluster_role_is_made_only_for_an_operator_that_looks_everywhere() -> None:
    objects = operators(template(values=EVERYWHERE))
    assert len(kind(objects, "ClusterRole")) == len(kind(objects, "ClusterRoleBinding")) == 1
    assert [role["metadata"]["name"] for role in kind(objects, "Role")] == ["tandem-operator-leader"]


def test_every_binding_is_of_a_role_and_an_account_that_exist() -> None:
    for values in ({}, EVERYWHERE, {"operator": {"watchNamespaces": ["a", "b"]}}):
        objects = template(values=values)
        roles = {(obj["kind"], obj["metadata"]["name"]) for obj in kind(objects, "Role", "ClusterRole")}
        account = only(objects, "ServiceAccount")["metadata"]
        for binding in kind(objects, "RoleBinding", "ClusterRoleBinding"):
            assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in roles
            assert binding["subjects"] == [
                {"kind": "ServiceAccount", "name": account["name"], "namespace": account["namespace"]}
            ]


def test_the_operators_rights_name_everything_and_touch_no_secrets_and_change_no_pods() -> None:
    for rule in rules(operators(template(values=EVERYWHERE)), "Role", "ClusterRole"):
        said = [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        assert "*" not in said
        assert not {"secrets", "nodes", "namespaces", "roles"} & set(rule["resources"])
        assert "pods" not in rule["resources"] or set(rule["verbs"]) == {"list", "watch"}


def test_without_rbac_or_account_of_its_own_none_is_made() -> None:
    values = {"operator": {"rbac": False, "serviceAccount": {"create": False, "name": "theirs"}}}
    objects = operators(template(values=values))
    assert kind(objects, "Role", "RoleBinding", "ServiceAccount") == []
    assert only(objects, "Deployment")["spec"]["template"]["spec"]["serviceAccountName"] == "theirs"


def test_people_who_may_view_cannot_change() -> None:
    view = next(obj for obj in kind(template(), "ClusterRole") if obj["metadata"]["name"].endswith("-view"))
    assert {verb for rule in view["rules"] for verb in rule["verbs"]} == {"get", "list", "watch"}
    assert kind(template(values={"people": {"aggregate": False}}), "ClusterRole") == []


@pytest.mark.parametrize(
    ("resource", "verbs"),
    [
        ("fleets", {"create", "update", "patch", "delete"}),
        ("expertparallelpools/scale", {"get", "patch"}),
        ("expertparallelgroups", {"patch", "delete"}),
    ],
)
def test_people_who_may_edit_can_do_what_the_documentation_tells_them_to(resource: str, verbs: set[str]) -> None:
    edit = next(obj for obj in kind(template(), "ClusterRole") if obj["metadata"]["name"].endswith("-edit"))
    assert verbs <= {verb for rule in edit["rules"] if resource in rule["resources"] for verb in rule["verbs"]}


# -- pods


def pods() -> list[Object]:
    objects = template(values=FLEET)
    return [only(objects, "Deployment")["spec"]["template"]["spec"], only(objects, "Pod")["spec"]]


def test_every_pod_is_restricted_as_the_pod_security_standards_say() -> None:
    for spec in pods():
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            rights = container["securityContext"]
            assert rights["allowPrivilegeEscalation"] is False
            assert rights["readOnlyRootFilesystem"] is True
            assert rights["capabilities"] == {"drop": ["ALL"]}
        assert {tuple(volume)[1] for volume in spec["volumes"]} <= {"emptyDir", "secret"}


def test_no_pod_runs_a_script() -> None:
    for spec in pods():
        for container in spec["containers"]:
            assert container["command"][0] in ("tandem", "tandem-operator")


def test_the_operator_is_probed_where_it_answers() -> None:
    (container,) = only(template(), "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["tandem-operator", "run"]
    assert container["ports"] == [{"name": "metrics", "containerPort": 8080}]
    assert {container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("readiness", "liveness")} == {
        "/readyz",
        "/healthz",
    }


def test_one_operator_alone_has_no_budget_which_would_hold_back_every_node_drain() -> None:
    assert kind(template(values={"operator": {"replicas": 1}}), "PodDisruptionBudget") == []
    assert only(template(), "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1


def test_helm_test_asks_the_gateway_as_the_fleet_has_it() -> None:
    command = only(template(example=example("r1-4p-18d")), "Pod")["spec"]["containers"][0]["command"]
    assert command[:4] == ["tandem", "chat", "--url", "https://r1.inference.svc:8000"]
    (container,) = only(template(example=example("r1-4p-18d")), "Pod")["spec"]["containers"]
    assert {entry["name"] for entry in container["env"]} == {"HOME", "TANDEM_API_KEY", "TANDEM_CA"}


def trusted_by_helm_test(folder: Path, secret: dict[str, str] | None) -> str | None:
    """What the pod verifies the gateway's certificate by, for a `tlsSecret` with this data; None = no file."""
    pod = only(template(example=example("r1-4p-18d")), "Pod")
    (container,) = pod["spec"]["containers"]
    data = {key: base64.b64encode(text.encode()).decode() for key, text in (secret or {}).items()}
    volumes = Volumes(folder)
    volumes.prepare(
        pod, lambda kind, name: None if secret is None else {"data": data}, lambda asked: "", lambda name: None, {}
    )
    (ca,) = [entry["value"] for entry in container["env"] if entry["name"] == "TANDEM_CA"]
    (source,) = [mount["source"] for mount in volumes.mounts(container) if mount["target"] == str(Path(ca).parent)]
    file = Path(str(source)) / Path(ca).name
    return file.read_text() if file.exists() else None


@pytest.mark.parametrize(
    ("secret", "trusted"),
    [
        pytest.param({"tls.crt": "its own", "tls.key": "secret", "ca.crt": "the CA"}, "the CA", id="with its CA"),
        pytest.param({"tls.crt": "its own", "tls.key": "secret"}, "its own", id="without"),
        pytest.param(None, None, id="not there"),
    ],
)
def test_helm_test_verifies_the_gateway_by_what_the_secret_has(
    tmp_path: Path, secret: dict[str, str] | None, trusted: str | None
) -> None:
    # Without the file `tandem chat` says that it cannot be read: the pod neither hangs nor trusts just anyone.
    assert trusted_by_helm_test(tmp_path, secret) == trusted


# -- network policies


def test_policies_select_the_pods_that_the_operator_makes() -> None:
    objects = template(values=FLEET)
    for part in ("engine", "head", "redis", "gateway"):
        labels = names.labels("r1", part)
        selected = [
            policy
            for policy in kind(objects, "NetworkPolicy")
            if policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
        ]
        assert len(selected) == 1, part


def sources(policy: str) -> list[Object]:
    found = [obj for obj in kind(template(values=FLEET), "NetworkPolicy") if obj["metadata"]["name"] == policy]
    entries: list[Object] = found[0]["spec"]["ingress"]
    return entries


def test_only_the_fleet_talks_to_engines() -> None:
    assert sources("r1-engines") == [{"from": [{"podSelector": {"matchLabels": {names.FLEET_LABEL: "r1"}}}]}]


def test_only_head_and_gateways_talk_to_redis() -> None:
    (entry,) = sources("r1-redis")
    assert entry["ports"] == [{"port": names.REDIS_PORT, "protocol": "TCP"}]
    (peer,) = entry["from"]
    assert peer["podSelector"]["matchExpressions"][0]["values"] == ["head", "gateway"]


def test_only_the_fleet_and_the_operator_steer_it() -> None:
    of_fleet, of_operator = sources("r1-head")
    assert of_fleet["from"] == [{"podSelector": {"matchLabels": {names.FLEET_LABEL: "r1"}}}]
    assert of_operator["ports"] == [{"port": names.CONTROL_PORT, "protocol": "TCP"}]
    labels = only(template(), "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert of_operator["from"][0]["podSelector"]["matchLabels"].items() <= labels.items()


def test_clients_may_be_named() -> None:
    policies = kind(template(example=example("r1-4p-18d")), "NetworkPolicy")
    gateway = next(obj for obj in policies if obj["metadata"]["name"] == "r1-gateway")
    peers = gateway["spec"]["ingress"][1]["from"]
    assert [peer["namespaceSelector"]["matchLabels"] for peer in peers if "namespaceSelector" in peer] == [
        {"tandem.dev/client": "true"},
        {"kubernetes.io/metadata.name": "monitoring"},
    ]


def test_the_pod_of_helm_test_is_among_the_clients() -> None:
    objects = template(example=example("r1-4p-18d"))
    labels = only(objects, "Pod")["metadata"]["labels"]
    gateway = next(obj for obj in kind(objects, "NetworkPolicy") if obj["metadata"]["name"] == "r1-gateway")
    (peer,) = [one for one in gateway["spec"]["ingress"][1]["from"] if "podSelector" in one]
    assert peer["podSelector"]["matchLabels"].items() <= labels.items()


def test_nodes_of_engines_with_the_hosts_network_count_as_the_fleets_but_not_for_redis() -> None:
    objects = template(values=FLEET | {"networkPolicies": {"nodes": ["10.1.0.0/16", "fd00::/64"]}})
    nodes = [{"ipBlock": {"cidr": "10.1.0.0/16"}}, {"ipBlock": {"cidr": "fd00::/64"}}]
    admitted = {
        obj["metadata"]["name"]: [peer for peer in obj["spec"]["ingress"][0].get("from", ()) if "ipBlock" in peer]
        for obj in kind(objects, "NetworkPolicy")
        if obj["metadata"]["name"].startswith("r1-")
    }
    assert admitted == {"r1-engines": nodes, "r1-head": nodes, "r1-gateway": nodes, "r1-redis": []}


# -- what is there only with an API


def test_monitors_and_dashboards_are_made_where_prometheus_operator_is() -> None:
    assert len(kind(template(values=FLEET, apis=PROMETHEUS), "PodMonitor", "PrometheusRule")) == 3
    dashboards = only(template(apis=PROMETHEUS), "ConfigMap")
    assert dashboards["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert dashboards["data"].keys() == {"gateway.json", "fleets.json"}
    assert all(json.loads(text)["panels"] for text in dashboards["data"].values())


def test_nothing_of_it_is_made_elsewhere_unless_it_is_asked_for() -> None:
    assert kind(template(values=FLEET), "PodMonitor", "PrometheusRule", "ConfigMap") == []
    assert len(kind(template(values=MONITORED), "PodMonitor", "PrometheusRule", "ConfigMap")) == 4
    never = {"monitoring": dict.fromkeys(("podMonitors", "rules", "dashboards"), "never")}
    assert kind(template(values=never, apis=PROMETHEUS), "PodMonitor", "PrometheusRule", "ConfigMap") == []


def test_alerts_reach_prometheus_as_they_are_written() -> None:
    (rule,) = kind(template(values=MONITORED), "PrometheusRule")
    assert rule["spec"]["groups"] == yaml.safe_load((CHART / "alerts" / "tandem.yaml").read_text())


def test_labels_of_a_metrics_own_stay_where_prometheus_has_one_of_that_name() -> None:
    # `namespace` is a Fleet's, not that of the operator's pod; `endpoint` is what was asked, not the name of a port.
    monitors = kind(template(apis=PROMETHEUS), "PodMonitor")
    assert len(monitors) == 2
    assert [entry["honorLabels"] for one in monitors for entry in one["spec"]["podMetricsEndpoints"]] == [True, True]


def test_the_metrics_of_gateways_say_by_a_label_which_fleets_they_are() -> None:
    monitors = {one["metadata"]["name"]: one["spec"] for one in kind(template(apis=PROMETHEUS), "PodMonitor")}
    assert monitors["tandem-gateways"]["podTargetLabels"] == [names.FLEET_LABEL]
    # As Prometheus' operator writes it, and as alerts and dashboards know it.
    assert re.sub(r"\W", "_", names.FLEET_LABEL) == "tandem_dev_fleet"


def test_gateways_are_scraped_by_the_port_that_their_pods_have() -> None:
    monitor = next(
        obj for obj in kind(template(apis=PROMETHEUS), "PodMonitor") if obj["metadata"]["name"].endswith("-gateways")
    )
    assert monitor["spec"]["selector"]["matchLabels"].items() <= names.labels("r1", "gateway").items()
    assert [entry["port"] for entry in monitor["spec"]["podMetricsEndpoints"]] == ["http"]
