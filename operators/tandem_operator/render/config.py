"""fleet.json: the configuration that a fleet's own processes read, from the spec of its Fleet."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ValidationError

from tandem.config import (
    ControlConfig,
    FleetConfig,
    GatewayConfig,
    GatewayLimits,
    ModelConfig,
    PoolConfig,
    RayConfig,
    StateConfig,
    TlsConfig,
)
from tandem.core.types import Role
from tandem_operator.api.fleet import FleetPool, FleetSpec
from tandem_operator.names import CONTROL_PORT, REDIS_PORT, Object
from tandem_operator.render.pods import TLS_FOLDER, model_path
from tandem_operator.revision import weights_version


class SpecError(ValueError):
    """A spec cannot be used. The message names every mistake by its field in the resource; `reason` is one word."""

    def __init__(self, message: str, reason: str = "Invalid") -> None:
        super().__init__(message)
        self.reason = reason


def fleet_spec(spec: object) -> FleetSpec:
    """A Fleet's spec as values. Raises SpecError: the server's schema cannot know every rule."""
    try:
        found = FleetSpec.model_validate(spec)
    except ValidationError as error:
        raise SpecError(sentence(error)) from error
    if found.ray.address is not None and found.model.path is None:
        raise SpecError(
            "spec.model.path: with ray.address it must name a folder that all nodes of that Ray cluster have"
        )
    return found


def sentence(error: ValidationError) -> str:
    """All that is wrong, one after the other."""
    mistakes = []
    for mistake in error.errors():
        where = ".".join(("spec", *(str(part) for part in mistake["loc"])))
        mistakes.append(f"{where}: {mistake['msg'].removeprefix('Value error, ')}")
    return "; ".join(mistakes)


def fleet_config(name: str, namespace: str, spec: FleetSpec) -> FleetConfig:
    """The configuration. Raises SpecError for what only shows when it is put together.

    It has no groups, and no autoscaling of them: here the operator puts them, with engine settings of their own.
    """
    gateway = spec.gateway
    state = f"redis://{name}-redis.{namespace}.svc:{REDIS_PORT}/0"
    if spec.redis.url_secret is not None:
        state = "redis://TANDEM_STATE_URL/0"  # each process gets the real one from the Secret
    try:
        return FleetConfig(
            name=name,
            device=spec.device,
            model=_model(spec),
            prefill=_pool(spec.prefill),
            decode=_pool(spec.decode),
            gateway=GatewayConfig(
                **_fields(gateway, GatewayLimits),
                host="0.0.0.0",
                port=gateway.http_port,
                grpc_port=gateway.grpc_port,
                auth=gateway.auth,
                tls=_tls() if gateway.tls_secret else None,
                summoned=_summoned(spec),
            ),
            control=ControlConfig(host="0.0.0.0", port=CONTROL_PORT),
            state=StateConfig(url=state),
            ray=_ray(name, namespace, spec),
            timeouts=spec.timeouts,
            tenants=spec.tenants,
            default_tenant=spec.default_tenant,
            oidc=spec.oidc,
            routing=spec.routing.model_copy(update={"ttft_s": spec.slo.ttft_s, "itl_s": spec.slo.itl_s}),
            admission=spec.admission,
            idempotency=spec.idempotency,
            metering=spec.metering,
            observability=spec.observability,
        )
    except ValidationError as error:
        raise SpecError(sentence(error)) from error


def config_json(config: FleetConfig) -> str:
    """As it stands in the ConfigMap: what differs from the defaults."""
    return config.model_dump_json(exclude_defaults=True, indent=2)


def config_in(config_map: Object) -> RayConfig | None:
    """What the configuration that is there says of Ray; None = it says nothing that can be read."""
    try:
        return FleetConfig.model_validate_json((config_map.get("data") or {}).get("fleet.json", "")).ray
    except ValidationError:
        return None


def ray_namespace(name: str, namespace: str) -> str:
    """Ray namespace of a fleet in another's cluster, where other fleets may be called the same."""
    return f"tandem-{namespace}.{name}"  # a dot is in neither


def _ray(name: str, namespace: str, spec: FleetSpec) -> RayConfig:
    if spec.ray.address is None:
        return RayConfig(group_resources=True)
    return RayConfig(address=spec.ray.address, namespace=ray_namespace(name, namespace))


def _model(spec: FleetSpec) -> ModelConfig:
    path = model_path(str(spec.model.path) if spec.model.path else None, spec.model.volume)
    said = {"path": Path(path) if path else None, "version": weights_version(path, spec.model.version)}
    return ModelConfig.model_validate({**_fields(spec.model, ModelConfig), **said})


def _pool(pool: FleetPool) -> PoolConfig:
    """Its shape and all that the head checks it with; flags and environment come with each group."""
    return PoolConfig(
        groups=0,
        nodes=pool.nodes,
        gpus_per_node=pool.gpus_per_node,
        redundant_experts=pool.redundant_experts,
        max_total_tokens=pool.max_total_tokens,
    )


def _summoned(spec: FleetSpec) -> tuple[Role, ...]:
    """Roles whose last group goes while nobody asks: gateways let requests wait for one."""
    pools = {Role.PREFILL: spec.prefill, Role.DECODE: spec.decode}
    return tuple(role for role, pool in pools.items() if pool.autoscaling and pool.autoscaling.min_groups == 0)


def _tls() -> TlsConfig:
    return TlsConfig(certificate=Path(TLS_FOLDER) / "tls.crt", key=Path(TLS_FOLDER) / "tls.key")


def _fields(value: BaseModel, kind: type[BaseModel]) -> dict[str, object]:
    return {name: getattr(value, name) for name in kind.model_fields}
