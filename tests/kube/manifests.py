"""Small Kubernetes objects for tests, as dictionaries."""

from __future__ import annotations

from typing import Any

from kube.kubelet.rest import Object


def pod(name: str, *command: str, labels: dict[str, str] | None = None, **spec: Any) -> Object:
    """A pod with one container `main`; `container` among the keywords adds to that, the others to the pod's spec."""
    container = {"name": "main", "image": "test", "command": list(command), **spec.pop("container", {})}
    meta = {"name": name, "labels": {"app": name, **(labels or {})}}
    spec = {"containers": [container], "terminationGracePeriodSeconds": 2, **spec}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta, "spec": spec}


def service(name: str, port: int, *, app: str | None = None, **spec: Any) -> Object:
    """A Service of the pods labelled with an app."""
    ports = [{"port": port, "targetPort": 8000}]
    body = {"selector": {"app": app or name}, "ports": ports, **spec}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": body}


def workload(kind: str, name: str, replicas: int, template: Object, **spec: Any) -> Object:
    """A Deployment or StatefulSet of pods like `template`."""
    labels = template["metadata"]["labels"]
    body = {
        "replicas": replicas,
        "selector": {"matchLabels": {"app": labels["app"]}},
        "template": {"metadata": {"labels": labels}, "spec": template["spec"]},
        **spec,
    }
    return {"apiVersion": "apps/v1", "kind": kind, "metadata": {"name": name}, "spec": body}


def config_map(name: str, **data: str) -> Object:
    """A ConfigMap."""
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data}


def secret(name: str, **data: str) -> Object:
    """A Secret of plain texts."""
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data}


def claim(name: str) -> Object:
    """A PersistentVolumeClaim."""
    spec = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}
