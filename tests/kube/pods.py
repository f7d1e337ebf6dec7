"""Looks at pods of a test cluster, and waits for them."""

from __future__ import annotations

import urllib.request
from typing import Any

from kube.cluster import SOON, Cluster
from kube.kubelet.rest import Object
from kube.manifests import pod

FOREVER = ("sleep", "infinity")


def serve(text: str) -> tuple[str, ...]:
    """An HTTP server on 8000 whose page is `text`, which the shell expands."""
    return ("sh", "-c", f'mkdir -p /srv && echo "{text}" > /srv/index.html && exec python -m http.server 8000 -d /srv')


def fetch(address: str) -> str:
    """The page there; an AssertionError when there is none yet, for `Cluster.wait`."""
    try:
        with urllib.request.urlopen(f"http://{address}/", timeout=5) as answer:
            return str(answer.read().decode().strip())
    except OSError as error:
        raise AssertionError(f"{address}: {error}") from error


def main_status(cluster: Cluster, name: str, namespace: str) -> Object:
    """Status of a pod's only container; an AssertionError before it has one."""
    found = cluster.pod(name, namespace)
    assert found is not None, f"no pod {name}"
    statuses = found.get("status", {}).get("containerStatuses", [])
    assert statuses, f"pod {name} has no status yet"
    return dict(statuses[0])


def end_of(cluster: Cluster, name: str, namespace: str) -> Object:
    """How a pod's only container ended, once it has."""
    return dict(
        cluster.wait(lambda: main_status(cluster, name, namespace)["state"].get("terminated"), SOON, f"end of {name}")
    )


def output(cluster: Cluster, namespace: str, *command: str, **spec: Any) -> str:
    """What a pod writes that runs once."""
    cluster.apply(pod("once", *command, restartPolicy="Never", **spec), namespace=namespace)
    end_of(cluster, "once", namespace)
    return cluster.kubelet.logs("once", namespace=namespace).strip()


def ready(cluster: Cluster, namespace: str, *names: str) -> None:
    """Wait for pods to be ready."""
    for name in names:
        cluster.wait(lambda name=name: cluster.ready(name, namespace), SOON, f"{name} ready")


def gone(cluster: Cluster, namespace: str, name: str) -> None:
    """Wait for a pod's object to be gone."""
    cluster.wait(lambda: cluster.pod(name, namespace) is None, SOON, f"{name} gone")


def node_of(cluster: Cluster, namespace: str, name: str) -> str | None:
    """The node that a pod is bound to."""
    found = cluster.pod(name, namespace)
    return None if found is None else found["spec"].get("nodeName")
