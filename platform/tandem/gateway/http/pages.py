"""Everything that needs no engine: models, tokens, health, readiness, the fleet, metrics, the API's description."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST

from tandem import __version__
from tandem.core.tenants import Tenant
from tandem.core.types import FleetSnapshot, GroupState, Role
from tandem.gateway.access.auth import check_model
from tandem.gateway.api import anthropic_writer, openapi, token_api
from tandem.gateway.api.anthropic_api import count_tokens
from tandem.gateway.api.requests import model_not_found, parse_json
from tandem.gateway.errors import ApiError
from tandem.gateway.observe.metric_types import labelled
from tandem.gateway.pairing.kv_events import KvEventCounts
from tandem.gateway.service import Service

COUNT_TOKENS = "/v1/messages/count_tokens"

Page = tuple[int, bytes, bytes]
"""(status, content type, body)"""


_OPEN = frozenset({"/health", "/ready", "/fleet", "/metrics", "/openapi.json"})
"""For probes, Prometheus and `tandem status`, which have no key."""


class Pages:
    """Answers from memory."""

    def __init__(
        self,
        replica: str,
        fleet_name: str,
        service: Service,
        fleet: Callable[[], FleetSnapshot],
        heard: Callable[[], KvEventCounts] = KvEventCounts,
    ) -> None:
        """`heard`: what engines have told of their caches."""
        self.leaving = False
        """Whether load balancers should send requests to others from now on."""
        self._heard = heard
        self._replica = replica
        self._fleet_name = fleet_name
        self._service = service
        self._card = service.card
        self._driver = service.driver
        self._metrics = service.metrics
        self._fleet = fleet
        self._created = int(time.time())
        self._description = openapi.page(self._card, __version__)
        self._pages: dict[str, Callable[[], Page]] = {
            "/health": self._health,
            "/ready": self._ready,
            "/fleet": self._whole_fleet,
            "/metrics": self._exposition,
            "/openapi.json": lambda: (200, b"application/json", self._description),
        }
        self._tools: dict[str, Callable[[dict[str, Any]], bytes]] = {
            "/tokenize": lambda body: token_api.tokenize(body, self._card, service.tokenizer),
            "/detokenize": lambda body: token_api.detokenize(body, self._card, service.tokenizer),
            COUNT_TOKENS: lambda body: count_tokens(body, self._card, service.tokenizer),
        }

    def is_open(self, path: str) -> bool:
        """Whether the page is for everyone, with or without a key."""
        return path in _OPEN

    def error_of(self, path: str) -> Callable[[ApiError, str], bytes]:
        """How the page tells an error: (error, request id) → body."""
        return anthropic_writer.encode_error if path == COUNT_TOKENS else lambda error, _: error.body()

    async def get(self, method: str, path: str, body: bytes, tenant: Tenant) -> Page:
        """The page at `path`, for this tenant. Raises ApiError."""
        if path in self._tools:
            _check_method(method, path, "POST")
            check_model(tenant, self._card.name)
            tool = self._tools[path]
            found = await self._service.lanes.work(tenant.name, len(body), lambda: tool(parse_json(body)))
            return 200, b"application/json", found
        page = self._models_page(path, tenant) or self._pages.get(path)
        if page is None:
            raise ApiError(404, f"Invalid URL ({method} {path})")
        _check_method(method, path, "GET")
        return page()

    def _models_page(self, path: str, tenant: Tenant) -> Callable[[], Page] | None:
        if path == "/v1/models":
            return lambda: self._models(tenant)
        if not path.startswith("/v1/models/"):
            return None
        name = path.removeprefix("/v1/models/")
        if name != self._card.name:
            raise model_not_found(name)
        check_model(tenant, name)
        return self._one_model

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._card.name,
            "object": "model",
            "created": self._created,
            "owned_by": "tandem",
            "max_model_len": self._card.context,
        }

    def _models(self, tenant: Tenant) -> Page:
        mine = tenant.models is None or self._card.name in tenant.models
        return _json({"object": "list", "data": [self._model()] if mine else []})

    def _one_model(self) -> Page:
        return _json(self._model())

    def _health(self) -> Page:
        told = {"status": "leaving" if self.leaving else "ok", "replica": self._replica, "fleet": self._fleet_name}
        return _json(told, status=503 if self.leaving else 200)

    def _ready(self) -> Page:
        if self.leaving:
            return _json({"status": "not ready", "reason": "this gateway leaves"}, status=503)
        shortage = self._driver.router.shortage()
        if shortage is None:
            return _json({"status": "ready"})
        return _json({"status": "not ready", "reason": shortage.reason}, status=503)

    def _whole_fleet(self) -> Page:
        found, index = msgspec.to_builtins(self._fleet()), self._driver.router.index
        found["gateway"] = {
            "replica": self._replica,
            "open_requests": self._driver.table.open_requests,
            "open_rooms": self._driver.table.open_rooms,
            "waiting_for_groups": self._driver.table.parked,
            "loads": msgspec.to_builtins(self._driver.router.loads()),
            "ranks": msgspec.to_builtins(self._driver.router.ranks()),
            "prefix_index": {"blocks": len(index), "bytes": index.size, "evicted": index.evicted},
            "kv_events": msgspec.to_builtins(self._heard()),
        }
        return _json(found)

    def _exposition(self) -> Page:
        for role, state, count in _count_groups(self._fleet()):
            self._metrics.groups.labels(role, state).set(count)
        for plan in self._fleet().plans:
            self._metrics.planned.labels(plan.role.value).set(plan.wanted)
        self._metrics.parked.set(self._driver.table.parked)
        roles = {group.group: group.role.value for group in self._fleet().groups}
        self._metrics.group_loads(
            (roles.get(load.group, ""), load.group, load.rooms, load.tokens) for load in self._driver.router.loads()
        )
        self._metrics.prefix_index_bytes.set(self._driver.router.index.size)
        # Of replicas that share a port, a scrape meets any: this tells their series apart.
        return 200, CONTENT_TYPE_LATEST.encode(), labelled(self._metrics.exposition(), "replica", self._replica)


def _check_method(method: str, path: str, wanted: str) -> None:
    if method != wanted and not (wanted == "GET" and method == "HEAD"):
        raise ApiError(405, f"Not allowed to {method} on {path}; use {wanted}.")


def _json(found: object, status: int = 200) -> Page:
    return status, b"application/json", msgspec.json.encode(found)


def _count_groups(fleet: FleetSnapshot) -> list[tuple[str, str, int]]:
    return [
        (role.value, state.value, sum(1 for g in fleet.groups if g.role is role and g.state is state))
        for role in Role
        for state in GroupState
    ]
