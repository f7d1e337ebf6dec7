"""Keeps the gateways' deployment as the configuration says, on nodes that come and go by themselves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

from tandem.config import FleetConfig
from tandem.fleet.node_cluster import gateway_place

log = logging.getLogger(__name__)

_LOOK_S = 5.0
"""Serve tells nobody when replicas have failed; this is how often we look."""
_AGAIN_S = 5.0


class Gateways:
    """`want` says how they shall be, `keep` sees to it. Needs a connection to Ray."""

    def __init__(self, *, folder: Path) -> None:
        self._folder = folder
        self._wanted: tuple[FleetConfig, Path] | None = None
        self._changed = asyncio.Event()

    def want(self, config: FleetConfig, model_path: Path) -> None:
        """From now on as in `config`; shape and tokenizer are in `model_path`."""
        self._wanted = config, model_path
        self._changed.set()

    async def keep(self) -> None:
        """Deploy what is wanted, again whenever that changes, or has failed. Serve itself replaces single replicas."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            assert self._wanted is not None
            if not await self._deploy(*self._wanted):
                await asyncio.sleep(_AGAIN_S)
                self._changed.set()
            await self._until_changed()

    async def _deploy(self, config: FleetConfig, model_path: Path) -> bool:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        from tandem.gateway.deployment import deploy

        try:
            await asyncio.to_thread(
                deploy,
                config,
                model_path=model_path,
                store_url=config.state.url,
                folder=self._folder,
                resources=gateway_place(config),
                wait=False,
            )
        except (RayError, RayServeException, RuntimeError, TimeoutError) as error:
            log.error("the gateways cannot be deployed yet: %s", error)
            return False
        log.info("%d gateways are wanted", config.gateway.replicas)
        return True

    async def _until_changed(self) -> None:
        """Return when there is something to do: another wish, or a deployment that Serve has given up."""
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        from tandem.gateway.deployment import state

        while not self._changed.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._changed.wait()
            try:
                assert self._wanted is not None
                status, why = await asyncio.to_thread(state, self._wanted[0])
            except (RayError, RayServeException, TimeoutError) as error:
                log.warning("Serve does not answer: %s", error)
                continue
            if status == "DEPLOY_FAILED":
                log.error("the gateways did not start, and are deployed again: %s", why)
                self._changed.set()
