"""The one configuration schema: `fleet.yaml` on a laptop, the `Fleet` resource's `spec` in Kubernetes.

Every field has the value a laptop needs, so an empty file is a valid fleet: the tiny model, one prefill and one decode
group of two ranks each in the production layout.
"""

from __future__ import annotations

import ipaddress
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.alias_generators import to_camel

from tandem.core.pair_times import CONFIRM_KV_S

Seconds = Annotated[float, Field(gt=0)]
Port = Annotated[int, Field(ge=0, le=65535)]
Limit = Annotated[int, Field(ge=1)]
Dollars = Annotated[Decimal, Field(ge=0, decimal_places=6)]
TenantName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9_.]{0,61}[a-z0-9])?$")]
TimeOfDay = Annotated[str, Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")]
CertificateSubject = Annotated[str, Field(pattern=r"^(CN|DNS|URI|email):.+$")]


def kubernetes_name(field: str) -> str:
    """A field's name in a Kubernetes resource: ttft_s is ttftSeconds there, gpus_per_node gpusPerNode."""
    return to_camel(f"{field}econds" if field.endswith("_s") else field)


class Section(BaseModel):
    """A part of a configuration. In Kubernetes its fields have other names (`kubernetes_name`); both are read."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=kubernetes_name,
        validate_by_name=True,
        validate_by_alias=True,
        loc_by_alias=False,
    )


class ModelConfig(Section):
    """What is served."""

    path: Path | None = Field(
        None, description="Checkpoint folder on every node; none = the tiny model, made on first use."
    )
    name: str | None = Field(None, description="Name in the API; none = the folder's name.")
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        "auto", description="auto = float32 on cpu (exact), the checkpoint's own on cuda."
    )
    version: str = Field("1", description="Weight version that answers carry.")


class ScheduleConfig(Section):
    """Groups that a pool has at least at some times of the week, in UTC; a window may pass midnight."""

    days: tuple[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"], ...] = Field(
        ("mon", "tue", "wed", "thu", "fri", "sat", "sun"), min_length=1, description="Days on which it begins."
    )
    begin: TimeOfDay = Field(description="HH:MM.")
    end: TimeOfDay = Field(description="HH:MM; not after begin = on the next day.")
    min_groups: int = Field(ge=0, le=1024, description="While it lasts.")


class AutoscalingConfig(Section):
    """How the number of a pool's groups follows its load (docs/planning.md)."""

    min_groups: int = Field(1, ge=0, le=1024, description="0 = none while nobody asks.")
    max_groups: int = Field(4, ge=1, le=1024, description="Never more than that.")
    ttft_s: Seconds | None = Field(None, description="Time to first token to keep (prefill); none = routing.ttft_s.")
    itl_s: Seconds | None = Field(None, description="Time between tokens to keep (decode); none = routing.itl_s.")
    percentile: float = Field(0.95, ge=0.5, le=0.999, description="Share of requests that should keep it.")
    target_use: float = Field(
        0.75, gt=0, lt=1, description="Share of its capacity that a group should be used to: load, queue and KV cache."
    )
    up_cooldown_s: float = Field(15, ge=0, description="After a change, until groups may be added.")
    down_cooldown_s: float = Field(300, ge=0, description="After a change, until groups may be removed.")
    idle_s: float = Field(600, ge=0, description="With min_groups 0: no request for so long, and the last group goes.")
    manual_hold_s: float = Field(
        900, ge=0, description="After somebody has scaled by hand, their number stands so long."
    )
    schedule: tuple[ScheduleConfig, ...] = Field((), max_length=64, description="Further lower bounds, by time.")

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingConfig:
        if self.min_groups > self.max_groups:
            raise ValueError(f"min_groups ({self.min_groups}) is above max_groups ({self.max_groups})")
        for window in self.schedule:
            if window.min_groups > self.max_groups:
                raise ValueError(
                    f"a schedule asks for {window.min_groups} groups, above max_groups ({self.max_groups})"
                )
        return self


class PlanningConfig(Section):
    """What the pools' autoscaling has in common."""

    gpu_budget: int | None = Field(None, ge=1, description="GPUs that both pools may use together; none = no limit.")
    tick_s: float = Field(2.0, ge=0.5, le=60, description="How often it looks at the load.")
    fast_window_s: float = Field(10, ge=1, le=600, description="The reactive loop looks back so far.")
    slow_window_s: float = Field(120, ge=10, le=7200, description="The rate-based loop looks back so far.")


class PoolConfig(Section):
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
    autoscaling: AutoscalingConfig | None = Field(None, description="None = as many groups as somebody says.")


class TlsConfig(Section):
    """Certificates of the gateway, in PEM files. A file that changes is read again, without a restart."""

    certificate: Path = Field(description="The gateway's certificate, followed by those that lead to its CA.")
    key: Path = Field(description="Private key of the certificate, without a passphrase.")
    client_ca: Path | None = Field(None, description="CAs that client certificates come from (mTLS); none = no mTLS.")
    client_certificates: Literal["required", "optional"] = Field(
        "required",
        description='With client_ca: "optional" also lets in who has none, such as probes of /health. '
        "gRPC asks for them only where they are required.",
    )
    min_version: Literal["1.2", "1.3"] = Field("1.2", description="Of HTTP; gRPC takes 1.2 and 1.3.")


class GatewayLimits(Section):
    """What a gateway bears, wherever it listens."""

    replicas: int = Field(1, ge=1, le=256, description="Gateways that listen.")
    request_timeout_s: Seconds = Field(600, description="A request ends with an error after this.")
    first_token_timeout_s: Seconds = Field(120, description="A pair that has produced nothing by then is given up.")
    stall_timeout_s: Seconds = Field(15, description="A stream without a token for so long goes on with another pair.")
    capacity_wait_s: float = Field(
        60, ge=0, description="How long a request waits for a group that is starting, where none is ready."
    )
    confirm_kv_s: float = Field(
        CONFIRM_KV_S, ge=0, description="How long a stream's first tokens wait for prefill's word that the KV is good."
    )
    max_body_bytes: int = Field(16 * 2**20, ge=1024, description="A larger request is refused.")


class GatewayConfig(GatewayLimits):
    """Where clients connect."""

    host: str = "127.0.0.1"
    port: Port = Field(8000, description="HTTP port; 0 = any free port.")
    grpc_port: Port = Field(9001, description="gRPC port; 0 = any free port.")
    auth: Literal["auto", "required", "off"] = Field(
        "auto", description="Whether every request needs a key, token or certificate; auto = unless host is loopback."
    )
    tls: TlsConfig | None = Field(None, description="None = plain HTTP.")
    summoned: tuple[Literal["prefill", "decode"], ...] = Field(
        (),
        description="Roles that have a group as soon as a request waits for one, as Kubernetes' operator sees to it.",
    )

    @property
    def auth_required(self) -> bool:
        """Whether a request that shows neither key, token nor certificate is refused."""
        return self.auth == "required" or (self.auth == "auto" and not is_loopback(self.host))


class ControlConfig(Section):
    """Where `tandem.v1.FleetControl` (gRPC) listens."""

    host: str = "127.0.0.1"
    port: Port = Field(9000, description="gRPC port; 0 = any free port.")


class StateConfig(Section):
    """Where shared state lives."""

    url: str = Field("embedded", description='"embedded" (a file beside the logs) or redis://host:port/db.')

    @field_validator("url")
    @classmethod
    def _known_scheme(cls, url: str) -> str:
        if url == "embedded" or url.startswith(("embedded:", "redis://", "rediss://", "unix://")):
            return url
        raise ValueError('must be "embedded" or a redis:// URL')


class RayConfig(Section):
    """The Ray cluster that places the ranks."""

    address: str | None = Field(None, description="Address of a running Ray cluster; none = start one on this machine.")
    namespace: str | None = Field(None, description="Ray namespace; none = tandem-<fleet name>.")
    group_resources: bool = Field(
        False,
        description="Nodes belong to groups and gateways (`tandem node join`): tandem-group-<id> and tandem-gateway.",
    )


class TimeoutConfig(Section):
    """Deadlines of the fleet's own work."""

    group_start_s: Seconds = Field(300, description="A group that is not ready by then is restarted.")
    hang_s: float | None = Field(
        None,
        ge=5,
        le=3600,
        description="A ready engine that shows no progress for so long is dead; blocked, for 0.6 of it; "
        "none = 10 on cpu, 60 on cuda.",
    )
    drain_s: Seconds = Field(120, description="A drain that is not finished by then stops the group.")
    migrate_s: Seconds = Field(30, description="So long before that, its streams begin to move to other groups.")
    refresh_drain_s: Seconds = Field(
        660, description="A group that is not empty by then keeps its weights, and the refresh fails."
    )
    stop_s: Seconds = Field(10, description="Grace between SIGTERM and SIGKILL.")


class TenantConfig(Section):
    """What one tenant may use. A limit that is not given does not exist; limits hold over all gateway replicas."""

    priority: Literal["high", "normal", "low"] = Field(
        "normal", description="Highest class its requests may ask for, and theirs if they ask for none."
    )
    weight: float = Field(1.0, gt=0, le=1000, description="Share against other tenants of the same class.")
    requests_per_minute: Limit | None = Field(None, description="Requests that may begin in a minute.")
    input_tokens_per_minute: Limit | None = Field(None, description="Prompt tokens in a minute.")
    output_tokens_per_minute: Limit | None = Field(None, description="Tokens of answers in a minute.")
    concurrency: Limit | None = Field(None, description="Requests that may wait or run at once.")
    models: tuple[str, ...] | None = Field(None, description="Names of the models it may use; none = every one.")
    subjects: tuple[str, ...] = Field((), description="`sub` of the JWTs that are this tenant's.")
    certificate_subjects: tuple[CertificateSubject, ...] = Field(
        (), description="Names in the client certificates that are this tenant's, such as CN:acme or URI:spiffe://a/b."
    )


class OidcConfig(Section):
    """The issuer whose JWTs are taken in place of API keys."""

    issuer: str = Field(description="URL; the `iss` of its tokens, letter by letter.")
    audience: str = Field(min_length=1, description="A token must have this among its `aud`.")
    jwks_url: str | None = Field(
        None, description="Its keys; none = `jwks_uri` of <issuer>/.well-known/openid-configuration."
    )
    ca: Path | None = Field(None, description="CAs (PEM) to trust for these URLs; none = the system's.")
    tenant_claim: str = Field("tenant", min_length=1, description="Claim that names the tenant.")
    algorithms: tuple[
        Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"], ...
    ] = Field(
        ("RS256", "PS256", "ES256", "ES384", "EdDSA"),
        min_length=1,
        description="Accepted signatures: never a shared secret (HS256), which would be public here.",
    )
    leeway_s: float = Field(30, ge=0, le=300, description="Allowed difference between the issuer's clock and ours.")
    cache_s: Seconds = Field(600, description="The issuer's keys are asked for again after this.")
    stale_s: Seconds = Field(86400, description="While the issuer does not answer, its last keys are good for this.")
    timeout_s: Seconds = Field(5, description="The issuer must answer within this.")

    @field_validator("issuer", "jwks_url")
    @classmethod
    def _safe(cls, url: str | None) -> str | None:
        if url is None or is_safe_url(url):
            return url
        raise ValueError("must be an https:// URL (http:// only on loopback): whoever can change the keys is anybody")


class RoutingConfig(Section):
    """What routing aims at (docs/routing.md)."""

    ttft_s: Seconds = Field(2.0, description="Time to first token that a pair should keep.")
    itl_s: Seconds = Field(0.05, description="Time between tokens that a pair should keep.")
    index_bytes: int = Field(128 * 2**20, ge=2**20, description="Memory of the prefix index of a gateway replica.")


class AdmissionConfig(Section):
    """How many requests run at once, and how long others wait (docs/access.md)."""

    running_per_decode_rank: int = Field(
        64, ge=1, description="Requests that run at once for each DP rank of the decode groups; the others wait here."
    )
    tokens_per_prefill_rank: int = Field(
        32_768, ge=1, description="Prompt tokens that are worked on at once for each DP rank of the prefill groups."
    )
    queue_s: Seconds = Field(30, description="A request that would wait longer for its turn is refused at once (429).")
    max_waiting: int = Field(4096, ge=0, description="Requests that may wait on one gateway replica.")


class IdempotencyConfig(Section):
    """Answers to requests with an `Idempotency-Key` (docs/gateway-death.md)."""

    keep_s: Seconds = Field(600, description="A complete answer is given again for so long.")
    orphan_s: float = Field(
        30, ge=0, description="A request whose client has gone runs on for so long, as it may come back."
    )
    tenant_bytes: int = Field(64 * 2**20, ge=2**16, description="Kept for one tenant; then its oldest go.")
    total_bytes: int = Field(256 * 2**20, ge=2**16, description="Kept in all; then the oldest go.")


class PriceConfig(Section):
    """Dollars per million tokens."""

    hit: Dollars = Field(Decimal("0.14"), description="Prompt tokens that the prefix cache held.")
    miss: Dollars = Field(Decimal("0.55"), description="All other prompt tokens.")
    output: Dollars = Field(Decimal("2.19"), description="Tokens of answers, reasoning included.")


class MeteringConfig(Section):
    """Usage records: one for each request (docs/metering.md)."""

    sink: Literal["auto", "file", "redis", "off"] = Field("auto", description="auto = redis if the state is there.")
    folder: Path | None = Field(None, description="On every node, local; none = usage/ in the fleet's folder.")
    rotate_bytes: int = Field(256 * 2**20, ge=2**20, description="A file ends at this size, and with its day.")
    retention_days: float = Field(0, ge=0, description="Older files are removed; 0 = never.")
    fsync_s: float = Field(1.0, ge=0, description="Records that a power failure may take, in seconds.")
    stream_records: int = Field(1_000_000, ge=1000, description="Records kept in Redis (about 490 bytes each).")
    spool_bytes: int = Field(2**30, ge=2**20, description="Records that wait on a node for Redis.")
    default_price: PriceConfig = Field(default_factory=PriceConfig, description="Of models without an own price.")
    prices: dict[str, PriceConfig] = Field(default_factory=dict, description="By the model's name.")
    gpu_hour_price: Dollars | None = Field(None, description="Dollars; for `tandem usage --gpu-hours`.")


class ObservabilityConfig(Section):
    """Traces and logs (docs/observability.md)."""

    otlp_endpoint: str | None = Field(None, description="Such as http://collector:4318/v1/traces; none = no traces.")
    sample_ratio: float = Field(1.0, ge=0, le=1, description="Share of requests that are traced.")
    follow_client: bool = Field(True, description="A client's own decision to trace comes first.")
    log_format: Literal["json", "plain"] = Field("json", description="Of the log lines.")
    log_prompts: bool = Field(False, description="Prompts in the log: only where that is allowed.")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_safe_url(url: str) -> bool:
    """Whether nobody on the way can change what `url` answers: https, or this machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return bool(host) and (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host)))


class FleetConfig(Section):
    """A whole fleet."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?$")] = "laptop"
    device: Literal["cpu", "cuda"] = "cpu"
    model: ModelConfig = Field(default_factory=ModelConfig)
    prefill: PoolConfig = Field(default_factory=PoolConfig)
    decode: PoolConfig = Field(default_factory=PoolConfig)
    planning: PlanningConfig = Field(default_factory=PlanningConfig)
    gateway: GatewayConfig = Field(default_factory=GatewayConfig)
    control: ControlConfig = Field(default_factory=ControlConfig)
    state: StateConfig = Field(default_factory=StateConfig)
    ray: RayConfig = Field(default_factory=RayConfig)
    timeouts: TimeoutConfig = Field(default_factory=TimeoutConfig)
    tenants: dict[TenantName, TenantConfig] = Field(default_factory=dict, description="By name.")
    default_tenant: TenantConfig = Field(
        default_factory=TenantConfig, description="For who shows no key where none is asked for; named anonymous."
    )
    oidc: OidcConfig | None = Field(None, description="None = no JWTs.")
    routing: RoutingConfig = Field(default_factory=RoutingConfig)
    admission: AdmissionConfig = Field(default_factory=AdmissionConfig)
    idempotency: IdempotencyConfig = Field(default_factory=IdempotencyConfig)
    metering: MeteringConfig = Field(default_factory=MeteringConfig)
    observability: ObservabilityConfig = Field(default_factory=ObservabilityConfig)

    @field_validator("tenants")
    @classmethod
    def _told_apart(cls, tenants: dict[str, TenantConfig]) -> dict[str, TenantConfig]:
        if "anonymous" in tenants:
            raise ValueError("anonymous is the name of default_tenant; choose another")
        for field in ("subjects", "certificate_subjects"):
            owner: dict[str, str] = {}
            for name, tenant in tenants.items():
                for subject in getattr(tenant, field):
                    if owner.setdefault(subject, name) != name:
                        raise ValueError(f"{name}.{field}: {subject!r} is {owner[subject]}'s already")
        return tenants

    @field_validator("default_tenant")
    @classmethod
    def _without_subjects(cls, tenant: TenantConfig) -> TenantConfig:
        if tenant.subjects or tenant.certificate_subjects:
            raise ValueError("has no subjects: it is for who shows nothing")
        return tenant
