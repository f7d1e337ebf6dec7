"""ExpertParallelPool and ExpertParallelGroup: whole groups of engine ranks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from tandem.config import AutoscalingConfig, Section
from tandem.core.types import Role
from tandem_operator.api.pods import EnginePodOptions

GroupId = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]


class Image(Section):
    """A container image."""

    name: str = Field(min_length=1, description="With tag or digest.")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        None, description="None = Always for :latest, else IfNotPresent."
    )
    pull_secrets: tuple[str, ...] = Field((), description="Names of Secrets in the fleet's namespace.")


class ModelVolume(Section):
    """Where every pod finds the checkpoint. One of the two; neither = it is in the image, or the tiny model."""

    claim: str | None = Field(None, description="PersistentVolumeClaim that many pods can read.")
    host_path: str | None = Field(None, pattern=r"^/", description="Folder on every node.")

    @model_validator(mode="after")
    def _one(self) -> ModelVolume:
        if self.claim is not None and self.host_path is not None:
            raise ValueError("give claim or hostPath, not both")
        return self


class Rollout(Section):
    """How a change of image, flags, weights or pods goes through a pool: group by group."""

    max_surge: int = Field(1, ge=0, le=64, description="Groups above the wanted number while it goes on.")
    max_unavailable: int = Field(0, ge=0, le=64, description="Groups below it.")
    canary_s: float = Field(30, ge=0, description="The first new group must serve well for so long before the others.")
    progress_s: float = Field(
        1800,
        gt=0,
        description="A new group that is not ready by then stops the change; a wait so long is told as Stalled.",
    )
    canary_prompt: bool = Field(
        True,
        description="The first new group serves nobody until it has answered a known prompt as the groups that serve do"
        " (on GPUs: begins as they do). Turn off for a change that is to answer otherwise.",
    )
    rollback: bool = Field(True, description="After a failed canary, go back to the last revision that served.")

    @model_validator(mode="after")
    def _moves(self) -> Rollout:
        if self.max_surge == 0 and self.max_unavailable == 0:
            raise ValueError("maxSurge and maxUnavailable cannot both be 0: no group could be replaced")
        return self


class EngineTemplate(Section):
    """All that makes a revision: two groups with equal templates are alike."""

    image: Image
    device: Literal["cpu", "cuda"] = Field("cuda", description="What the engine runs on.")
    model_path: str | None = Field(None, description="Checkpoint folder in the pod; none = the tiny model.")
    model_version: str | None = Field(
        None, min_length=1, max_length=64, description="Version of the weights there; none = made of the path."
    )
    model_volume: ModelVolume = Field(default_factory=ModelVolume)
    redundant_experts: int = Field(
        0, ge=0, le=1024, description="Further copies of experts, so that a group whose size does not divide them fits."
    )
    max_total_tokens: int | None = Field(
        None, ge=256, description="KV pool per DP rank, in tokens; none = what fits (8,192 on cpu)."
    )
    args: tuple[str, ...] = Field((), description="Further SGLang flags.")
    env: dict[str, str] = Field(default_factory=dict, description="Further environment of the engine.")
    kv_format: str = Field(
        "", description="Groups of different ones are never paired; empty = made of image and KV flags."
    )
    pods: EnginePodOptions = Field(default_factory=EnginePodOptions)


class PoolSpec(Section):
    """Of an ExpertParallelPool: the groups of one role of a fleet."""

    fleet: ObjectName = Field(description="The Fleet in the same namespace.")
    role: Role = Field(description="Which half of a request its groups serve.")
    replicas: int = Field(1, ge=0, le=1024, description="Groups.")
    nodes: int = Field(2, ge=1, le=64, description="Nodes (pods, ranks) per group.")
    gpus_per_node: int = Field(8, ge=1, le=16, description="GPUs per node.")
    paused: bool = Field(False, description="Neither scale by itself nor roll out changes. Anybody may set it.")
    autoscaling: AutoscalingConfig | None = Field(None, description="None = as many groups as somebody says.")
    rollout: Rollout = Field(default_factory=Rollout)
    template: EngineTemplate


class GroupSpec(Section):
    """Of an ExpertParallelGroup. The operator makes it; people read it."""

    fleet: ObjectName = Field(description="The Fleet in the same namespace.")
    pool: ObjectName = Field(description="Its ExpertParallelPool.")
    role: Role = Field(description="Which half of a request it serves.")
    group: GroupId = Field(description="Its id in the fleet, such as decode-0.")
    nodes: int = Field(ge=1, le=64, description="Nodes (pods, ranks).")
    gpus_per_node: int = Field(ge=1, le=16, description="GPUs per node.")
    revision: str = Field(description="Hash of its template and shape.")
    cordoned: bool = Field(False, description="No new pairs; what runs goes on. For people: the operator leaves it.")
    canary: bool = Field(
        False, description="The first group of a revision: no new pairs either, until it has answered a known prompt."
    )
    template: EngineTemplate
