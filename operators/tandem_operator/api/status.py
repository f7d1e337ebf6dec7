"""What the operator tells of resources, by Kubernetes' conventions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tandem.config import Section
from tandem.core.group_check import CheckVerdict
from tandem.core.types import GroupState, RankState


class Condition(Section):
    """One condition (metav1.Condition)."""

    type: str = Field(description="What it is about, such as Ready.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it is so.")
    reason: str = Field(description="Why, in one word for programs.")
    message: str = Field("", description="Why, and what to do, for people.")
    last_transition_time: str = Field(
        description="When status changed (RFC 3339).", json_schema_extra={"format": "date-time"}
    )
    observed_generation: int = Field(0, description="metadata.generation that it is about.")


Conditions = Annotated[
    tuple[Condition, ...],
    Field(json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
]
"""One for each type; several writers can keep conditions of their own."""


class SloStatus(Section):
    """How the service is, over the last slow window."""

    ttft_s: float | None = Field(None, description="Time to first token, at the pool's percentile; none = no request.")
    itl_s: float | None = Field(None, description="Time between tokens, at the pool's percentile; none = no token.")
    attainment: float | None = Field(
        None,
        description="Share of requests that kept both aims, 0 to 1: by their time to first token, and the mean time"
        " between their tokens; none = nobody knows.",
    )
    requests_per_second: float | None = Field(None, description="That arrive; none = nobody counts.")


class Endpoints(Section):
    """Where clients and tools connect."""

    http: str = Field("", description="URL of the HTTP API inside the cluster.")
    grpc: str = Field("", description="host:port of tandem.v1.Inference.")
    control: str = Field("", description="host:port of tandem.v1.FleetControl.")


class FleetStatus(Section):
    """Of a Fleet."""

    observed_generation: int = Field(0, description="metadata.generation of the spec that this is about.")
    phase: Literal["Pending", "Starting", "Ready", "Degraded", "Stopping"] = Field(
        "Pending", description="In one word; the conditions say more."
    )
    conditions: Conditions = Field((), description="What is true of it, by type.")
    endpoints: Endpoints = Field(default_factory=Endpoints)
    gateways: int = Field(0, description="Replicas that listen.")
    groups: dict[str, int] = Field(default_factory=dict, description="By role and state, such as decode/ready: 2.")
    gpus: int = Field(0, description="That its groups ask for.")
    slo: SloStatus = Field(default_factory=SloStatus)
    summary: str = Field("", description="For `kubectl get`: ready/wanted groups of prefill and decode.")


class ScalingStatus(Section):
    """The last decision of a pool's autoscaling."""

    wanted: int = Field(0, description="Groups that it asks for.")
    reason: str = Field("", description="Why so many.")
    since: str = Field("", description="When it was made.")
    held: str = Field("", description="What keeps it from scaling now, such as a cool-down; empty = nothing.")


class PoolStatus(Section):
    """Of an ExpertParallelPool."""

    observed_generation: int = Field(0, description="metadata.generation of the spec that this is about.")
    replicas: int = Field(0, description="Groups that exist.")
    ready: int = Field(0, description="Groups that serve.")
    updated: int = Field(0, description="Groups of the current revision.")
    revision: str = Field("", description="Hash of the template and shape that its groups are to have.")
    selector: str = Field("", description="Label selector of its groups' pods, for the scale subresource.")
    gpus: int = Field(0, description="That its groups ask for.")
    conditions: Conditions = Field((), description="What is true of it, by type.")
    scaling: ScalingStatus = Field(default_factory=ScalingStatus)


class RankStatus(Section):
    """One engine process."""

    rank: int = Field(description="0 is the leader.")
    pod: str = Field("", description="Its pod.")
    node: str = Field("", description="The Kubernetes node that its pod is on.")
    state: RankState = Field(RankState.PENDING, description="Of its process.")
    detail: str = Field("", description="Why it is so.")


class LoadStatus(Section):
    """A group's load, over its DP ranks."""

    running: int = Field(0, description="Requests that run.")
    waiting: int = Field(0, description="Requests that wait in the engine.")
    kv_use: float = Field(0.0, description="Share of the KV pool in use, 0 to 1; of its fullest DP rank.")


class CheckStatus(Section):
    """What the first group of a revision answered to a known prompt."""

    epoch: int = Field(0, description="Of the group, when it was asked last.")
    verdict: CheckVerdict = Field(CheckVerdict.UNKNOWN, description="What is to be thought of the answer.")
    message: str = Field("", description="Why.")
    silences: int = Field(0, description="So often in a row it gave no answer; the third time it has failed.")


class GroupStatus(Section):
    """Of an ExpertParallelGroup."""

    observed_generation: int = Field(0, description="metadata.generation of the spec that this is about.")
    phase: Literal["Pending", "Starting", "Ready", "Cordoned", "Draining", "Failed", "Gone"] = Field(
        "Pending", description="In one word."
    )
    state: GroupState | None = Field(None, description="What the fleet's controller says; none = nothing yet.")
    reason: str = Field("", description="Why it is so.")
    epoch: int = Field(0, description="Raised at each restart of the group.")
    first_epoch: int = Field(0, description="The one that it began with; groups of the same id follow each other.")
    weight_version: str = Field("", description="Of the weights that it serves.")
    ready_ranks: str = Field("", description="Such as 2/2.")
    ranks: tuple[RankStatus, ...] = Field((), description="Its engine processes, one per node.")
    load: LoadStatus = Field(default_factory=LoadStatus)
    check: CheckStatus | None = Field(None, description="Of the first group of a revision; none = not asked.")
    conditions: Conditions = Field((), description="What is true of it, by type.")
    drain_deadline: str = Field(
        "", description="When a drain ends at the latest (RFC 3339); empty = it does not drain."
    )
