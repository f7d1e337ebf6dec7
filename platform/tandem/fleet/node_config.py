"""The configuration of a fleet whose head runs in a pod: `fleet.json`, and what only a secret may hold."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import ValidationError

from tandem.config import FleetConfig
from tandem.fleet.host_steps import HostError


def read_config(file: Path, *, tenants: Path | None = None, state_url: str = "") -> FleetConfig:
    """The configuration in `file`. `tenants`: YAML file of further ones, by name, which come before those of the same
    name in `file`. `state_url`: in place of its own. Raises HostError."""
    try:
        config = FleetConfig.model_validate_json(file.read_bytes())
    except OSError as error:
        raise HostError(f"{file} cannot be read: {error}") from error
    except ValidationError as error:
        raise HostError(f"{file} is no fleet's configuration: {_mistakes(error)}") from error
    config = with_secrets(config, tenants=tenants, state_url=state_url)
    if config.state.url.startswith("embedded"):
        raise HostError("state.url is embedded, a file that other nodes cannot see: give a redis:// URL")
    if config.ray.address is not None and not config.ray.address.rpartition(":")[2].isdecimal():
        raise HostError(f"ray.address is {config.ray.address}: a head needs host:port of the cluster's GCS")
    if config.ray.address is not None and config.model.path is None:
        raise HostError("ray.address is set, and model.path is not: name a folder that is on all nodes of that cluster")
    return config


def with_secrets(config: FleetConfig, *, tenants: Path | None = None, state_url: str = "") -> FleetConfig:
    """`config` with what the pod's environment names besides, as in `read_config`. Raises HostError."""
    changes: dict[str, object] = {}
    if tenants is not None:
        changes["tenants"] = {**{name: one.model_dump() for name, one in config.tenants.items()}, **_read(tenants)}
    if state_url:
        changes["state"] = {"url": state_url}
    try:
        return FleetConfig.model_validate({**config.model_dump(), **changes})
    except ValidationError as error:
        raise HostError(f"with {tenants or 'TANDEM_STATE_URL'} it is no configuration: {_mistakes(error)}") from error


def _read(file: Path) -> dict[str, object]:
    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise HostError(f"{file} cannot be read: {error}") from error
    except yaml.YAMLError:
        raise HostError(f"{file} is not YAML") from None  # its words may be secret
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise HostError(f"{file} must hold tenants by name")
    return found


def _mistakes(error: ValidationError) -> str:
    """Where what is wrong, without the values: they may be secret."""
    return "; ".join(f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors())
