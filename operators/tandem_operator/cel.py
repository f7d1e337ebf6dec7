"""Rules between fields in CEL, by class: servers that know it (Kubernetes 1.25 and later) refuse the resource at once.

The same rules hold without them: the operator reads every resource with the same classes, and says in the condition
`Valid` what is wrong. Only what the classes cannot say is here and nowhere else: that some fields never change.
"""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """One entry of x-kubernetes-validations."""

    expression: str
    message: str

    def as_json(self) -> dict[str, str]:
        return {"rule": self.expression, "message": self.message}


def _never_changes(field: str) -> Rule:
    return Rule(f"self.{field} == oldSelf.{field}", f"{field} cannot be changed: make another")


RULES: dict[str, tuple[Rule, ...]] = {
    "AutoscalingConfig": (
        Rule("self.minGroups <= self.maxGroups", "minGroups is above maxGroups"),
        Rule(
            "!has(self.schedule) || self.schedule.all(w, w.minGroups <= self.maxGroups)",
            "a schedule asks for more groups than maxGroups",
        ),
    ),
    "ModelVolume": (Rule("!(has(self.claim) && has(self.hostPath))", "give claim or hostPath, not both"),),
    "Rollout": (
        Rule(
            "self.maxSurge > 0 || self.maxUnavailable > 0",
            "maxSurge and maxUnavailable cannot both be 0: no group could be replaced",
        ),
    ),
    "PoolSpec": (_never_changes("fleet"), _never_changes("role")),
    "GroupSpec": tuple(map(_never_changes, ("fleet", "pool", "role", "group", "nodes", "gpusPerNode"))),
}
"""By the name of the class. Defaults are in place when a rule is read."""
