"""What service accounts asked the API server for, from its audit log."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

POLICY: dict[str, Any] = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [{"level": "Metadata", "userGroups": ["system:serviceaccounts"]}, {"level": "None"}],
}
"""Service accounts alone; a watch is noted when it ends."""


class Right(NamedTuple):
    """Something that a role grants, or that a request needs."""

    group: str
    resource: str
    """With its subresource, as roles have it: fleets/status."""
    verb: str

    def __str__(self) -> str:
        return f"{self.verb} {self.resource}{'.' if self.group else ''}{self.group}"


class Request(NamedTuple):
    """What somebody asked for."""

    right: Right
    namespace: str
    """Empty: of the whole cluster."""
    name: str
    status: int
    """Of the answer, as HTTP has it."""
    allowed: bool
    """Whether the account has the right, as the server knows it then. It may still refuse: by admission."""

    def __str__(self) -> str:
        return f"{self.right} {self.namespace}/{self.name}: {self.status}"


def requests(log: Path, account: str, namespace: str) -> Iterator[Request]:
    """What a service account asked for."""
    user = f"system:serviceaccount:{namespace}:{account}"
    for line in log.read_text().splitlines():
        if user not in line:
            continue  # most are others', and the log is long
        event = json.loads(line)
        reference = event.get("objectRef")
        if event["user"]["username"] != user or not reference or "resource" not in reference:
            continue  # others', and questions about which kinds there are
        inner = f"/{reference['subresource']}" if reference.get("subresource") else ""
        right = Right(reference.get("apiGroup", ""), reference["resource"] + inner, event["verb"])
        status = int(event.get("responseStatus", {}).get("code", 0))
        allowed = event.get("annotations", {}).get("authorization.k8s.io/decision") == "allow"
        request = Request(right, reference.get("namespace", ""), reference.get("name", ""), status, allowed)
        yield request
        if right.verb == "patch" and status == 201:  # to apply what is not there yet needs both rights
            yield request._replace(right=right._replace(verb="create"))


def roles_of(made: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The roles that a release of the chart binds to its operator's account."""
    bound = [one["roleRef"] for one in made if one["kind"] in ("RoleBinding", "ClusterRoleBinding")]
    names = {(one["kind"], one["name"]) for one in bound}
    return [one for one in made if (one["kind"], one["metadata"]["name"]) in names]


def lacking(asked: Iterable[Request], roles: Iterable[dict[str, Any]], namespaces: Iterable[str]) -> list[str]:
    """What was refused in these namespaces, or of the whole cluster.

    Left out is a right that a role grants, and that the account had there at another time: an API server that has just
    started refuses it until it knows its roles.
    """
    known, places = list(roles), {"", *namespaces}
    every = [one for one in asked if one.namespace in places]
    had = {(one.right, one.namespace) for one in every if one.allowed}
    return sorted(
        {
            str(one)
            for one in every
            if one.status in (401, 403)
            and (one.allowed or (one.right, one.namespace) not in had or not any(_grants(role, one) for role in known))
        }
    )


def _grants(role: dict[str, Any], request: Request) -> bool:
    if role["kind"] == "Role" and role["metadata"]["namespace"] != request.namespace:
        return False
    right = request.right
    return any(
        right.group in rule["apiGroups"]
        and right.resource in rule["resources"]
        and right.verb in rule["verbs"]
        and ("resourceNames" not in rule or request.name in rule["resourceNames"])
        for rule in role["rules"]
    )


def granted(roles: list[dict[str, Any]]) -> set[Right]:
    """All that roles grant, one by one."""
    return {
        Right(group, resource, verb)
        for role in roles
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
