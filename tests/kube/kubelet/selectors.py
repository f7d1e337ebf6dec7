"""Whether labels fit a selector."""

from __future__ import annotations

from collections.abc import Mapping

from kube.kubelet.rest import Object

Labels = Mapping[str, str]


def expression_fits(expression: Object, labels: Labels) -> bool:
    """One requirement of matchExpressions. Raises ValueError for an unknown operator."""
    key, operator, values = expression["key"], expression["operator"], expression.get("values", [])
    match operator:
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
        case "Gt" | "Lt":
            if not labels.get(key, "").lstrip("-").isdigit():
                return False
            mine, bound = int(labels[key]), int(values[0])
            return mine > bound if operator == "Gt" else mine < bound
    raise ValueError(f"operator {operator} of a selector is not known")


def selector_fits(selector: Object | None, labels: Labels) -> bool:
    """A labelSelector: nothing fits None, everything fits an empty one."""
    if selector is None:
        return False
    wanted = selector.get("matchLabels", {}).items()
    return all(labels.get(key) == value for key, value in wanted) and all(
        expression_fits(one, labels) for one in selector.get("matchExpressions", [])
    )


def node_term_fits(term: Object, node: Object) -> bool:
    """A term of node affinity: labels, and the node's name by matchFields."""
    expressions, fields = term.get("matchExpressions", []), term.get("matchFields", [])
    if not expressions and not fields:
        return False
    meta = node["metadata"]
    names = {"metadata.name": meta["name"]}
    return all(expression_fits(one, meta.get("labels", {})) for one in expressions) and all(
        expression_fits(one, names) for one in fields
    )


def tolerates(pod: Object, taint: Object) -> bool:
    """Whether a pod bears a taint."""
    for toleration in pod["spec"].get("tolerations", []):
        effect, key = toleration.get("effect"), toleration.get("key")
        if effect and effect != taint["effect"]:
            continue
        if key and key != taint["key"]:
            continue
        if toleration.get("operator", "Equal") == "Exists" or toleration.get("value", "") == taint.get("value", ""):
            return True
    return False
