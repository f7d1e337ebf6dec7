"""What every host of a fleet does, on a laptop (`host.py`) as in a pod (`node_head.py`): model, record, controller."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tandem.config import FleetConfig
from tandem.core.group import Policy
from tandem.core.layout import LayoutError
from tandem.core.shape import ShapeError
from tandem.core.types import Role
from tandem.fleet.plan import plan_pool, read_shape
from tandem.fleet.ray_processes import HEAD_RESOURCE
from tandem.fleet.snapshot import FleetRecord
from tandem.models.tiny import ensure_tiny

if TYPE_CHECKING:  # they import Ray, which takes a second
    from tandem.fleet.controller import ControllerSettings
    from tandem.fleet.engines import Engines
    from tandem.fleet.rank import RankSettings

CONTROLLER_DEADLINE_S = 60.0


class HostError(RuntimeError):
    """The fleet cannot start or go on; the message is one sentence."""


class ServedModel(NamedTuple):
    """The checkpoint's folder on every node, and its name in the API."""

    path: Path
    name: str

    @classmethod
    def of(cls, config: FleetConfig, folder: Path) -> ServedModel:
        """The configured one, or the tiny model in `folder`."""
        path = config.model.path or folder / "models" / "tiny"
        return cls(path, config.model.name or path.name)


async def check_model(config: FleetConfig, model: ServedModel) -> None:
    """Make the tiny model unless another is configured, and check that every pool can run it. Raises HostError."""
    if config.model.path is None:
        await asyncio.to_thread(ensure_tiny, model.path)
    try:
        shape = await asyncio.to_thread(read_shape, model.path)
        for role in Role:
            plan_pool(config, role, shape)
    except OSError as error:
        raise HostError(f"{model.path} holds no model: {error}") from error
    except (LayoutError, ShapeError) as error:
        raise HostError(str(error)) from error


def fleet_record(config: FleetConfig, model: ServedModel) -> FleetRecord:
    """What the fleet has in common."""
    return FleetRecord(
        name=config.name,
        model_path=str(model.path),
        model_name=model.name,
        model_version=config.model.version,
    )


def controller_settings(
    config: FleetConfig,
    model: ServedModel,
    ranks: RankSettings,
    *,
    store_folder: Path,
    log: Path,
    engines: Engines | None = None,
    version: str = "",
    place: str = HEAD_RESOURCE,
) -> ControllerSettings:
    """What the controller is told. `engines`: None = SGLang. `version`: of these settings, if they may change. `place`:
    Ray resource of the node that it lives on.

    Raises HostError.
    """
    from tandem.fleet.autoscale import autoscale_settings
    from tandem.fleet.controller import ControllerSettings
    from tandem.fleet.engines import SglangEngines
    from tandem.fleet.hands import HandsSettings

    try:
        autoscale = autoscale_settings(config)
    except ValueError as error:
        raise HostError(str(error)) from error
    return ControllerSettings(
        fleet=fleet_record(config, model),
        store_url=config.state.url,
        store_folder=str(store_folder),
        engines=engines or SglangEngines(config, model=model.path, name=model.name),
        hands=HandsSettings(rank=ranks, stop_grace=config.timeouts.stop_s),
        policy=Policy(start=config.timeouts.group_start_s, migrate=config.timeouts.migrate_s),
        drain=config.timeouts.drain_s,
        refresh_drain=config.timeouts.refresh_drain_s,
        control_host=config.control.host,
        control_port=config.control.port,
        autoscale=autoscale,
        log=str(log),
        version=version,
        place=place,
    )


async def run_controller(settings: ControllerSettings) -> None:
    """Start the controller, or find the one that works by the same settings; returns when it answers.

    Raises HostError.
    """
    import ray

    from tandem.fleet.controller import renew_controller

    try:
        controller = await asyncio.to_thread(renew_controller, settings, CONTROLLER_DEADLINE_S)
        await asyncio.to_thread(
            ray.get, controller.ready.remote(CONTROLLER_DEADLINE_S), timeout=CONTROLLER_DEADLINE_S + 5
        )
    except (ray.exceptions.RayError, TimeoutError) as error:
        raise HostError(f"the controller did not start: {error}") from error
