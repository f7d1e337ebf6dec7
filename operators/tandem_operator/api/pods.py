"""What a platform team may say about the pods of a fleet."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from tandem.config import Section

_QUANTITY = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"


def _as_text(amount: object) -> object:
    return str(amount) if isinstance(amount, int) and not isinstance(amount, bool) else amount


Quantity = Annotated[
    str,
    BeforeValidator(_as_text),
    Field(pattern=_QUANTITY),
    WithJsonSchema({"x-kubernetes-int-or-string": True, "pattern": _QUANTITY}),
]
"""As Kubernetes writes amounts: 500m, 64Gi, "8" or 8. It is text when it is read."""


class Resources(Section):
    """Requests and limits of one container, by resource name."""

    requests: dict[str, Quantity] = Field(default_factory=dict, description="What the scheduler sets aside.")
    limits: dict[str, Quantity] = Field(default_factory=dict, description="What it cannot exceed.")


class Toleration(Section):
    """Of a node's taint."""

    key: str | None = Field(None, description="Of the taint; none = every one.")
    operator: Literal["Exists", "Equal"] = Field("Exists", description="Whether the value matters.")
    value: str | None = Field(None, description="With Equal: of the taint.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Of the taint; none = every one."
    )
    toleration_seconds: int | None = Field(
        None, ge=0, description="With NoExecute: the pod stays so long; none = without end."
    )


class GangScheduling(Section):
    """Who sees to it that all pods of a group are scheduled at once, or none."""

    scheduler: Literal["none", "kueue", "volcano", "coscheduling"] = Field(
        "none",
        description="Whose labels and objects its pods get; none = pods wait for each other once they run. "
        "With coscheduling, schedulerName has to name the scheduler that has the plug-in.",
    )
    queue: str | None = Field(None, description="Kueue's local queue, or Volcano's queue.")


class Topology(Section):
    """Nodes that a group's pods share: those with the same value of a label, such as a rail, rack or block."""

    key: str = Field(description="Node label, such as topology.kubernetes.io/zone or your rack label.")
    required: bool = Field(False, description="A group waits for room in one rack, rather than being spread over two.")


class PodOptions(Section):
    """Of the pods of one kind. What is not given is Kubernetes' default."""

    resources: Resources = Field(default_factory=Resources, description="Besides the GPUs, which Tandem asks for.")
    node_selector: dict[str, str] = Field(default_factory=dict, description="Labels that a node must have.")
    tolerations: tuple[Toleration, ...] = Field((), description="Taints that do not matter.")
    affinity: dict[str, Any] = Field(default_factory=dict, description="A Kubernetes affinity, as it is.")
    priority_class_name: str | None = Field(None, description="PriorityClass; none = the cluster's default.")
    runtime_class_name: str | None = Field(None, description="RuntimeClass, such as nvidia; none = the node's default.")
    scheduler_name: str | None = Field(None, description="None = the cluster's default.")
    labels: dict[str, str] = Field(default_factory=dict, description="Further labels.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Further annotations.")
    run_as_user: int | None = Field(
        None,
        ge=0,
        description="None = the image's user: 65532 in Tandem's images, root in SGLang's. "
        "A namespace that enforces restricted pod security needs a number above 0 here.",
    )
    read_only_root: bool = Field(True, description="The root file system cannot be written; /tmp and /run can.")


class EnginePodOptions(PodOptions):
    """Of the pods of expert-parallel groups, one per node."""

    gpu_resource: str = Field("nvidia.com/gpu", description="What GPUs are called on the nodes.")
    rdma: dict[str, Quantity] = Field(
        default_factory=dict, description="RDMA devices for each pod, such as rdma/hca_shared_devices: 1."
    )
    huge_pages: dict[Literal["hugepages-2Mi", "hugepages-1Gi"], Quantity] = Field(
        default_factory=dict, description="By size."
    )
    shared_memory: Quantity = Field("16Gi", description="Size of /dev/shm.")
    ipc_lock: bool = Field(True, description="Let the engine pin memory (CAP_IPC_LOCK), which RDMA needs.")
    host_network: bool = Field(False, description="Use the node's own addresses; one rank per node then.")
    topology: Topology | None = Field(None, description="None = a group's nodes may be anywhere.")
    gang: GangScheduling = Field(default_factory=GangScheduling)
    termination_grace_s: int = Field(180, ge=1, description="For its streams to move when a pod is evicted.")


class RedisPodOptions(PodOptions):
    """Of the pod of Redis, whose image would run as root."""

    run_as_user: int | None = Field(999, ge=0, description="Owner of the data; none = the image's user.")
