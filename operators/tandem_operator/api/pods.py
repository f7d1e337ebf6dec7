"""What a platform team may say about the pods of a fleet."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from tandem.config import Section

Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$")]
"""As Kubernetes writes amounts: 500m, 64Gi, 8."""


class Resources(Section):
    """Requests and limits of one container, by resource name."""

    requests: dict[str, Quantity] = Field(default_factory=dict)
    limits: dict[str, Quantity] = Field(default_factory=dict)


class Toleration(Section):
    """Of a node's taint."""

    key: str | None = None
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    toleration_seconds: int | None = Field(None, ge=0)


class GangScheduling(Section):
    """Who sees to it that all pods of a group are scheduled at once, or none."""

    scheduler: Literal["none", "kueue", "volcano", "coscheduling"] = "none"
    queue: str | None = Field(None, description="Kueue's local queue, or Volcano's queue.")


class Topology(Section):
    """Nodes that a group's pods share: those with the same value of a label, such as a rail, rack or block."""

    key: str = Field(description="Node label, such as topology.kubernetes.io/zone or your rack label.")
    required: bool = Field(False, description="A group waits for room in one rack, rather than being spread over two.")


class PodOptions(Section):
    """Of the pods of one kind. What is not given is Kubernetes' default."""

    resources: Resources = Field(default_factory=Resources, description="Besides the GPUs, which Tandem asks for.")
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    affinity: dict[str, Any] = Field(default_factory=dict, description="A Kubernetes affinity, as it is.")
    priority_class_name: str | None = None
    runtime_class_name: str | None = None
    scheduler_name: str | None = None
    labels: dict[str, str] = Field(default_factory=dict, description="Further labels.")
    annotations: dict[str, str] = Field(default_factory=dict, description="Further annotations.")
    run_as_user: int | None = Field(None, ge=0, description="None = the image's user.")
    read_only_root: bool = Field(True, description="The root file system cannot be written; /tmp and /run can.")


class EnginePodOptions(PodOptions):
    """Of the pods of expert-parallel groups, one per node."""

    gpu_resource: str = Field("nvidia.com/gpu", description="What GPUs are called on the nodes.")
    rdma: dict[str, Quantity] = Field(
        default_factory=dict, description="RDMA devices for each pod, such as rdma/hca_shared_devices: 1."
    )
    huge_pages: dict[Literal["hugepages-2Mi", "hugepages-1Gi"], Quantity] = Field(default_factory=dict)
    shared_memory: Quantity = Field("16Gi", description="Size of /dev/shm.")
    ipc_lock: bool = Field(True, description="Let the engine pin memory (CAP_IPC_LOCK), which RDMA needs.")
    host_network: bool = Field(False, description="Use the node's own addresses; one rank per node then.")
    topology: Topology | None = None
    gang: GangScheduling = Field(default_factory=GangScheduling)
    termination_grace_s: int = Field(180, ge=1, description="For its streams to move when a pod is evicted.")
