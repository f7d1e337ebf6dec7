"""From a container's spec to a command and its environment."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kube.kubelet.quantity import parse
from kube.kubelet.rest import Object

_REFERENCE = re.compile(r"\$\$|\$\(([-._a-zA-Z][-._a-zA-Z0-9]*)\)")
_INDEXED = re.compile(r"metadata\.(labels|annotations)\['([^']+)'\]")

Find = Callable[[str, str], Object | None]
"""Of a kind (`configmaps`, `secrets`) and a name in the pod's namespace: the object, or None."""


class NotYet(Exception):
    """Something that a pod needs is not there; it waits and tries again."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def expand(text: str, env: Mapping[str, str]) -> str:
    """Replace $(NAME) by its value and $$ by $; names that are not known stay as they are."""

    def value(found: re.Match[str]) -> str:
        name = found.group(1)
        return "$" if name is None else env.get(name, found.group(0))

    return _REFERENCE.sub(value, text)


def field(pod: Object, path: str) -> str:
    """Value of a fieldRef. Raises NotYet for a path that is not known."""
    meta, spec, status = pod["metadata"], pod["spec"], pod.get("status", {})
    indexed = _INDEXED.fullmatch(path)
    if indexed:
        return str(meta.get(indexed.group(1), {}).get(indexed.group(2), ""))
    values = {
        "metadata.name": meta["name"],
        "metadata.namespace": meta["namespace"],
        "metadata.uid": meta["uid"],
        "metadata.labels": _lines(meta.get("labels", {})),
        "metadata.annotations": _lines(meta.get("annotations", {})),
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", ""),
        "status.hostIP": status.get("hostIP", ""),
        "status.podIP": status.get("podIP", ""),
        "status.podIPs": status.get("podIP", ""),
    }
    if path not in values:
        raise NotYet("CreateContainerConfigError", f"fieldRef {path} is not known")
    return str(values[path])


def _lines(values: Mapping[str, str]) -> str:
    return "\n".join(f'{key}="{value}"' for key, value in sorted(values.items()))


def resource(pod: Object, reference: Object, own: str, allocatable: Mapping[str, str]) -> str:
    """Value of a resourceFieldRef; a limit that is not set is the node's."""
    name = reference.get("containerName") or own
    everyone = [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
    container = next(one for one in everyone if one["name"] == name)
    which, _, kind = reference["resource"].partition(".")
    amounts = container.get("resources", {}).get(which, {})
    amount = parse(amounts.get(kind, allocatable.get(kind, 0) if which == "limits" else 0))
    divisor = parse(reference.get("divisor") or 1) or 1
    return str(math.ceil(amount / divisor))


def service_links(services: Sequence[Object], namespace: str, links: bool) -> dict[str, str]:
    """The variables of Services: that of the API server always, those of the pod's namespace when `links`."""
    env: dict[str, str] = {}
    for service in services:
        meta, spec = service["metadata"], service["spec"]
        api = (meta["namespace"], meta["name"]) == ("default", "kubernetes")
        address = spec.get("clusterIP")
        if not address or address == "None" or not (api or (links and meta["namespace"] == namespace)):
            continue
        name = meta["name"].upper().replace("-", "_")
        ports = spec.get("ports", [])
        env[f"{name}_SERVICE_HOST"] = address
        env[f"{name}_SERVICE_PORT"] = str(ports[0]["port"])
        env[f"{name}_PORT"] = f"{ports[0].get('protocol', 'TCP').lower()}://{address}:{ports[0]['port']}"
        for port in ports:
            if port.get("name"):
                env[f"{name}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}"] = str(port["port"])
            protocol = port.get("protocol", "TCP")
            prefix = f"{name}_PORT_{port['port']}_{protocol}"
            env[prefix] = f"{protocol.lower()}://{address}:{port['port']}"
            env |= {f"{prefix}_ADDR": address, f"{prefix}_PORT": str(port["port"]), f"{prefix}_PROTO": protocol.lower()}
    return env


def environment(
    container: Object, pod: Object, find: Find, base: Mapping[str, str], allocatable: Mapping[str, str]
) -> dict[str, str]:
    """The environment of a container: `base`, then envFrom, then env in order. Raises NotYet for what is missing."""
    env = dict(base)
    for source in container.get("envFrom", []):
        for kind, key in (("configmaps", "configMapRef"), ("secrets", "secretRef")):
            if key in source:
                values = values_of(find, kind, source[key])
                env |= {f"{source.get('prefix', '')}{name}": text.decode() for name, text in values.items()}
    for one in container.get("env", []):
        value = _value(one, container, pod, find, env, allocatable)
        if value is not None:
            env[one["name"]] = value
    return env


def _value(
    one: Object, container: Object, pod: Object, find: Find, env: Mapping[str, str], allocatable: Mapping[str, str]
) -> str | None:
    source: dict[str, Any] = one.get("valueFrom", {})
    if "fieldRef" in source:
        return field(pod, source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        return resource(pod, source["resourceFieldRef"], container["name"], allocatable)
    for kind, key in (("configmaps", "configMapKeyRef"), ("secrets", "secretKeyRef")):
        if key in source:
            values = values_of(find, kind, source[key])
            if source[key]["key"] in values:
                return values[source[key]["key"]].decode()
            if source[key].get("optional"):
                return None
            raise NotYet(
                "CreateContainerConfigError", f"couldn't find key {source[key]['key']} in {kind} {source[key]['name']}"
            )
    return expand(one.get("value", ""), env)


def values_of(find: Find, kind: str, reference: Object) -> dict[str, bytes]:
    """What a ConfigMap or a Secret holds, by key. Raises NotYet when it is missing and not optional."""
    name = reference.get("name") or reference.get("secretName", "")
    found = find(kind, name)
    if found is None:
        if reference.get("optional"):
            return {}
        raise NotYet("CreateContainerConfigError", f'{kind.removesuffix("s")} "{name}" not found')
    if kind == "secrets":
        return {key: base64.b64decode(text) for key, text in (found.get("data") or {}).items()}
    values = {key: text.encode() for key, text in (found.get("data") or {}).items()}
    return values | {key: base64.b64decode(text) for key, text in (found.get("binaryData") or {}).items()}
