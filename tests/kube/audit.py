"""What service accounts asked the API server for, from its audit log."""

from __future__ import annotations

import json
from collections.abc import Iterator
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


def requests(log: Path, account: str, namespace: str) -> Iterator[tuple[Right, int]]:
    """What a service account asked for, and the HTTP status of each answer."""
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
        answer = event.get("responseStatus", {})
        if "because it is being terminated" in answer.get("message", ""):
            continue  # nobody may make anything in a namespace that goes, such as that of the test before
        status = int(answer.get("code", 0))
        yield right, status
        if right.verb == "patch" and status == 201:  # to apply what is not there yet needs both rights
            yield right._replace(verb="create"), status


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
