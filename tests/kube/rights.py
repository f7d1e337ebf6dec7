"""The chart's roles for the operator, with rights that can be taken away one by one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from kube.cluster import Cluster
from kube.kubelet.rest import MERGE, Object, path
from kube.operator_world import Operator, World
from support.helm import template

ACCOUNT = "tandem-operator"
_RBAC = "rbac.authorization.k8s.io/v1"
_QUICKLY_S = 30.0


class Grant(NamedTuple):
    """One right: `patch fleets/status.tandem.dev`, or `get leases.coordination.k8s.io tandem-operator`, of one name."""

    group: str
    resource: str
    verb: str
    name: str = ""

    def __str__(self) -> str:
        whole = f"{self.verb} {self.resource}{'.' if self.group else ''}{self.group}"
        return f"{whole} {self.name}".rstrip()

    def refusal(self, namespace: str) -> re.Pattern[str]:
        """How the API server says that somebody does not have it."""
        what = re.escape(self.resource + ("." if self.group else "") + self.group)
        where = f'"{self.resource}" in API group "{self.group}" in the namespace "{namespace}"'
        said = f"cannot {self.verb} resource {re.escape(where)}"
        if self.verb == "create":  # of what an apply should have made it only says that
            said += f'|/namespaces/{namespace}/.*403: {what} "[^"]*" is forbidden: "'
        return re.compile(said)


def grant(text: str) -> Grant:
    """From what it is as a text."""
    verb, _, rest = text.partition(" ")
    what, _, name = rest.partition(" ")
    resource, _, group = what.partition(".")
    return Grant(group, resource, verb, name)


def granted(role: Object) -> set[Grant]:
    """All that a role grants, one by one."""
    return {
        Grant(group, resource, verb, name)
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
        for name in rule.get("resourceNames") or [""]
    }


def chart_roles(release: str, namespaces: Sequence[str]) -> list[Object]:
    """What the chart makes of accounts, roles and bindings for an operator in `release` that looks at `namespaces`."""
    operator = {"watchNamespaces": list(namespaces), "gangSchedulers": ["volcano"], "rayClusters": True}
    values = {"operator": operator}
    made = template(values=values, namespace=release)
    return [one for one in made if one["kind"] in ("ServiceAccount", "Role", "RoleBinding")]


class Account:
    """The operator's service account and its roles, as the chart makes them, on the server."""

    def __init__(self, cluster: Cluster, release: str, namespaces: Sequence[str]) -> None:
        self._cluster, self._release = cluster, release
        objects = chart_roles(release, namespaces)
        items = {"apiVersion": "v1", "kind": "List", "items": objects}
        cluster.kubectl("apply", "-f", "-", input=json.dumps(items))
        self._roles = {
            (one["metadata"]["namespace"], one["metadata"]["name"]): granted(one)
            for one in objects
            if one["kind"] == "Role"
        }
        self._lost: dict[str, tuple[Grant, ...]] = {}
        self.kubeconfig = cluster.service_account(ACCOUNT, release)

    def lose(self, namespace: str, *lost: Grant) -> None:
        """Let it have in a namespace what the chart grants, without these; return when that is so."""
        for (where, name), everything in self._roles.items():
            if where == namespace:
                body = {"rules": _rules(everything - set(lost))}
                where_it_is = path("roles", namespace, name, group=_RBAC)
                self._cluster.rest.persist("PATCH", where_it_is, body, content=MERGE)
        for one in {*lost, *self._lost.get(namespace, ())}:
            may = one not in lost
            self._cluster.wait(lambda one=one, may=may: self._may(namespace, one) is may, _QUICKLY_S, str(one))
        self._lost[namespace] = lost

    def _may(self, namespace: str, one: Grant) -> bool:
        resource, _, inner = one.resource.partition("/")
        attributes = {"namespace": namespace, "group": one.group, "verb": one.verb, "name": one.name}
        attributes |= {"resource": resource, "subresource": inner}
        user = f"system:serviceaccount:{self._release}:{ACCOUNT}"
        body: dict[str, Any] = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview"}
        body["spec"] = {"user": user, "resourceAttributes": attributes}
        where = path("subjectaccessreviews", group="authorization.k8s.io/v1")
        return bool(self._cluster.rest.persist("POST", where, body)["status"]["allowed"])


def _rules(grants: Iterable[Grant]) -> list[Object]:
    return [
        {
            "apiGroups": [one.group],
            "resources": [one.resource],
            "verbs": [one.verb],
            **({"resourceNames": [one.name]} if one.name else {}),
        }
        for one in sorted(grants)
    ]


class Release:
    """An operator of its own, with the namespaces that it looks at, which share one control service."""

    def __init__(self, cluster: Cluster, namespace: str, worlds: Sequence[World]) -> None:
        self.namespace = namespace
        self._worlds = worlds
        self.account = Account(cluster, namespace, [world.namespace for world in worlds])
        self.operator: Operator

    def start(self) -> None:
        """Start it. What a watch does not tell it, it does not find by listing all anew."""
        self.operator = self._worlds[0].operator(
            "--resync-seconds",
            "3600",
            kubeconfig=self.account.kubeconfig,
            namespaces=[world.namespace for world in self._worlds],
            lease_namespace=self.namespace,
        )


@dataclass(frozen=True)
class Stage:
    """One of a release's namespaces, with a Fleet."""

    world: World
    release: Release

    def without(self, *rights: Grant) -> int:
        """Let the operator have all rights here but these; return how long its log is now."""
        self.release.account.lose(self.world.namespace, *rights)
        return len(self.release.operator.written())

    def refused(self, right: Grant, since: int = 0, namespace: str = "") -> None:
        """Wait until the operator says, after that point of its log, that it was refused for want of a right."""
        said = right.refusal(namespace or self.world.namespace)

        def told() -> bool:
            if right.resource == "podgroups":  # it goes on without, and says so of the group
                condition = self.world.condition("ExpertParallelGroup/f-prefill-0", "Degraded")
                return f"the operator may not make {right.resource}.{right.group}" in condition.get("message", "")
            if right.resource == "fleets" and right.verb == "patch":
                return self.world.condition("Fleet/guest", "Valid").get("reason") == "NotAllowed"
            return bool(said.search(self.release.operator.written(since).replace('\\"', '"')))  # it writes JSON

        self.world.wait(told, f"it may not {right}")
