"""A group's children: a pod for each rank (StatefulSet), their names (headless Service), and a gang scheduler's."""

from __future__ import annotations

from tandem_operator.api.pool import GroupSpec
from tandem_operator.names import (
    CONTROL_PORT,
    COSCHEDULING_GANG,
    EP_GROUP,
    GANG_SIZE,
    READY_PORT,
    SERVICE,
    STATEFUL_SET,
    VOLCANO_GANG,
    Key,
    Object,
    labels,
    owned_by,
)
from tandem_operator.render import pods

Children = dict[Key, Object]


def group_labels(spec: GroupSpec) -> dict[str, str]:
    """Labels of all that belongs to a group."""
    return labels(spec.fleet, "engine", role=spec.role, pool=spec.pool, group=spec.group)


def group_children(group: Object, spec: GroupSpec) -> Children:
    """The children of a group."""
    meta = group["metadata"]
    name, namespace = meta["name"], meta["namespace"]
    own: Object = {"labels": group_labels(spec), "ownerReferences": owned_by(EP_GROUP, group)}
    gang = spec.template.pods.gang
    stateful_meta: Object = dict(own)
    if gang.scheduler == "kueue" and gang.queue:
        stateful_meta["labels"] = {**own["labels"], "kueue.x-k8s.io/queue-name": gang.queue}
    children: Children = {
        Key(SERVICE, namespace, name): {
            "metadata": own,
            # Ranks find each other before they are ready.
            "spec": {"clusterIP": "None", "publishNotReadyAddresses": True, "selector": own["labels"]},
        },
        Key(STATEFUL_SET, namespace, name): {
            "metadata": stateful_meta,
            "spec": {
                "replicas": spec.nodes,
                "serviceName": name,
                "podManagementPolicy": "Parallel",
                # Another template waits until a pod is replaced anyway: engines are not restarted by an operator's
                # upgrade. A change of the pool's template makes new groups instead.
                "updateStrategy": {"type": "OnDelete"},
                "selector": {"matchLabels": own["labels"]},
                "template": _template(name, namespace, spec),
            },
        },
    }
    if gang.scheduler == "volcano":
        queue = {"queue": gang.queue} if gang.queue else {}
        children[Key(VOLCANO_GANG, namespace, name)] = {"metadata": own, "spec": {"minMember": spec.nodes, **queue}}
    elif gang.scheduler == "coscheduling":
        children[Key(COSCHEDULING_GANG, namespace, name)] = {"metadata": own, "spec": {"minMember": spec.nodes}}
    return children


def _template(name: str, namespace: str, spec: GroupSpec) -> Object:
    template = spec.template
    options = template.pods
    gpus = {options.gpu_resource: str(spec.gpus_per_node)} if template.device == "cuda" else {}
    volumes = [
        *pods.scratch_volumes(),
        (
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": options.shared_memory}},
            {"name": "shm", "mountPath": "/dev/shm"},
        ),
        *(
            (
                {"name": size.lower(), "emptyDir": {"medium": f"HugePages-{size.removeprefix('hugepages-')}"}},
                {"name": size.lower(), "mountPath": f"/{size.lower()}"},
            )
            for size in sorted(options.huge_pages)
        ),
        *pods.model_volume(template.model_path, template.model_volume),
    ]
    leave = {"exec": {"command": ["tandem", "node", "leave"]}}
    container = pods.container(
        "engine",
        template.image,
        ("tandem", "node", "join", "--group", spec.group),
        options,
        env=_environment(namespace, spec),
        mounts=[mount for _, mount in volumes],
        limits=gpus | dict(options.rdma) | {str(size): amount for size, amount in options.huge_pages.items()},
        capabilities=("IPC_LOCK",) if options.ipc_lock else (),
        ports=[{"name": "ready", "containerPort": READY_PORT}],
        readinessProbe=pods.http_probe("/ready", READY_PORT, periodSeconds=2, timeoutSeconds=2, failureThreshold=3),
        livenessProbe=pods.http_probe("/live", READY_PORT, periodSeconds=10, timeoutSeconds=5, failureThreshold=6),
        lifecycle={"preStop": leave},
    )
    notes = {GANG_SIZE: str(spec.nodes)}
    more_labels: dict[str, str] = {}
    gang = options.gang
    if gang.scheduler == "volcano":
        notes["scheduling.k8s.io/group-name"] = name
    elif gang.scheduler == "coscheduling":
        more_labels["scheduling.x-k8s.io/pod-group"] = name
    scheduler = options.scheduler_name or ("volcano" if gang.scheduler == "volcano" else None)
    host: Object = {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"} if options.host_network else {}
    return pods.pod_template(
        {**group_labels(spec), **more_labels},
        options,
        template.image,
        [container],
        [volume for volume, _ in volumes],
        annotations=notes,
        affinity=_affinity(spec),
        terminationGracePeriodSeconds=options.termination_grace_s,
        schedulerName=scheduler,
        **host,
    )


def _environment(namespace: str, spec: GroupSpec) -> pods.Variables:
    gpus = str(spec.gpus_per_node)
    head = f"{spec.fleet}-head.{namespace}.svc"
    return [
        *pods.variables(
            {
                "TANDEM_GCS": pods.gcs_address(spec.fleet, namespace),
                "TANDEM_CONTROL": f"{head}:{CONTROL_PORT}",
                "TANDEM_GROUP": spec.group,
                "TANDEM_LEAVE_S": str(max(1, spec.template.pods.termination_grace_s - 10)),
                "TANDEM_GPUS": gpus if spec.template.device == "cuda" else "0",
                "HOME": "/tmp",
            }
        ),
        *pods.place_variables(),
    ]


def _affinity(spec: GroupSpec) -> Object:
    """Each pod on a node of its own (on cpu, if there is room), all of them in one rack where that is asked for."""
    own = group_labels(spec)
    affinity = pods.apart(own, required=spec.template.device == "cuda")
    if (topology := spec.template.pods.topology) is not None:
        rack = pods.together(own, required=topology.required, topology=topology.key)
        affinity = pods.merged(affinity, rack)
    return affinity
