"""What a pod's /etc/hosts says: the cluster's names. Pure.

There is no DNS server. Names are those of Services (with a ClusterIP: that; headless: every ready address), and of pods
with a hostname under a headless Service. Short names are those of the pod's own namespace.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from kube.kubelet.rest import Object

DOMAIN = "cluster.local"
_FIXED = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"


def hosts(
    services: Sequence[Object],
    endpoints: Sequence[Object],
    namespace: str,
    own: tuple[str, str],
    aliases: Sequence[Object],
) -> str:
    """The file for a pod of a namespace: `own` is its address and name, `aliases` its spec's hostAliases."""
    lines = [f"{own[0]} {own[1]}"]
    lines += [f"{alias['ip']} {' '.join(alias.get('hostnames', []))}" for alias in aliases]
    by_key = {(one["metadata"]["namespace"], one["metadata"]["name"]): one for one in endpoints}
    for service in services:
        space, name = service["metadata"]["namespace"], service["metadata"]["name"]
        address = service["spec"].get("clusterIP")
        if service["spec"].get("type") == "ExternalName" or not address:
            continue
        if address != "None":
            lines.append(f"{address} {' '.join(_forms(name, space, namespace))}")
            continue
        for ip, hostname in _addresses(by_key.get((space, name), {})):
            forms = _forms(name, space, namespace)
            if hostname:
                forms = [*(f"{hostname}.{form}" for form in forms), *forms]
            lines.append(f"{ip} {' '.join(forms)}")
    return _FIXED + "\n".join(lines) + "\n"


def _forms(name: str, space: str, seen_from: str) -> list[str]:
    """The names of a Service, the full one first."""
    return [
        f"{name}.{space}.svc.{DOMAIN}",
        f"{name}.{space}.svc",
        f"{name}.{space}",
        *([name] if space == seen_from else []),
    ]


def _addresses(endpoints: Object) -> Iterator[tuple[str, str | None]]:
    """Addresses behind a headless Service, each once, with the pod's hostname where it has one there."""
    seen = set()
    for subset in endpoints.get("subsets", []):
        for address in subset.get("addresses", []):
            if address["ip"] not in seen:
                seen.add(address["ip"])
                yield address["ip"], address.get("hostname")
