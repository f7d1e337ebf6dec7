"""Everything that is not an answer of the model: models, health, readiness, the fleet, metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST

from tandem.core.types import FleetSnapshot, GroupState, Role
from tandem.gateway.errors import ApiError
from tandem.gateway.metrics import Metrics
from tandem.gateway.model_card import ModelCard
from tandem.gateway.pairs import PairDriver
from tandem.gateway.requests import model_not_found

Page = tuple[int, bytes, bytes]
"""(status, content type, body)"""


class Pages:
    """Answers GETs at once, from memory."""

    def __init__(
        self,
        replica: str,
        fleet_name: str,
        card: ModelCard,
        driver: PairDriver,
        metrics: Metrics,
        fleet: Callable[[], FleetSnapshot],
    ) -> None:
        self._replica = replica
        self._fleet_name = fleet_name
        self._card = card
        self._driver = driver
        self._metrics = metrics
        self._fleet = fleet
        self._created = int(time.time())
        self._pages: dict[str, Callable[[], Page]] = {
            "/v1/models": self._models,
            "/health": self._health,
            "/ready": self._ready,
            "/fleet": self._whole_fleet,
            "/metrics": self._exposition,
        }

    def get(self, method: str, path: str) -> Page:
        """The page at `path`. Raises ApiError."""
        page = self._pages.get(path)
        if page is None and path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
            if name != self._card.name:
                raise model_not_found(name)
            page = self._one_model
        if page is None:
            raise ApiError(404, f"Invalid URL ({method} {path})")
        if method not in ("GET", "HEAD"):
            raise ApiError(405, f"Not allowed to {method} on {path}; use GET.")
        return page()

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._card.name,
            "object": "model",
            "created": self._created,
            "owned_by": "tandem",
            "max_model_len": self._card.context,
        }

    def _models(self) -> Page:
        return _json({"object": "list", "data": [self._model()]})

    def _one_model(self) -> Page:
        return _json(self._model())

    def _health(self) -> Page:
        return _json({"status": "ok", "replica": self._replica, "fleet": self._fleet_name})

    def _ready(self) -> Page:
        shortage = self._driver.router.shortage()
        if shortage is None:
            return _json({"status": "ready"})
        return _json({"status": "not ready", "reason": shortage.reason}, status=503)

    def _whole_fleet(self) -> Page:
        found = msgspec.to_builtins(self._fleet())
        found["gateway"] = {
            "replica": self._replica,
            "open_requests": self._driver.table.open_requests,
            "open_rooms": self._driver.table.open_rooms,
            "loads": msgspec.to_builtins(self._driver.router.loads()),
        }
        return _json(found)

    def _exposition(self) -> Page:
        for role, state, count in _count_groups(self._fleet()):
            self._metrics.groups.labels(role, state).set(count)
        return 200, CONTENT_TYPE_LATEST.encode(), self._metrics.exposition()


def _json(found: object, status: int = 200) -> Page:
    return status, b"application/json", msgspec.json.encode(found)


def _count_groups(fleet: FleetSnapshot) -> list[tuple[str, str, int]]:
    return [
        (role.value, state.value, sum(1 for g in fleet.groups if g.role is role and g.state is state))
        for role in Role
        for state in GroupState
    ]
