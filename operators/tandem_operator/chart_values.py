"""The chart's values as classes; helm/tandem/values.schema.json comes from them.

    python -m tandem_operator.chart_values [FILE]            write it
    python -m tandem_operator.chart_values --check [FILE]    say whether it differs from the classes: exit with 1

Helm checks values against it, so that a typing error is answered before anything is installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from tandem.config import Section
from tandem_operator.api.fleet import FleetSpec, SecretKey
from tandem_operator.api.pods import Resources
from tandem_operator.json_schema import CLASS, whole_schema

FILE = Path("helm/tandem/values.schema.json")

Namespace = Annotated[str, Field(pattern=r"^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?|\*)$")]
Wish = Literal["auto", "always", "never"]


class OperatorImage(Section):
    """The operator's image (operators/Dockerfile)."""

    name: str = Field("", description="With tag or digest; empty = tandem-operator:<the chart's appVersion>.")
    pull_policy: Literal["", "Always", "IfNotPresent", "Never"] = Field("", description="Empty = Kubernetes' default.")
    pull_secrets: tuple[str, ...] = Field((), description="Names of Secrets in the release's namespace.")


class ServiceAccount(Section):
    """The operator's."""

    create: bool = Field(True, description="False = it is there already, with its rights.")
    name: str = Field("", description="Empty = named like the operator.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Such as a cloud's role.")


class Operator(Section):
    """The operator's Deployment."""

    create: bool = Field(True, description="False = another release has one that looks at this namespace.")
    image: OperatorImage = Field(default_factory=OperatorImage)
    replicas: int = Field(2, ge=0, le=5, description="One acts, the others take over.")
    watch_namespaces: tuple[Namespace, ...] = Field(
        (), description='Where fleets may be; none = the release\'s own namespace, "*" alone = all (a ClusterRole).'
    )
    rbac: bool = Field(True, description="Make its roles and bindings.")
    gang_schedulers: tuple[Literal["volcano", "coscheduling"], ...] = Field(
        (), description="Those whose PodGroups it may write."
    )
    ray_clusters: bool = Field(
        False, description="It may hold Fleets with ray.address until they have left that Ray cluster (patch fleets)."
    )
    service_account: ServiceAccount = Field(default_factory=ServiceAccount)
    resources: Resources = Field(default_factory=Resources, description="Of its container.")
    run_as_user: int = Field(65532, ge=1, description="Never root.")
    labels: dict[str, str] = Field(default_factory=dict, description="Further labels of its pods.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Of its pods.")
    node_selector: dict[str, str] = Field(default_factory=dict, description="Labels that a node must have.")
    tolerations: tuple[dict[str, Any], ...] = Field((), description="As Kubernetes has them.")
    affinity: dict[str, Any] = Field(default_factory=dict, description="As Kubernetes has it.")
    priority_class_name: str = Field("", description="Empty = the cluster's default.")


class People(Section):
    """Rights of people."""

    aggregate: bool = Field(True, description="Kubernetes' own roles view, edit and admin include fleets.")


class ChartFleet(Section):
    """A Fleet that the release has."""

    create: bool = Field(False, description="False = fleets are applied by themselves.")
    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,30}[a-z0-9])?$")] = Field(
        "r1", description="Its Service is named so, and everything else begins so."
    )
    spec: FleetSpec | None = Field(None, description="Of the Fleet: kubectl explain fleet.spec.")


class NetworkPolicies(Section):
    """Who may talk to whom. Peers are NetworkPolicyPeers, as Kubernetes has them. Pods of host networks have none."""

    create: bool = Field(True, description="For the operator, and for the pods of the release's fleet.")
    clients: tuple[dict[str, Any], ...] = Field((), description="Who may talk to the gateway; none = everyone.")
    monitoring: tuple[dict[str, Any], ...] = Field(
        (),
        description="Who may read metrics; none = everyone, but of gateways only their clients, where these are named.",
    )
    operators: tuple[dict[str, Any], ...] = Field(
        (), description="Who may steer the fleet (FleetControl), beside the release's own operator."
    )
    nodes: tuple[Annotated[str, Field(pattern=r"^[0-9a-fA-F.:]+/[0-9]{1,3}$")], ...] = Field(
        (), description="Networks (CIDR) of the nodes whose engines have hostNetwork: they count as the fleet's pods."
    )


class Monitoring(Section):
    """For Prometheus' operator and Grafana's sidecar. auto = where the cluster has monitoring.coreos.com."""

    pod_monitors: Wish = Field("auto", description="Of the operator and of all gateways in the release's namespace.")
    rules: Wish = Field("auto", description="Alerts (PrometheusRule).")
    dashboards: Wish = Field("auto", description="Grafana dashboards in a ConfigMap.")
    labels: dict[str, str] = Field(default_factory=dict, description="By which a Prometheus chooses its objects.")
    dashboard_labels: dict[str, str] = Field(
        default_factory=lambda: {"grafana_dashboard": "1"}, description="By which Grafana's sidecar finds dashboards."
    )
    interval: Annotated[str, Field(pattern=r"^[0-9]+(ms|s|m)$")] = Field("15s", description="Between two scrapes.")


class ChartTest(Section):
    """`helm test`: one answer from the release's fleet."""

    question: str = Field("Say one word.", min_length=1, description="What it asks.")
    key_secret: SecretKey | None = Field(None, description="Secret with the API key; none = none is needed.")
    run_as_user: int = Field(65532, ge=1, description="Never root.")


class Values(Section):
    """Values of the chart."""

    operator: Operator = Field(default_factory=Operator)
    people: People = Field(default_factory=People)
    fleet: ChartFleet = Field(default_factory=ChartFleet)
    network_policies: NetworkPolicies = Field(default_factory=NetworkPolicies)
    monitoring: Monitoring = Field(default_factory=Monitoring)
    test: ChartTest = Field(default_factory=ChartTest)
    global_: dict[str, Any] = Field(default_factory=dict, alias="global", description="Helm's own.")


def values_schema() -> dict[str, Any]:
    """The values' JSON schema, draft 7, as Helm 3 and 4 read it."""
    schema: dict[str, Any] = _helms(whole_schema(Values))
    # Whether an image is needed depends on fleet.create: the template asks for it.
    spec = schema["properties"]["fleet"]["properties"]["spec"]
    choices = spec.get("anyOf", [spec])
    for choice in choices:
        if "required" in choice:
            choice["required"] = [name for name in choice["required"] if name != "images"]
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": "Values of Tandem's chart", **schema}


def _helms(node: Any) -> Any:
    """Without what is Kubernetes' own."""
    if isinstance(node, list):
        return [_helms(part) for part in node]
    if not isinstance(node, dict):
        return node
    rest = {name: _helms(part) for name, part in node.items() if name != CLASS and not name.startswith("x-kubernetes-")}
    if "patternProperties" in rest:
        rest["additionalProperties"] = False
    if not node.get("x-kubernetes-int-or-string"):
        return rest
    pattern = rest.pop("pattern")
    return {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": pattern}], **rest}


def content() -> str:
    """The file."""
    return json.dumps(values_schema(), indent=1, ensure_ascii=False) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Write or check; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tandem_operator.chart_values", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=FILE)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if it differs")
    options = parser.parse_args(arguments)
    if not options.check:
        options.file.write_text(content(), encoding="utf-8")
        return 0
    if options.file.exists() and options.file.read_text(encoding="utf-8") == content():
        return 0
    print(f"{options.file} differs from the classes: run python -m tandem_operator.chart_values", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
