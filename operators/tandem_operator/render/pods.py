"""What the pods of all kinds have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tandem_operator.api.fleet import FleetSpec, SecretKey
from tandem_operator.api.pods import PodOptions
from tandem_operator.api.pool import Image, ModelVolume
from tandem_operator.names import GCS_PORT, Object

CONFIG_FOLDER = "/etc/tandem"
CONFIG_FILE = f"{CONFIG_FOLDER}/fleet.json"
TLS_FOLDER = "/etc/tandem-tls"
TENANTS_FOLDER = "/etc/tandem-tenants"
DATA_FOLDER = "/var/lib/tandem"
MODELS_FOLDER = "/models"
IMAGE_USER = 65532
"""Who runs in Tandem's images, by their Dockerfiles."""

Variables = list[dict[str, Any]]


def platform_image(spec: FleetSpec) -> Image:
    """Image of head and gateways."""
    return spec.images.platform or spec.images.engine


def model_path(path: str | None, volume: ModelVolume) -> str | None:
    """Folder of the checkpoint in every pod; None = the tiny model, or what the image knows."""
    has_volume = volume.claim is not None or volume.host_path is not None
    return path or (MODELS_FOLDER if has_volume else None)


def variables(values: Mapping[str, str]) -> Variables:
    """Environment of a container."""
    return [{"name": name, "value": value} for name, value in values.items()]


def downward(name: str, field: str) -> Object:
    """An environment variable from the pod's own fields."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": field}}}


def place_variables() -> Variables:
    """Where a pod is."""
    return [
        downward("TANDEM_HOST", "status.podIP"),
        downward("TANDEM_POD_NAME", "metadata.name"),
        downward("TANDEM_NODE_NAME", "spec.nodeName"),
    ]


def state_variables(secret: SecretKey | None) -> Variables:
    """The URL of the state, where a Secret holds it. Only the head needs it: all others are told by the head."""
    if secret is None:
        return []
    return [
        {"name": "TANDEM_STATE_URL", "valueFrom": {"secretKeyRef": {"name": secret.name, "key": secret.key}}},
    ]


def ray_variables(spec: FleetSpec) -> Variables:
    """How a pod that joins another's Ray cluster shows that it may, and for how long it waits for a head that is away:
    Ray's own 60 s may be less than another pod takes to start."""
    secret = spec.ray.auth_token_secret
    if spec.ray.address is None:
        return []
    patience = {"name": "RAY_gcs_rpc_server_reconnect_timeout_s", "value": "600"}
    if secret is None:
        return [patience]
    token = {"secretKeyRef": {"name": secret.name, "key": secret.key}}
    return [patience, {"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": token}]


def gcs_address(fleet: str, namespace: str) -> str:
    """Where a fleet's Ray cluster has its GCS."""
    return f"{fleet}-head.{namespace}.svc:{GCS_PORT}"


def config_volume(fleet: str) -> tuple[Object, Object]:
    """Volume and mount of fleet.json."""
    return (
        {"name": "config", "configMap": {"name": f"{fleet}-config"}},
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
    )


def model_volume(path: str | None, volume: ModelVolume) -> list[tuple[Object, Object]]:
    """Volume and mount of the checkpoint: at /models, or at the model's own path where that is elsewhere."""
    if volume.claim is not None:
        source: Object = {"persistentVolumeClaim": {"claimName": volume.claim, "readOnly": True}}
    elif volume.host_path is not None:
        source = {"hostPath": {"path": volume.host_path, "type": "Directory"}}
    else:
        return []
    inside = path is None or path == MODELS_FOLDER or path.startswith(f"{MODELS_FOLDER}/")
    where = MODELS_FOLDER if inside else path
    return [({"name": "model", **source}, {"name": "model", "mountPath": where, "readOnly": True})]


def scratch_volumes() -> list[tuple[Object, Object]]:
    """Folders that can be written although the root cannot."""
    return [
        ({"name": "tmp", "emptyDir": {}}, {"name": "tmp", "mountPath": "/tmp"}),
        ({"name": "run", "emptyDir": {}}, {"name": "run", "mountPath": "/run"}),
    ]


def resources(options: PodOptions, limits: Mapping[str, str] | None = None) -> Object:
    """Requests and limits; `limits` are Tandem's own, of extended resources, whose requests are the same."""
    own = dict(limits or {})
    requests = {**options.resources.requests, **own}
    most = {**options.resources.limits, **own}
    return {name: value for name, value in (("requests", requests), ("limits", most)) if value}


def container(
    name: str,
    image: Image,
    command: Sequence[str],
    options: PodOptions,
    *,
    env: Variables,
    mounts: Sequence[Object],
    limits: Mapping[str, str] | None = None,
    capabilities: Sequence[str] = (),
    **more: Any,
) -> Object:
    """A container that may do no more than it has to."""
    rights: Object = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    if capabilities:
        rights["capabilities"]["add"] = list(capabilities)
    if options.read_only_root:
        rights["readOnlyRootFilesystem"] = True
    return {
        "name": name,
        "image": image.name,
        **({"imagePullPolicy": image.pull_policy} if image.pull_policy else {}),
        "command": list(command),
        "env": env,
        "resources": resources(options, limits),
        "securityContext": rights,
        "volumeMounts": list(mounts),
        **more,
    }


def pod_template(
    labels: Mapping[str, str],
    options: PodOptions,
    image: Image,
    containers: Sequence[Object],
    volumes: Sequence[Object],
    *,
    annotations: Mapping[str, str] | None = None,
    affinity: Object | None = None,
    writes_volume: bool = False,
    **more: Any,
) -> Object:
    """A StatefulSet's pod template. `writes_volume`: one that is claimed, and belongs to root when it is made. `more`:
    further fields of the pod's spec; what is None is left out."""
    notes = {**options.annotations, **(annotations or {})}
    security: Object = {"seccompProfile": {"type": "RuntimeDefault"}}
    if options.run_as_user is not None:
        security.update(runAsUser=options.run_as_user, fsGroup=options.run_as_user)
        security["runAsNonRoot"] = options.run_as_user != 0
    elif writes_volume:
        security.update(fsGroup=IMAGE_USER, fsGroupChangePolicy="OnRootMismatch")
    spec: Object = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": security,
        "imagePullSecrets": [{"name": name} for name in image.pull_secrets] or None,
        "nodeSelector": options.node_selector or None,
        "tolerations": [_toleration(entry) for entry in options.tolerations] or None,
        "affinity": merged(options.affinity, affinity or {}) or None,
        "priorityClassName": options.priority_class_name,
        "runtimeClassName": options.runtime_class_name,
        "schedulerName": options.scheduler_name,
        "containers": list(containers),
        "volumes": list(volumes),
        **more,
    }
    meta: Object = {"labels": {**options.labels, **labels}}
    if notes:
        meta["annotations"] = notes
    return {"metadata": meta, "spec": {name: value for name, value in spec.items() if value is not None}}


def merged(first: Object, second: Object) -> Object:
    """Two affinities as one: lists are joined."""
    both = dict(first)
    for name, value in second.items():
        if isinstance(value, dict):
            both[name] = merged(both.get(name, {}), value)
        elif isinstance(value, list):
            both[name] = [*both.get(name, []), *value]
        else:
            both[name] = value
    return both


def apart(labels: Mapping[str, str], *, required: bool, topology: str = "kubernetes.io/hostname") -> Object:
    """Affinity by which pods with these labels are on nodes of their own, or would rather be."""
    return {"podAntiAffinity": _term(labels, topology, required)}


def together(labels: Mapping[str, str], *, required: bool, topology: str) -> Object:
    """Affinity by which pods with these labels are where a node label has one value, or would rather be."""
    return {"podAffinity": _term(labels, topology, required)}


def _term(labels: Mapping[str, str], topology: str, required: bool) -> Object:
    term = {"labelSelector": {"matchLabels": dict(labels)}, "topologyKey": topology}
    if required:
        return {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    return {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]}


def tcp_probe(port: int, **more: int) -> Object:
    """A probe that a port is open."""
    return {"tcpSocket": {"port": port}, **more}


def http_probe(path: str, port: int, *, scheme: str = "HTTP", **more: int) -> Object:
    """A probe that a path answers."""
    return {"httpGet": {"path": path, "port": port, "scheme": scheme}, **more}


def _toleration(entry: Any) -> Object:
    fields = entry.model_dump(by_alias=True, exclude_none=True)
    # Not as kubernetes_name would have it: tolerationSeconds is a word of Kubernetes.
    return {name: value for name, value in fields.items() if value is not None}
