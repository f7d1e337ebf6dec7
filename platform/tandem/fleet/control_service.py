"""Serves `tandem.v1.FleetControl`: checks what comes in, asks a `FleetBackend`, turns errors into gRPC's codes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tandem.core.group_check import GroupCheck
from tandem.core.refresh import Refresh
from tandem.core.traffic import TrafficReport
from tandem.core.types import DpLoad, FleetSnapshot, GroupSpec
from tandem.fleet.control_proto import (
    check_to_proto,
    fleet_to_proto,
    loads_to_proto,
    refresh_to_proto,
    spec_from_proto,
    spec_to_proto,
    traffic_to_proto,
)
from tandem.fleet.refresh_ask import RefreshAsk
from tandem.state import StoreError
from tandem.v1 import control_pb2, control_pb2_grpc

SERVICE = control_pb2.DESCRIPTOR.services_by_name["FleetControl"].full_name
_LONGEST_CALL_S = 30.0
_LONGEST_CHECK_S = 180.0
_LONGEST_CANARY = 4096
_LONGEST_DRAIN_S = 7 * 24 * 3600.0
_GROUP_ID = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_OPTIONS = (
    ("grpc.so_reuseport", 0),  # else a second server on a taken port would start, and get half of the calls
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # lets clients look for a dead peer too
)

_log = logging.getLogger(__name__)
_Context = grpc.aio.ServicerContext[Any, Any]


class UnknownGroup(LookupError):
    """The fleet has no group of that id."""

    def __init__(self, group: str) -> None:
        super().__init__(f"The fleet has no group {group!r}; `tandem status` lists them.")


class NoRefresh(LookupError):
    """The fleet has had no refresh."""

    def __init__(self) -> None:
        super().__init__("The fleet's weights have not been refreshed since it started.")


class Refused(Exception):
    """The fleet's present state forbids it. The message is one sentence that says why and what to do."""


class FleetBackend(Protocol):
    """What the service needs of a fleet. Every method may raise UnknownGroup, NoRefresh, Refused and StoreError."""

    async def fleet(self) -> FleetSnapshot:
        """Return the fleet as it is now."""

    def watch(self) -> AsyncIterator[FleetSnapshot]:
        """Yield the fleet now and whenever it is different."""

    async def put_group(self, spec: GroupSpec) -> GroupSpec:
        """Note that a group should exist, or should be otherwise; return what was noted."""

    async def cordon(self, group: str, cordoned: bool) -> GroupSpec:
        """Keep new pairs away from a group, or admit them."""

    async def drain(self, group: str, deadline_s: float | None, *, migrate: bool, force: bool) -> GroupSpec:
        """Begin to drain a group, for `deadline_s` seconds at most; None = the fleet's own limit. `migrate`: its
        streams move at once; `force`: also the last ready one of its role."""

    async def remove(self, group: str) -> None:
        """Let a group leave at once."""

    async def load(self, group: str | None) -> Mapping[str, Sequence[DpLoad]]:
        """Return the load by DP rank of one group, or of all that can tell."""

    async def traffic(self) -> Sequence[TrafficReport]:
        """Return what the gateway replicas have counted."""

    async def check(self, group: str) -> GroupCheck:
        """Ask a group a prompt, alone and in a pair, and return what is to be thought of its answers."""

    async def check_weights(self, path: str, version: str) -> None:
        """Return if there can be groups that declare these weights, beside those that are there."""

    async def refresh(self, ask: RefreshAsk) -> Refresh:
        """Begin to give the fleet other weights."""

    async def refresh_state(self) -> Refresh:
        """Return the refresh that goes on, or the last one."""

    async def stop_refresh(self) -> Refresh:
        """Let the refresh that goes on end as if it had failed; one that goes back already ends where it is."""


class FleetControlService(control_pb2_grpc.FleetControlServicer):
    """The service over one backend."""

    def __init__(self, backend: FleetBackend) -> None:
        self._backend = backend

    async def GetFleet(self, _: control_pb2.GetFleetRequest, context: _Context) -> control_pb2.GetFleetResponse:
        async with _answering(context):
            fleet = await self._backend.fleet()
        return control_pb2.GetFleetResponse(fleet=fleet_to_proto(fleet))

    async def WatchFleet(
        self, _: control_pb2.WatchFleetRequest, context: _Context
    ) -> AsyncIterator[control_pb2.WatchFleetResponse]:
        async with _answering(context, limit=None):
            async for fleet in self._backend.watch():
                yield control_pb2.WatchFleetResponse(fleet=fleet_to_proto(fleet))

    async def PutGroup(self, request: control_pb2.PutGroupRequest, context: _Context) -> control_pb2.PutGroupResponse:
        async with _answering(context):
            spec = await self._backend.put_group(_spec(request))
        return control_pb2.PutGroupResponse(spec=spec_to_proto(spec))

    async def CordonGroup(
        self, request: control_pb2.CordonGroupRequest, context: _Context
    ) -> control_pb2.CordonGroupResponse:
        async with _answering(context):
            spec = await self._backend.cordon(_group(request.group), request.cordoned)
        return control_pb2.CordonGroupResponse(spec=spec_to_proto(spec))

    async def DrainGroup(
        self, request: control_pb2.DrainGroupRequest, context: _Context
    ) -> control_pb2.DrainGroupResponse:
        async with _answering(context):
            spec = await self._backend.drain(
                _group(request.group), _drain_limit(request), migrate=request.migrate, force=request.force
            )
        return control_pb2.DrainGroupResponse(spec=spec_to_proto(spec))

    async def RemoveGroup(
        self, request: control_pb2.RemoveGroupRequest, context: _Context
    ) -> control_pb2.RemoveGroupResponse:
        async with _answering(context):
            await self._backend.remove(_group(request.group))
        return control_pb2.RemoveGroupResponse()

    async def GetLoad(self, request: control_pb2.GetLoadRequest, context: _Context) -> control_pb2.GetLoadResponse:
        async with _answering(context):
            loads = await self._backend.load(_group(request.group) if request.group else None)
            traffic = () if request.group else await self._backend.traffic()
        return control_pb2.GetLoadResponse(groups=loads_to_proto(loads), traffic=traffic_to_proto(traffic))

    async def CheckGroup(
        self, request: control_pb2.CheckGroupRequest, context: _Context
    ) -> control_pb2.CheckGroupResponse:
        async with _answering(context, limit=_LONGEST_CHECK_S):
            check = await self._backend.check(_group(request.group))
        return control_pb2.CheckGroupResponse(check=check_to_proto(check))

    async def CheckWeights(
        self, request: control_pb2.CheckWeightsRequest, context: _Context
    ) -> control_pb2.CheckWeightsResponse:
        async with _answering(context):
            if request.model_path:
                _path("model_path", request.model_path)
            _version("version", request.version)
            await self._backend.check_weights(request.model_path, request.version)
        return control_pb2.CheckWeightsResponse()

    async def RefreshWeights(
        self, request: control_pb2.RefreshWeightsRequest, context: _Context
    ) -> control_pb2.RefreshWeightsResponse:
        async with _answering(context):
            refresh = await self._backend.refresh(_refresh_ask(request))
        return control_pb2.RefreshWeightsResponse(refresh=refresh_to_proto(refresh))

    async def GetRefresh(self, _: control_pb2.GetRefreshRequest, context: _Context) -> control_pb2.GetRefreshResponse:
        async with _answering(context):
            refresh = await self._backend.refresh_state()
        return control_pb2.GetRefreshResponse(refresh=refresh_to_proto(refresh))

    async def StopRefresh(
        self, _: control_pb2.StopRefreshRequest, context: _Context
    ) -> control_pb2.StopRefreshResponse:
        async with _answering(context):
            refresh = await self._backend.stop_refresh()
        return control_pb2.StopRefreshResponse(refresh=refresh_to_proto(refresh))


async def serve_control(backend: FleetBackend, host: str, port: int) -> tuple[grpc.aio.Server, int]:
    """Start the service with health and reflection; return the server and its port (`port` 0 = any free one).

    Raises OSError if it cannot listen there.
    """
    server = grpc.aio.server(options=_OPTIONS)
    control_pb2_grpc.add_FleetControlServicer_to_server(FleetControlService(backend), server)
    checker = health.aio.HealthServicer()  # type: ignore[attr-defined]  # its stubs are older
    health_pb2_grpc.add_HealthServicer_to_server(checker, server)
    for name in ("", SERVICE):
        await checker.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError:
        raise OSError(f"The control service cannot listen on {address}: is the port taken? See control.port.") from None
    await server.start()
    return server, bound


class _Invalid(ValueError):
    """A request that can never be right."""


@contextlib.asynccontextmanager
async def _answering(context: _Context, limit: float | None = _LONGEST_CALL_S) -> AsyncIterator[None]:
    """Hold the block to the caller's deadline, to `limit` seconds at most, and end the call if it fails."""
    deadline = min((seconds for seconds in (context.time_remaining(), limit) if seconds is not None), default=None)
    try:
        async with asyncio.timeout(deadline):
            yield
    except _Invalid as error:
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    except (UnknownGroup, NoRefresh) as error:
        await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
    except Refused as error:
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    except StoreError as error:
        await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
    except TimeoutError:
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"The fleet did not answer within {deadline:g} s.")
    except Exception as error:  # noqa: BLE001 - the outer edge: it is logged here and told to the caller
        _log.exception("A control call failed.")
        await context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__} in the controller: {error}")


def _group(group: str) -> str:
    if _GROUP_ID.fullmatch(group):
        return group
    raise _Invalid(f"{group[:80]!r} cannot be a group's id: use 1 to 63 small letters, digits and inner hyphens.")


def _spec(request: control_pb2.PutGroupRequest) -> GroupSpec:
    if not request.HasField("spec"):
        raise _Invalid("spec is missing: it says what the group should be.")
    try:
        spec = spec_from_proto(request.spec)
    except ValueError as error:
        raise _Invalid(f"spec.{error}.") from None
    _group(spec.group)
    for name, value, most in (("nodes", spec.nodes, 64), ("gpus_per_node", spec.gpus_per_node, 16)):
        if not 1 <= value <= most:
            raise _Invalid(f"spec.{name} is {value}; it must be from 1 to {most}.")
    if spec.draining or spec.drain_deadline or spec.migrate_at:
        raise _Invalid("spec.draining, drain_deadline and migrate_at are not set here: call DrainGroup.")
    if spec.weights_path and not spec.weight_version:
        raise _Invalid("spec.weights_path is set, but not spec.weight_version, which names what is there.")
    if spec.declared_path or spec.declared_version:
        _version("spec.declared_version", spec.declared_version)
    if spec.declared_path:
        _path("spec.declared_path", spec.declared_path)
    return spec


def _path(name: str, path: str) -> None:
    if not path.startswith("/"):
        raise _Invalid(f"{name} is {path[:200]!r}; it must be an absolute path, the same on all nodes.")


def _version(name: str, version: str) -> None:
    if not (0 < len(version) <= 64 and version.isprintable()):
        raise _Invalid(f"{name} is {version[:80]!r}; it must be 1 to 64 printable characters.")


def _drain_limit(request: control_pb2.DrainGroupRequest) -> float | None:
    if not request.HasField("deadline_seconds"):
        return None
    return _seconds("deadline_seconds", request.deadline_seconds, " (RemoveGroup stops a group at once)")


def _seconds(name: str, seconds: float, else_: str = "") -> float:
    if 0 < seconds <= _LONGEST_DRAIN_S:
        return seconds
    raise _Invalid(f"{name} is {seconds:g}; it must be more than 0 and at most {_LONGEST_DRAIN_S:g}{else_}.")


def _refresh_ask(request: control_pb2.RefreshWeightsRequest) -> RefreshAsk:
    _version("version", request.version)
    _path("model_path", request.model_path)
    if len(request.canary) > _LONGEST_CANARY or len(request.expect) > _LONGEST_CANARY:
        raise _Invalid(f"canary and expect may have {_LONGEST_CANARY} characters.")
    limited = request.HasField("drain_seconds")
    return RefreshAsk(
        path=request.model_path,
        version=request.version,
        canary=request.canary,
        expect=request.expect,
        rollback=not request.keep_new,
        allow_pause=request.allow_pause,
        drain_s=_seconds("drain_seconds", request.drain_seconds) if limited else None,
    )
