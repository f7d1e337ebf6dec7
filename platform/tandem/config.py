"""The one configuration schema: `fleet.yaml` on a laptop, the `Fleet` resource's `spec` in Kubernetes.

Every field has the value a laptop needs, so an empty file is a valid fleet: the tiny model, one prefill and one decode
group of two ranks each in the production layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Seconds = Annotated[float, Field(gt=0)]
Port = Annotated[int, Field(ge=0, le=65535)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(_Section):
    """What is served."""

    path: Path | None = Field(
        None, description="Checkpoint folder on every node; none = the tiny model, made on first use."
    )
    name: str | None = Field(None, description="Name in the API; none = the folder's name.")
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        "auto", description="auto = float32 on cpu (exact), the checkpoint's own on cuda."
    )
    version: str = Field("1", description="Weight version that answers carry.")


class PoolConfig(_Section):
    """The groups of one role. A group is `nodes` engine processes with one copy of the model, expert parallel."""

    groups: int = Field(1, ge=0, le=1024, description="Number of groups.")
    nodes: int = Field(2, ge=1, le=64, description="Nodes (ranks) per group.")
    gpus_per_node: int = Field(1, ge=1, le=16, description="GPUs per node; on cpu the engine runs one worker for each.")
    redundant_experts: int = Field(
        0, ge=0, le=1024, description="Further copies of experts, so that a group whose size does not divide them fits."
    )
    max_total_tokens: int | None = Field(
        None, ge=256, description="KV pool per DP rank, in tokens; none = what fits (8,192 on cpu)."
    )
    args: tuple[str, ...] = Field((), description="Further SGLang flags, appended to Tandem's own.")
    env: dict[str, str] = Field(default_factory=dict, description="Further environment of the engine.")


class GatewayConfig(_Section):
    """Where clients connect."""

    host: str = "127.0.0.1"
    port: Port = Field(8000, description="HTTP port; 0 = any free port.")
    replicas: int = Field(1, ge=1, le=256)
    request_timeout_s: Seconds = Field(600, description="A request ends with an error after this.")
    first_token_timeout_s: Seconds = Field(120, description="A pair that has produced nothing by then is given up.")
    stall_timeout_s: Seconds = Field(60, description="A stream without a token for so long is given up.")
    max_body_bytes: int = Field(16 * 2**20, ge=1024)


class ControlConfig(_Section):
    """Where `tandem.v1.FleetControl` (gRPC) listens."""

    host: str = "127.0.0.1"
    port: Port = Field(9000, description="gRPC port; 0 = any free port.")


class StateConfig(_Section):
    """Where shared state lives."""

    url: str = Field("embedded", description='"embedded" (a file beside the logs) or redis://host:port/db.')

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: str) -> str:
        if url == "embedded" or url.startswith(("embedded:", "redis://", "rediss://", "unix://")):
            return url
        raise ValueError('must be "embedded" or a redis:// URL')


class RayConfig(_Section):
    """The Ray cluster that places the ranks."""

    address: str | None = Field(None, description="Address of a running Ray cluster; none = start one on this machine.")
    namespace: str | None = Field(None, description="Ray namespace; none = tandem-<fleet name>.")


class TimeoutConfig(_Section):
    """Deadlines of the fleet's own work."""

    group_start_s: Seconds = Field(300, description="A group that is not ready by then is restarted.")
    drain_s: Seconds = Field(120, description="A drain that is not finished by then stops the group.")
    stop_s: Seconds = Field(10, description="Grace between SIGTERM and SIGKILL.")


class FleetConfig(_Section):
    """A whole fleet."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$")] = "laptop"
    device: Literal["cpu", "cuda"] = "cpu"
    model: ModelConfig = Field(default_factory=ModelConfig)
    prefill: PoolConfig = Field(default_factory=PoolConfig)
    decode: PoolConfig = Field(default_factory=PoolConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    control: ControlConfig = Field(default_factory=ControlConfig)
    state: StateConfig = Field(default_factory=StateConfig)
    ray: RayConfig = Field(default_factory=RayConfig)
    timeouts: TimeoutConfig = Field(default_factory=TimeoutConfig)
