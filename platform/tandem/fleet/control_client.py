"""Talks to a fleet's control service, for the CLI and the operator: the fleet's own words in and out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator
from types import TracebackType
from typing import NamedTuple

import grpc

from tandem.core.group_check import GroupCheck
from tandem.core.refresh import Refresh
from tandem.core.traffic import TrafficReport
from tandem.core.types import DpLoad, FleetSnapshot, GroupSpec
from tandem.fleet.control_proto import (
    check_from_proto,
    fleet_from_proto,
    loads_from_proto,
    refresh_from_proto,
    spec_from_proto,
    spec_to_proto,
    traffic_from_proto,
)
from tandem.fleet.refresh_ask import RefreshAsk
from tandem.v1 import control_pb2, control_pb2_grpc

_LONGEST_CHECK_S = 190.0
"""A little more than the service takes at most."""
_OPTIONS = (
    # A watch may be silent for long, so a dead peer must be looked for.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", 64 * 2**20),
)


class ControlError(Exception):
    """A call failed. The message is one sentence that says what to do; `code` is gRPC's name, as `NOT_FOUND`."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class FleetLoad(NamedTuple):
    """What engines and gateways tell of their work."""

    groups: dict[str, tuple[DpLoad, ...]]
    """By group and DP rank; groups that cannot tell are left out."""
    traffic: tuple[TrafficReport, ...]
    """What each gateway replica has counted; empty where one group was asked for."""


class ControlClient:
    """A connection to the control service at `address` (`host:port`). Every call raises `ControlError`."""

    def __init__(self, address: str, *, deadline: float = 10.0) -> None:
        """Connect at the first call. `deadline`: seconds that each call may take."""
        self._address = address
        self._deadline = deadline
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._stub = control_pb2_grpc.FleetControlStub(self._channel)

    async def __aenter__(self) -> ControlClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection and every watch."""
        await self._channel.close(None)

    async def fleet(self) -> FleetSnapshot:
        """Return the fleet as it is now."""
        with self._errors():
            reply = await self._stub.GetFleet(control_pb2.GetFleetRequest(), timeout=self._deadline)
            return fleet_from_proto(reply.fleet)

    async def watch(self) -> AsyncGenerator[FleetSnapshot, None]:
        """Yield the fleet now and whenever it is different. The deadline holds for the first one."""
        with self._errors():
            call = self._stub.WatchFleet(control_pb2.WatchFleetRequest())
            replies = aiter(call)
            try:
                async with asyncio.timeout(self._deadline):
                    reply = await anext(replies, None)
                while reply is not None:
                    yield fleet_from_proto(reply.fleet)
                    reply = await anext(replies, None)
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # Not this task was cancelled, but the call: the client was closed.
            finally:
                call.cancel()

    async def put_group(self, spec: GroupSpec) -> GroupSpec:
        """Let a group exist as `spec` says; return what was noted."""
        with self._errors():
            request = control_pb2.PutGroupRequest(spec=spec_to_proto(spec))
            reply = await self._stub.PutGroup(request, timeout=self._deadline)
            return spec_from_proto(reply.spec)

    async def cordon(self, group: str, cordoned: bool = True) -> GroupSpec:
        """Keep new pairs away from a group, or admit them again."""
        with self._errors():
            request = control_pb2.CordonGroupRequest(group=group, cordoned=cordoned)
            reply = await self._stub.CordonGroup(request, timeout=self._deadline)
            return spec_from_proto(reply.spec)

    async def drain(
        self, group: str, deadline_s: float | None = None, *, migrate: bool = False, force: bool = False
    ) -> GroupSpec:
        """Begin to drain a group, for `deadline_s` seconds at most; None = the fleet's own limit.

        `migrate`: move its streams at once; `force`: also if it is the last ready group of its role.
        """
        with self._errors():
            request = control_pb2.DrainGroupRequest(
                group=group, deadline_seconds=deadline_s, migrate=migrate, force=force
            )
            reply = await self._stub.DrainGroup(request, timeout=self._deadline)
            return spec_from_proto(reply.spec)

    async def remove(self, group: str) -> None:
        """Let a group leave at once."""
        with self._errors():
            await self._stub.RemoveGroup(control_pb2.RemoveGroupRequest(group=group), timeout=self._deadline)

    async def load(self, group: str | None = None) -> FleetLoad:
        """Return the load of one group, or of all that can tell, and then also what the gateways have counted."""
        with self._errors():
            reply = await self._stub.GetLoad(control_pb2.GetLoadRequest(group=group or ""), timeout=self._deadline)
            return FleetLoad(loads_from_proto(reply.groups), traffic_from_proto(reply.traffic))

    async def check(self, group: str) -> GroupCheck:
        """Have a group asked a prompt, alone and in a pair; takes up to three minutes, whatever the deadline is."""
        with self._errors(_LONGEST_CHECK_S):
            request = control_pb2.CheckGroupRequest(group=group)
            reply = await self._stub.CheckGroup(request, timeout=_LONGEST_CHECK_S)
            return check_from_proto(reply.check)

    async def check_weights(self, path: str, version: str) -> None:
        """Return if there can be groups that declare these weights."""
        with self._errors():
            request = control_pb2.CheckWeightsRequest(model_path=path, version=version)
            await self._stub.CheckWeights(request, timeout=self._deadline)

    async def refresh(self, ask: RefreshAsk) -> Refresh:
        """Begin to give the fleet other weights; `refresh_state` tells how far it is."""
        with self._errors():
            request = control_pb2.RefreshWeightsRequest(
                model_path=ask.path,
                version=ask.version,
                canary=ask.canary,
                expect=ask.expect,
                keep_new=not ask.rollback,
                allow_pause=ask.allow_pause,
                drain_seconds=ask.drain_s,
            )
            reply = await self._stub.RefreshWeights(request, timeout=self._deadline)
            return refresh_from_proto(reply.refresh)

    async def refresh_state(self) -> Refresh:
        """Return the refresh that goes on, or the last one."""
        with self._errors():
            reply = await self._stub.GetRefresh(control_pb2.GetRefreshRequest(), timeout=self._deadline)
            return refresh_from_proto(reply.refresh)

    async def stop_refresh(self) -> Refresh:
        """Let the refresh that goes on end as if it had failed."""
        with self._errors():
            reply = await self._stub.StopRefresh(control_pb2.StopRefreshRequest(), timeout=self._deadline)
            return refresh_from_proto(reply.refresh)

    @contextlib.contextmanager
    def _errors(self, deadline: float | None = None) -> Iterator[None]:
        within = self._deadline if deadline is None else deadline
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise ControlError(
                self._sentence(error.code(), error.details() or "", within), error.code().name
            ) from error
        except TimeoutError:
            raise ControlError(
                self._sentence(grpc.StatusCode.DEADLINE_EXCEEDED, "", within), grpc.StatusCode.DEADLINE_EXCEEDED.name
            ) from None
        except ValueError as error:
            # An enum value of a later version, or a number that its field cannot hold.
            raise ControlError(
                f"The fleet at {self._address} and this program do not understand each other: {error}.",
                grpc.StatusCode.INTERNAL.name,
            ) from error

    def _sentence(self, code: grpc.StatusCode, details: str, within: float) -> str:
        if code is grpc.StatusCode.UNAVAILABLE:
            return f"The fleet at {self._address} is not available: {details.rstrip('.')}. See that it is up."
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"The fleet at {self._address} did not answer within {within:g} s."
        return details or f"The fleet at {self._address} answered {code.name}."
