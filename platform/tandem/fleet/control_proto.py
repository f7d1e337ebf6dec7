"""The fleet's words as messages of `tandem.v1`, and back.

A message has the fields of its struct, by name; an enum value `GROUP_STATE_READY` is `GroupState.READY`. A test holds
the two sides together, so one pair of functions serves all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from types import NoneType, UnionType
from typing import Any, TypeVar

import msgspec
from google.protobuf.internal.enum_type_wrapper import EnumTypeWrapper
from google.protobuf.message import Message

from tandem.core.group_check import CheckVerdict, GroupCheck
from tandem.core.kv_source import KvSource
from tandem.core.refresh import Refresh, RefreshPhase
from tandem.core.traffic import TrafficReport
from tandem.core.types import (
    DpLoad,
    EngineSettings,
    FleetSnapshot,
    GatewayReplica,
    Group,
    GroupSpec,
    GroupState,
    PoolPlan,
    Rank,
    RankState,
    Role,
)
from tandem.v1 import control_pb2

_Struct = TypeVar("_Struct", bound=msgspec.Struct)

MESSAGES: Mapping[type[msgspec.Struct], type[Message]] = {
    KvSource: control_pb2.KvSource,
    Rank: control_pb2.Rank,
    Group: control_pb2.Group,
    EngineSettings: control_pb2.EngineSettings,
    GroupSpec: control_pb2.GroupSpec,
    GatewayReplica: control_pb2.GatewayReplica,
    DpLoad: control_pb2.DpLoad,
    PoolPlan: control_pb2.PoolPlan,
    FleetSnapshot: control_pb2.Fleet,
    Refresh: control_pb2.Refresh,
    GroupCheck: control_pb2.GroupCheck,
    TrafficReport: control_pb2.TrafficReport,
}
ENUMS: Mapping[type[StrEnum], tuple[EnumTypeWrapper, str]] = {
    Role: (control_pb2.Role, "ROLE_"),
    GroupState: (control_pb2.GroupState, "GROUP_STATE_"),
    RankState: (control_pb2.RankState, "RANK_STATE_"),
    RefreshPhase: (control_pb2.RefreshPhase, "REFRESH_PHASE_"),
    CheckVerdict: (control_pb2.CheckVerdict, "CHECK_VERDICT_"),
}
"""Python enum → proto enum and the prefix of its values."""


def fleet_to_proto(fleet: FleetSnapshot) -> control_pb2.Fleet:
    """Return the message of a fleet."""
    return control_pb2.Fleet(**_fields(fleet))


def fleet_from_proto(message: control_pb2.Fleet) -> FleetSnapshot:
    """Return the fleet of a message. Raises ValueError on an enum value that this version does not know."""
    return _struct(FleetSnapshot, message)


def spec_to_proto(spec: GroupSpec) -> control_pb2.GroupSpec:
    """Return the message of a desired group."""
    return control_pb2.GroupSpec(**_fields(spec))


def spec_from_proto(message: control_pb2.GroupSpec) -> GroupSpec:
    """Return the desired group of a message. Raises ValueError if its role is not set or unknown."""
    return _struct(GroupSpec, message)


def refresh_to_proto(refresh: Refresh) -> control_pb2.Refresh:
    """Return the message of a refresh."""
    return control_pb2.Refresh(**_fields(refresh))


def refresh_from_proto(message: control_pb2.Refresh) -> Refresh:
    """Return the refresh of a message. Raises ValueError on an enum value that this version does not know."""
    return _struct(Refresh, message)


def check_to_proto(check: GroupCheck) -> control_pb2.GroupCheck:
    """Return the message of a check."""
    return control_pb2.GroupCheck(**_fields(check))


def check_from_proto(message: control_pb2.GroupCheck) -> GroupCheck:
    """Return the check of a message. Raises ValueError on an enum value that this version does not know."""
    return _struct(GroupCheck, message)


def loads_to_proto(loads: Mapping[str, Sequence[DpLoad]]) -> list[control_pb2.GroupLoad]:
    """Return the messages of loads by group, in the order of the groups' ids."""
    return [
        control_pb2.GroupLoad(group=group, dp_ranks=[control_pb2.DpLoad(**_fields(load)) for load in loads[group]])
        for group in sorted(loads)
    ]


def loads_from_proto(messages: Sequence[control_pb2.GroupLoad]) -> dict[str, tuple[DpLoad, ...]]:
    """Return loads by group."""
    return {message.group: tuple(_struct(DpLoad, load) for load in message.dp_ranks) for message in messages}


def traffic_to_proto(reports: Sequence[TrafficReport]) -> list[control_pb2.TrafficReport]:
    """Return the messages of gateways' reports, in the order of their replicas' ids."""
    return [
        control_pb2.TrafficReport(**_fields(report)) for report in sorted(reports, key=lambda report: report.replica)
    ]


def traffic_from_proto(messages: Sequence[control_pb2.TrafficReport]) -> tuple[TrafficReport, ...]:
    """Return the gateways' reports of messages."""
    return tuple(_struct(TrafficReport, message) for message in messages)


def _fields(struct: msgspec.Struct) -> dict[str, Any]:
    return {name: _to_proto(getattr(struct, name)) for name in struct.__struct_fields__}


def _to_proto(value: Any) -> Any:
    if isinstance(value, StrEnum):
        enum, prefix = ENUMS[type(value)]
        return enum.Value(prefix + value.name)
    if isinstance(value, msgspec.Struct):
        return MESSAGES[type(value)](**_fields(value))
    if isinstance(value, tuple):
        return [_to_proto(item) for item in value]
    return value


def _struct(kind: type[_Struct], message: Message) -> _Struct:
    values: dict[str, Any] = {}
    for field in msgspec.structs.fields(kind):
        declared = field.type
        if isinstance(declared, UnionType):  # `X | None`: None where the message does not say
            if not message.HasField(field.name):
                values[field.name] = None
                continue
            (declared,) = (one for one in declared.__args__ if one is not NoneType)
        values[field.name] = _from_proto(declared, getattr(message, field.name), field.name)
    return kind(**values)


def _from_proto(declared: Any, value: Any, field: str) -> Any:
    if declared in ENUMS:
        enum, prefix = ENUMS[declared]
        name = enum.Name(value) if value in enum.values() else str(value)
        if name.removeprefix(prefix) not in declared.__members__:
            known = ", ".join(prefix + member for member in declared.__members__)
            raise ValueError(f"{field} is {name}; it must be one of {known}")
        return declared[name.removeprefix(prefix)]
    if getattr(declared, "__origin__", None) is tuple:
        kind = declared.__args__[0]
        return tuple(_struct(kind, item) if kind in MESSAGES else item for item in value)
    if getattr(declared, "__origin__", None) is dict:
        return dict(value)
    return _struct(declared, value) if declared in MESSAGES else value
