"""A fleet's own pods: Ray's head, the gateways, Redis; and the configuration that they read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from tandem_operator.api.fleet import FleetSpec
from tandem_operator.names import (
    CONFIG_MAP,
    CONTROL_PORT,
    FLEET,
    GCS_PORT,
    REDIS_PORT,
    SERVICE,
    STATEFUL_SET,
    Key,
    Kind,
    Object,
    labels,
    owned_by,
)
from tandem_operator.render import pods
from tandem_operator.render.config import config_json, fleet_config, ray_namespace

Children = dict[Key, Object]
Update = Literal["RollingUpdate", "OnDelete"]

_REDIS_FOLDER = "/data"
_GATEWAY_GRACE_S = 120
"""For streams to end, or to go on through another gateway, when one is replaced."""
_GATEWAY_MARGIN_S = 30
"""Of that, for what comes before and after the drain: lingering, ending the rest, leaving Ray."""


def platform_children(fleet: Object, spec: FleetSpec, budget: Kind | None) -> Children:
    """All children of a fleet but its pools. `budget`: the server's kind of PodDisruptionBudget, if it has one."""
    meta = fleet["metadata"]
    name, namespace = meta["name"], meta["namespace"]
    config = config_json(fleet_config(name, namespace, spec))
    children: Children = {}

    def add(kind: Kind, child: str, component: str, **body: Any) -> None:
        own = {"metadata": {"labels": labels(name, component), "ownerReferences": owned_by(FLEET, fleet)}, **body}
        if notes := own.pop("annotations", None):
            own["metadata"]["annotations"] = notes
        children[Key(kind, namespace, child)] = own

    add(CONFIG_MAP, f"{name}-config", "config", data={"fleet.json": config})
    add(STATEFUL_SET, f"{name}-head", "head", spec=_head(name, namespace, spec))
    head_ports = {"gcs": GCS_PORT, "control": CONTROL_PORT} if spec.ray.address is None else {"control": CONTROL_PORT}
    add(SERVICE, f"{name}-head", "head", spec=_service(name, "head", head_ports, headless=True))
    gateway = spec.gateway
    add(STATEFUL_SET, f"{name}-gateway", "gateway", spec=_gateway(name, namespace, spec))
    if budget is not None:
        add(budget, f"{name}-gateway", "gateway", spec=_one_at_a_time(name, "gateway"))
    service = _service(name, "gateway", {"http": gateway.http_port, "grpc": gateway.grpc_port})
    add(
        SERVICE,
        name,
        "gateway",
        spec={**service, "type": gateway.service_type},
        annotations=gateway.service_annotations,
    )
    if spec.redis.url_secret is None:
        add(STATEFUL_SET, f"{name}-redis", "redis", spec=_redis(name, spec))
        add(SERVICE, f"{name}-redis", "redis", spec=_service(name, "redis", {"redis": REDIS_PORT}, headless=True))
    return children


def passing_names(name: str, namespace: str) -> list[Key]:
    """Children that not every fleet has, so that those which it should not have any more can be deleted."""
    return [Key(kind, namespace, f"{name}-redis") for kind in (STATEFUL_SET, SERVICE)]


def _head(name: str, namespace: str, spec: FleetSpec) -> Object:
    """The head reads fleet.json again when it changes, and sees to the gateways: neither restarts for that.

    Without storage another pod begins with an empty GCS, and all groups restart: then one that runs is left alone, and
    another template waits until somebody deletes the pod.
    """
    volumes = [pods.config_volume(name), *_volumes(spec), *_tenants(spec)]
    storage = spec.ray.storage if spec.ray.address is None else None  # what there is to remember, another's head does
    folder, data_mount = _data("data", pods.DATA_FOLDER, storage)
    container = pods.container(
        "head",
        pods.platform_image(spec),
        ("tandem", "node", "head"),
        spec.ray.pods,
        env=[
            *pods.variables(
                {
                    "TANDEM_CONFIG": pods.CONFIG_FILE,
                    "TANDEM_GCS_PORT": str(GCS_PORT),
                    "TANDEM_DATA": pods.DATA_FOLDER,
                    **_tenants_variable(spec),
                    "HOME": "/tmp",
                }
            ),
            *pods.place_variables(),
            *pods.ray_variables(spec),
            *pods.state_variables(spec.redis.url_secret),
        ],
        mounts=[data_mount, *(mount for _, mount in volumes)],
        ports=[
            *([{"name": "gcs", "containerPort": GCS_PORT}] if spec.ray.address is None else []),
            {"name": "control", "containerPort": CONTROL_PORT},
        ],
        readinessProbe=pods.tcp_probe(CONTROL_PORT, periodSeconds=2, timeoutSeconds=2, failureThreshold=3),
    )
    template = pods.pod_template(
        labels(name, "head"),
        spec.ray.pods,
        pods.platform_image(spec),
        [container],
        [*folder, *(volume for volume, _ in volumes)],
        writes_volume=bool(storage),
        terminationGracePeriodSeconds=30,
    )
    claims = _claim("data", storage, spec.ray.storage_class)
    update: Update = "RollingUpdate" if storage or spec.ray.address is not None else "OnDelete"
    return _stateful_set(name, "head", f"{name}-head", 1, template, claims, update=update)


def _gateway(name: str, namespace: str, spec: FleetSpec) -> Object:
    gateway = spec.gateway
    scheme = "HTTPS" if gateway.tls_secret else "HTTP"
    # Not /ready: that needs a pair of ready groups, and requests are to wait for one in the gateway (capacity_wait_s),
    # which they reach only through a pod that is ready.
    probe = pods.http_probe("/health", gateway.http_port, scheme=scheme, periodSeconds=2, timeoutSeconds=2)
    container = pods.container(
        "gateway",
        pods.platform_image(spec),
        ("tandem", "node", "join", "--gateway"),
        gateway.pods,
        env=[
            *pods.variables(
                {
                    "TANDEM_DRAIN_S": str(_GATEWAY_GRACE_S - _GATEWAY_MARGIN_S),
                    **_cluster(name, namespace, spec),
                    "TANDEM_CONTROL": f"{name}-head.{namespace}.svc:{CONTROL_PORT}",
                    "HOME": "/tmp",
                }
            ),
            *pods.place_variables(),
            *pods.ray_variables(spec),
        ],
        mounts=[mount for _, mount in _volumes(spec)],
        ports=[
            {"name": "http", "containerPort": gateway.http_port},
            {"name": "grpc", "containerPort": gateway.grpc_port},
        ],
        readinessProbe={**probe, "failureThreshold": 2},
    )
    template = pods.pod_template(
        labels(name, "gateway"),
        gateway.pods,
        pods.platform_image(spec),
        [container],
        [volume for volume, _ in _volumes(spec)],
        affinity=pods.apart(labels(name, "gateway"), required=False),
        terminationGracePeriodSeconds=_GATEWAY_GRACE_S,
    )
    return _stateful_set(name, "gateway", name, gateway.replicas, template, [])


def _cluster(name: str, namespace: str, spec: FleetSpec) -> dict[str, str]:
    """Where a gateway's node joins."""
    if spec.ray.address is None:
        return {"TANDEM_GCS": pods.gcs_address(name, namespace)}
    return {"TANDEM_GCS": spec.ray.address, "TANDEM_RAY_NAMESPACE": ray_namespace(name, namespace)}


def _redis(name: str, spec: FleetSpec) -> Object:
    redis = spec.redis
    folder, mount = _data("data", _REDIS_FOLDER, redis.storage)
    command = ["redis-server", "--bind", "0.0.0.0", "--port", str(REDIS_PORT), "--protected-mode", "no"]
    command += ["--dir", _REDIS_FOLDER, "--appendonly", "yes" if redis.storage else "no", "--save", ""]
    container = pods.container(
        "redis",
        spec.images.redis,
        command,
        redis.pods,
        env=[],
        mounts=[mount],
        ports=[{"name": "redis", "containerPort": REDIS_PORT}],
        readinessProbe=pods.tcp_probe(REDIS_PORT, periodSeconds=2, timeoutSeconds=2),
    )
    template = pods.pod_template(labels(name, "redis"), redis.pods, spec.images.redis, [container], folder)
    return _stateful_set(
        name, "redis", f"{name}-redis", 1, template, _claim("data", redis.storage, redis.storage_class)
    )


def _stateful_set(
    name: str,
    component: str,
    service: str,
    replicas: int,
    template: Object,
    claims: list[Object],
    *,
    update: Update = "RollingUpdate",
) -> Object:
    more = {"volumeClaimTemplates": claims} if claims else {}
    return {
        "replicas": replicas,
        "serviceName": service,
        "podManagementPolicy": "Parallel",
        "updateStrategy": {"type": update},
        "selector": {"matchLabels": labels(name, component)},
        "template": template,
        **more,
    }


def _service(name: str, component: str, ports: Mapping[str, int], *, headless: bool = False) -> Object:
    spec: Object = {
        "selector": labels(name, component),
        "ports": [
            {"name": port, "port": number, "targetPort": number, "protocol": "TCP"} for port, number in ports.items()
        ],
    }
    if headless:  # its name is the pod's address, also while the pod is not ready: nodes join before it is
        spec.update(clusterIP="None", publishNotReadyAddresses=True)
    return spec


def _one_at_a_time(name: str, component: str) -> Object:
    return {"maxUnavailable": 1, "selector": {"matchLabels": labels(name, component)}}


def _volumes(spec: FleetSpec) -> list[tuple[Object, Object]]:
    found = pods.scratch_volumes()
    found += pods.model_volume(str(spec.model.path) if spec.model.path else None, spec.model.volume)
    if spec.gateway.tls_secret is not None:
        found.append(_secret("tls", spec.gateway.tls_secret, pods.TLS_FOLDER))
    return found


def _tenants(spec: FleetSpec) -> list[tuple[Object, Object]]:
    """For the head alone: it tells the gateways which tenants there are."""
    return [_secret("tenants", spec.tenants_secret, pods.TENANTS_FOLDER)] if spec.tenants_secret else []


def _secret(volume: str, secret: str, folder: str) -> tuple[Object, Object]:
    mount = {"name": volume, "mountPath": folder, "readOnly": True}
    return {"name": volume, "secret": {"secretName": secret}}, mount


def _tenants_variable(spec: FleetSpec) -> dict[str, str]:
    return {"TANDEM_TENANTS": f"{pods.TENANTS_FOLDER}/tenants.yaml"} if spec.tenants_secret else {}


def _data(name: str, folder: str, storage: str | None) -> tuple[list[Object], Object]:
    """A folder that is written to: in the pod's own space, or on a volume that the StatefulSet claims."""
    own = [] if storage else [{"name": name, "emptyDir": {}}]
    return own, {"name": name, "mountPath": folder}


def _claim(name: str, storage: str | None, storage_class: str | None) -> list[Object]:
    if storage is None:
        return []
    more = {"storageClassName": storage_class} if storage_class else {}
    size = {"requests": {"storage": storage}}
    return [{"metadata": {"name": name}, "spec": {"accessModes": ["ReadWriteOnce"], "resources": size, **more}}]
