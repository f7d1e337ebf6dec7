"""Which model the head of a fleet goes by while its configuration may come to name another one.

The groups' weights are their own affair: who puts groups says what they declare (`declare.py`). What follows the
configuration are gateways and controller, which read shape and tokenizer there. So another model is taken when both are
the same, and else nothing of it is done.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from msgspec.structs import replace

from tandem.config import FleetConfig, ModelConfig
from tandem.fleet.engines import Engines, NoEngineError, SglangEngines
from tandem.fleet.fleet_record import change_record, read_record
from tandem.fleet.host_steps import HostError, ServedModel, check_model
from tandem.state import Store, StoreError

log = logging.getLogger(__name__)


async def what_serves(
    store: Store, config: FleetConfig, folder: Path, wrong: HostError
) -> tuple[FleetConfig, ServedModel]:
    """The configuration with the model that the fleet has, where it names one that is `wrong`: a change to it was taken
    back, perhaps, and its folder is gone. `folder`: as of `ServedModel.of`. Raises HostError."""
    record = await read_record(store)
    if record.model_path in ("", str(ServedModel.of(config, folder).path)):
        raise wrong
    has = {"path": Path(record.model_path), "name": record.model_name or None, "version": record.model_version}
    config = config.model_copy(update={"model": ModelConfig.model_validate({**config.model.model_dump(), **has})})
    model = ServedModel.of(config, folder)
    await check_model(config, model)
    log.error("the fleet goes on with the weights that it has: version %s in %s", record.model_version, model.path)
    return config, model


class ModelFollower:
    """Carries out what a configuration says, from the one on that is in force."""

    def __init__(
        self,
        store: Store,
        config: FleetConfig,
        model: ServedModel,
        *,
        folder: Path,
        engines: Engines | None,
        gateways: Callable[[FleetConfig, Path], None],
        controller: Callable[[FleetConfig, ServedModel], Awaitable[None]],
    ) -> None:
        """`engines`: None = SGLang. `gateways`, `controller`: told what is to hold from now on."""
        self._store = store
        self._told = self._runs = config
        self._model = model
        self._folder = folder
        self._engines = engines
        self._gateways = gateways
        self._controller = controller

    async def carry_out(self, config: FleetConfig) -> None:
        """A model that cannot be taken keeps nothing else of the configuration back. Raises HostError."""
        wanted = ServedModel.of(config, self._folder)
        wrong = await self._why_not(wanted) if wanted.path != self._model.path else ""
        if wrong:
            config, wanted = config.model_copy(update={"model": self._told.model}), self._model
        if config != self._told:  # else the controller alone has not taken it yet
            log.info("the configuration has changed")
            try:
                await change_record(self._store, lambda record: replace(record, model_name=wanted.name))
            except StoreError as error:
                raise HostError(str(error)) from error
            self._gateways(config, wanted.path)
            self._told, self._model = config, wanted
        if config != self._runs:
            await self._controller(config, wanted)
            self._runs = config
        if wrong:
            raise HostError(wrong)

    async def _why_not(self, wanted: ServedModel) -> str:
        """Why the fleet cannot have a model in the place of its own; empty = it can."""
        engines = self._engines or SglangEngines(self._told, model=self._model.path, name=self._model.name)
        try:
            await asyncio.to_thread(engines.check_weights, str(wanted.path))
        except NoEngineError as error:
            return f"model.path names weights that the fleet cannot take: {error}"
        return ""
