"""The proto file, its documentation, and that it says the same as core/types.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from types import NoneType, UnionType

import msgspec
import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.core.refresh import Refresh
from tandem.core.types import DpLoad, FleetSnapshot, GroupSpec, Role
from tandem.fleet import control_proto
from tandem.v1 import control_pb2

ROOT = Path(__file__).parents[2]
TEXT = st.text(st.characters(codec="utf-8"), max_size=8)


def _strategy(kind: type[msgspec.Struct]) -> st.SearchStrategy[msgspec.Struct]:
    """Build a struct of `kind` with numbers that its message can hold."""
    by_type: dict[object, st.SearchStrategy[object]] = {
        str: TEXT,
        int: st.integers(-(2**31), 2**31 - 1),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
    }

    def field(declared: object) -> st.SearchStrategy[object]:
        if declared in by_type:
            return by_type[declared]
        if getattr(declared, "__origin__", None) is tuple:
            inner = declared.__args__[0]  # type: ignore[attr-defined]
            items = by_type[inner] if inner in by_type else _strategy(inner)
            return st.lists(items, max_size=2).map(tuple)
        if getattr(declared, "__origin__", None) is dict:
            return st.dictionaries(TEXT, TEXT, max_size=2)
        if isinstance(declared, UnionType):
            return st.one_of(*(field(one) for one in declared.__args__))
        if declared is NoneType:
            return st.none()
        if isinstance(declared, type) and issubclass(declared, msgspec.Struct):
            return _strategy(declared)
        return st.sampled_from(declared)  # type: ignore[call-overload, no-any-return]

    return st.builds(kind, **{item.name: field(item.type) for item in msgspec.structs.fields(kind)})


@settings(max_examples=30)
@given(_strategy(FleetSnapshot))
def test_a_fleet_survives_the_wire(fleet: FleetSnapshot) -> None:
    wire = control_proto.fleet_to_proto(fleet).SerializeToString()
    assert control_proto.fleet_from_proto(control_pb2.Fleet.FromString(wire)) == fleet


@given(_strategy(GroupSpec))
def test_a_desired_group_survives_the_wire(spec: GroupSpec) -> None:
    wire = control_proto.spec_to_proto(spec).SerializeToString()
    assert control_proto.spec_from_proto(control_pb2.GroupSpec.FromString(wire)) == spec


@given(_strategy(Refresh))
def test_a_refresh_survives_the_wire(refresh: Refresh) -> None:
    wire = control_proto.refresh_to_proto(refresh).SerializeToString()
    assert control_proto.refresh_from_proto(control_pb2.Refresh.FromString(wire)) == refresh


@given(st.dictionaries(TEXT, st.lists(_strategy(DpLoad), max_size=2).map(tuple), max_size=2))
def test_loads_survive_the_wire(loads: dict[str, tuple[DpLoad, ...]]) -> None:
    assert control_proto.loads_from_proto(control_proto.loads_to_proto(loads)) == loads


@pytest.mark.parametrize(("role", "shown"), [(0, "ROLE_UNSPECIFIED"), (77, "77")])
def test_a_role_that_is_not_set_or_unknown_is_refused(role: int, shown: str) -> None:
    message = control_pb2.GroupSpec(group="g", role=role)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"role is {shown}; it must be one of ROLE_PREFILL, ROLE_DECODE"):
        control_proto.spec_from_proto(message)


@pytest.mark.parametrize(("kind", "message"), control_proto.MESSAGES.items())
def test_a_message_has_exactly_the_fields_of_its_struct(kind: type[msgspec.Struct], message: type) -> None:
    assert [field.name for field in message.DESCRIPTOR.fields] == list(kind.__struct_fields__)  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", control_proto.ENUMS)
def test_a_proto_enum_has_exactly_the_values_of_the_python_one(kind: type[StrEnum]) -> None:
    enum, prefix = control_proto.ENUMS[kind]
    assert enum.keys() == [prefix + name for name in ("UNSPECIFIED", *kind.__members__)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[descriptor_pb2.FileDescriptorProto]:
    """Every file of proto/, compiled anew, with its comments."""
    made = tmp_path_factory.mktemp("proto") / "all.pb"
    files = [str(path) for path in sorted((ROOT / "proto").rglob("*.proto"))]
    options = [f"-I{ROOT / 'proto'}", f"--descriptor_set_out={made}", "--include_source_info"]
    assert protoc.main(["protoc", *options, *files]) == 0
    return list(descriptor_pb2.FileDescriptorSet.FromString(made.read_bytes()).file)


def _walk(file: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield kind, name and path (as in SourceCodeInfo) of everything that has a name."""
    for number, message in enumerate(file.message_type):
        yield "message", message.name, (4, number)
        for at, field in enumerate(message.field):
            yield "field", field.name, (4, number, 2, at)
    for number, enum in enumerate(file.enum_type):
        yield "enum", enum.name, (5, number)
        for at, value in enumerate(enum.value):
            yield "value", value.name, (5, number, 2, at)
    for number, service in enumerate(file.service):
        yield "service", service.name, (6, number)
        for at, method in enumerate(service.method):
            yield "rpc", method.name, (6, number, 2, at)


def test_everything_in_the_proto_files_is_documented(sources: list[descriptor_pb2.FileDescriptorProto]) -> None:
    bare = []
    for file in sources:
        documented = {tuple(at.path) for at in file.source_code_info.location if at.leading_comments.strip()}
        bare += [f"{file.name}: {kind} {name}" for kind, name, path in _walk(file) if path not in documented]
    assert bare == []


def test_names_follow_bufs_style(sources: list[descriptor_pb2.FileDescriptorProto]) -> None:
    pascal, snake, upper = r"([A-Z][a-z0-9]*)+", r"[a-z][a-z0-9]*(_[a-z0-9]+)*", r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*"
    styles = {"message": pascal, "enum": pascal, "service": pascal, "rpc": pascal, "field": snake, "value": upper}
    for file in sources:
        assert file.syntax == "proto3"
        assert Path(file.name).parent.as_posix() == file.package.replace(".", "/")
        assert [name for kind, name, _ in _walk(file) if not re.fullmatch(styles[kind], name)] == []
        for enum in file.enum_type:
            prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
            assert all(value.name.startswith(prefix) for value in enum.value)
            assert (enum.value[0].name, enum.value[0].number) == (prefix + "UNSPECIFIED", 0)


def test_every_rpc_has_messages_of_its_own(sources: list[descriptor_pb2.FileDescriptorProto]) -> None:
    for file in sources:
        for rpc in (rpc for service in file.service for rpc in service.method):
            assert rpc.input_type == f".{file.package}.{rpc.name}Request"
            assert rpc.output_type == f".{file.package}.{rpc.name}Response"


def test_the_stubs_are_those_of_the_proto_file(sources: list[descriptor_pb2.FileDescriptorProto]) -> None:
    (source,) = [file for file in sources if file.name == "tandem/v1/control.proto"]
    source.ClearField("source_code_info")
    messages = [one for message in source.message_type for one in (message, *message.nested_type)]
    for field in (field for message in messages for field in message.field):
        field.ClearField("json_name")  # protoc derives it from the name
    made = descriptor_pb2.FileDescriptorProto()
    control_pb2.DESCRIPTOR.CopyToProto(made)
    assert made == source, "stale stubs: run `python platform/tandem_stubs.py`"


def test_a_role_is_told_by_its_proto_name() -> None:
    message = control_proto.spec_to_proto(GroupSpec(group="g", role=Role.DECODE, nodes=2))
    assert message.role == control_pb2.ROLE_DECODE
