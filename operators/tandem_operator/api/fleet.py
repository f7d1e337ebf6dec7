"""Fleet: one model behind one gateway, from one prefill pool and one decode pool."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from tandem.config import (
    AdmissionConfig,
    GatewayLimits,
    IdempotencyConfig,
    MeteringConfig,
    ModelConfig,
    ObservabilityConfig,
    OidcConfig,
    PlanningConfig,
    PoolConfig,
    RoutingConfig,
    Section,
    TenantConfig,
    TenantName,
    TimeoutConfig,
)
from tandem_operator.api.pods import EnginePodOptions, PodOptions, Quantity, RedisPodOptions
from tandem_operator.api.pool import Image, ModelVolume, Rollout


class Model(ModelConfig):
    """What is served."""

    version: str = Field(
        "1",
        min_length=1,
        max_length=64,
        description="Weight version that answers carry; 1 = made of the path, so that another path has another one.",
    )
    volume: ModelVolume = Field(default_factory=ModelVolume)


class FleetPool(PoolConfig):
    """The groups of one role."""

    gpus_per_node: int = Field(8, ge=1, le=16, description="GPUs per node; on cpu the engine runs one worker for each.")
    rollout: Rollout = Field(default_factory=Rollout)
    pods: EnginePodOptions = Field(default_factory=EnginePodOptions)


class Images(Section):
    """Container images."""

    engine: Image = Field(description="SGLang and Tandem; the pods of groups run it.")
    platform: Image | None = Field(None, description="Tandem without the engine: head and gateways; none = engine.")
    redis: Image = Field(default_factory=lambda: Image(name="redis:7.4-alpine"))


class Slo(Section):
    """What the fleet is to keep; autoscaling and routing aim at it."""

    ttft_s: float = Field(2.0, gt=0, description="Time to first token.")
    itl_s: float = Field(0.05, gt=0, description="Time between tokens.")


class FleetGateway(GatewayLimits):
    """The gateway: pods that listen themselves, behind one Service."""

    auth: Literal["required", "off"] = Field("required", description="Whether every request needs a key or token.")
    tls_secret: str | None = Field(None, description="kubernetes.io/tls Secret; none = plain HTTP.")
    service_type: Literal["ClusterIP", "LoadBalancer", "NodePort"] = Field("ClusterIP", description="Of its Service.")
    service_annotations: dict[str, str] = Field(default_factory=dict, description="Of its Service.")
    http_port: int = Field(8000, ge=1, le=65535, description="HTTP port of its pods and its Service.")
    grpc_port: int = Field(9001, ge=1, le=65535, description="gRPC port of its pods and its Service.")
    pods: PodOptions = Field(default_factory=PodOptions)


class SecretKey(Section):
    """One value of a Secret in the fleet's namespace."""

    name: str = Field(min_length=1, description="Of the Secret.")
    key: str = Field(min_length=1, description="In its data.")


class Redis(Section):
    """Where shared state lives."""

    url_secret: SecretKey | None = Field(None, description="redis:// URL of one that is there; none = one is run.")
    storage: Quantity | None = Field(None, description="Size of a volume for it; none = it forgets with its pod.")
    storage_class: str | None = Field(None, description="Of the volume; none = the cluster's default.")
    pods: RedisPodOptions = Field(default_factory=RedisPodOptions)


class RayCluster(Section):
    """The Ray cluster that places the ranks."""

    address: str | None = Field(
        None,
        pattern=r"^(\[[0-9a-fA-F:]+\]|[^\s:/]+):[0-9]{1,5}$",
        description="host:port of the GCS of one that is there (KubeRay's), whose nodes then run the groups; cannot be"
        " changed later. None = one is run, of the fleet's own.",
    )
    auth_token_secret: SecretKey | None = Field(
        None, description="With address: the token that Ray asks for; none = it asks for none."
    )
    storage: Quantity | None = Field(None, description="Size of a volume for what its head remembers.")
    storage_class: str | None = Field(None, description="Of the volume; none = the cluster's default.")
    pods: PodOptions = Field(default_factory=PodOptions)


class FleetSpec(Section):
    """Of a Fleet."""

    device: Literal["cpu", "cuda"] = Field("cuda", description="What the engines run on; cpu is for trying it out.")
    model: Model = Field(default_factory=Model)
    images: Images
    prefill: FleetPool = Field(default_factory=FleetPool)
    decode: FleetPool = Field(default_factory=FleetPool)
    slo: Slo = Field(default_factory=Slo)
    planning: PlanningConfig = Field(default_factory=PlanningConfig)
    gateway: FleetGateway = Field(default_factory=FleetGateway)
    redis: Redis = Field(default_factory=Redis)
    ray: RayCluster = Field(default_factory=RayCluster)
    timeouts: TimeoutConfig = Field(default_factory=TimeoutConfig)
    tenants: dict[TenantName, TenantConfig] = Field(default_factory=dict, description="By name.")
    tenants_secret: str | None = Field(
        None, description="Secret whose tenants.yaml holds further tenants; none = only these."
    )
    default_tenant: TenantConfig = Field(default_factory=TenantConfig, description="For who shows no key.")
    oidc: OidcConfig | None = Field(None, description="Whose JWTs are taken; none = no JWTs.")
    routing: RoutingConfig = Field(default_factory=RoutingConfig, description="Its aims are those of slo.")
    admission: AdmissionConfig = Field(default_factory=AdmissionConfig)
    idempotency: IdempotencyConfig = Field(default_factory=IdempotencyConfig)
    metering: MeteringConfig = Field(default_factory=MeteringConfig)
    observability: ObservabilityConfig = Field(default_factory=ObservabilityConfig)
    paused: bool = Field(False, description="The operator changes nothing of it.")

    @model_validator(mode="after")
    def _within_budget(self) -> FleetSpec:
        budget = self.planning.gpu_budget
        least = sum(
            (pool.autoscaling.min_groups if pool.autoscaling else pool.groups) * pool.nodes * pool.gpus_per_node
            for pool in (self.prefill, self.decode)
        )
        if budget is not None and least > budget:
            raise ValueError(f"its groups need {least} GPUs at least, above planning.gpuBudget ({budget})")
        return self
