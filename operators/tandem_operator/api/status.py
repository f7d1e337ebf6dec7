"""What the operator tells of resources, by Kubernetes' conventions."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tandem.config import Section
from tandem.core.types import GroupState, RankState


class Condition(Section):
    """One condition (metav1.Condition)."""

    type: str
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str = ""
    last_transition_time: str
    observed_generation: int = 0


class SloStatus(Section):
    """How the service is, over the last slow window."""

    ttft_s: float | None = Field(None, description="At the pool's percentile; none = no request.")
    itl_s: float | None = None
    attainment: float | None = Field(None, description="Share of requests that kept both aims, 0 to 1.")
    requests_per_second: float | None = None


class Endpoints(Section):
    """Where clients and tools connect."""

    http: str = ""
    grpc: str = ""
    control: str = ""


class FleetStatus(Section):
    """Of a Fleet."""

    observed_generation: int = 0
    phase: Literal["Pending", "Starting", "Ready", "Degraded", "Stopping"] = "Pending"
    conditions: tuple[Condition, ...] = ()
    endpoints: Endpoints = Field(default_factory=Endpoints)
    gateways: int = Field(0, description="Replicas that listen.")
    groups: dict[str, int] = Field(default_factory=dict, description="By role and state, such as decode/ready: 2.")
    gpus: int = Field(0, description="That its groups ask for.")
    slo: SloStatus = Field(default_factory=SloStatus)
    summary: str = Field("", description="For `kubectl get`: ready/wanted groups of prefill and decode.")


class ScalingStatus(Section):
    """The last decision of a pool's autoscaling."""

    wanted: int = 0
    reason: str = ""
    since: str = Field("", description="When it was made.")
    held: str = Field("", description="What keeps it from scaling now, such as a cool-down; empty = nothing.")


class PoolStatus(Section):
    """Of an ExpertParallelPool."""

    observed_generation: int = 0
    replicas: int = Field(0, description="Groups that exist.")
    ready: int = 0
    updated: int = Field(0, description="Groups of the current revision.")
    revision: str = ""
    selector: str = Field("", description="Label selector of its groups' pods, for the scale subresource.")
    gpus: int = 0
    conditions: tuple[Condition, ...] = ()
    scaling: ScalingStatus = Field(default_factory=ScalingStatus)


class RankStatus(Section):
    """One engine process."""

    rank: int
    pod: str = ""
    node: str = ""
    state: RankState = RankState.PENDING
    detail: str = ""


class LoadStatus(Section):
    """A group's load, over its DP ranks."""

    running: int = 0
    waiting: int = 0
    kv_use: float = Field(0.0, description="Share of the KV pool in use, 0 to 1; of its fullest DP rank.")


class GroupStatus(Section):
    """Of an ExpertParallelGroup."""

    observed_generation: int = 0
    phase: Literal["Pending", "Starting", "Ready", "Cordoned", "Draining", "Failed", "Gone"] = "Pending"
    state: GroupState | None = None
    reason: str = ""
    epoch: int = 0
    weight_version: str = ""
    ready_ranks: str = Field("", description="Such as 2/2.")
    ranks: tuple[RankStatus, ...] = ()
    load: LoadStatus = Field(default_factory=LoadStatus)
    conditions: tuple[Condition, ...] = ()
    drain_deadline: str = ""
