"""Amounts of resources, as Kubernetes writes them."""

from __future__ import annotations

from collections import defaultdict
from fractions import Fraction

from kube.kubelet.rest import Object

_SUFFIXES = {
    **{unit: Fraction(1000) ** (place + 1) for place, unit in enumerate(("k", "M", "G", "T", "P", "E"))},
    **{unit: Fraction(1024) ** (place + 1) for place, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"))},
    "m": Fraction(1, 1000),
    "u": Fraction(1, 10**6),
    "n": Fraction(1, 10**9),
}


def parse(text: str | int | float) -> Fraction:
    """The number that `500m`, `64Gi` or `8` stands for. Raises ValueError."""
    written = str(text)
    for suffix in sorted(_SUFFIXES, key=len, reverse=True):
        if written.endswith(suffix):
            return Fraction(written.removesuffix(suffix)) * _SUFFIXES[suffix]
    return Fraction(written)


def requests(pod: Object) -> defaultdict[str, Fraction]:
    """What a pod asks of a node: the sum over its containers, or an init container's if that is more."""
    total: defaultdict[str, Fraction] = defaultdict(Fraction)
    for container in pod["spec"]["containers"]:
        for name, amount in _of(container).items():
            total[name] += amount
    for container in pod["spec"].get("initContainers", []):
        for name, amount in _of(container).items():
            total[name] = max(total[name], amount)
    total["pods"] = Fraction(1)
    return total


def _of(container: Object) -> dict[str, Fraction]:
    resources = container.get("resources", {})
    asked = {**resources.get("limits", {}), **resources.get("requests", {})}
    return {name: parse(amount) for name, amount in asked.items()}
