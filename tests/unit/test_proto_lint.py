"""The .proto files keep buf's STANDARD and COMMENTS rules; buf itself is not needed.

One rule is left out: SERVICE_SUFFIX, which wants services to be named `…Service`. `tandem.v1.Inference` and
`tandem.v1.FleetControl` are the names that clients know.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

PROTO = Path(__file__).parents[2] / "proto"
FILES = sorted(path.relative_to(PROTO).as_posix() for path in PROTO.rglob("*.proto"))
BUNDLED = Path(protoc.__file__).parent / "_proto"

_PASCAL = re.compile(r"[A-Z][a-zA-Z0-9]*")
_SNAKE = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_SCREAMING = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")
_VERSIONED = re.compile(r"[a-z][a-z0-9]*(\.[a-z][a-z0-9]*)*\.v[1-9][0-9]*((alpha|beta)[1-9][0-9]*)?")

File = descriptor_pb2.FileDescriptorProto
_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
"""Numbers of FileDescriptorProto's fields, of which paths to comments are made."""


def compiled(root: Path, names: Sequence[str], folder: Path) -> list[File]:
    """The files with their comments."""
    out = folder / "set.bin"
    command = ["protoc", f"-I{root}", f"-I{BUNDLED}", "--include_source_info", f"--descriptor_set_out={out}", *names]
    assert protoc.main(command) == 0
    return list(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)


def lint(file: File) -> list[str]:
    """Everything in a file that is against the rules."""
    return [
        *_package(file),
        *(problem for message, _ in _messages(file.message_type, (_MESSAGES,)) for problem in _message(message)),
        *(problem for enum, _ in _enums(file) for problem in _enum(enum)),
        *_services(file),
        *(f"COMMENTS {name}" for name, path in _documented(file) if path not in _commented(file)),
    ]


def _package(file: File) -> Iterator[str]:
    if not _VERSIONED.fullmatch(file.package):
        yield f"PACKAGE_VERSION_SUFFIX {file.package}"
    if Path(file.name).parent.as_posix() != file.package.replace(".", "/"):
        yield f"PACKAGE_DIRECTORY_MATCH {file.name}"
    if not _SNAKE.fullmatch(Path(file.name).stem):
        yield f"FILE_LOWER_SNAKE_CASE {file.name}"
    if file.syntax != "proto3":
        yield f"SYNTAX_SPECIFIED {file.name}"
    if file.public_dependency or file.weak_dependency:
        yield f"IMPORT_NO_PUBLIC {file.name}"


def _message(message: descriptor_pb2.DescriptorProto) -> Iterator[str]:
    if not _PASCAL.fullmatch(message.name):
        yield f"MESSAGE_PASCAL_CASE {message.name}"
    for field in message.field:
        if not _SNAKE.fullmatch(field.name):
            yield f"FIELD_LOWER_SNAKE_CASE {message.name}.{field.name}"
        if field.label == field.LABEL_REQUIRED:
            yield f"FIELD_NOT_REQUIRED {message.name}.{field.name}"
    for oneof in message.oneof_decl:
        # `optional` makes one that begins with an underscore.
        if not _SNAKE.fullmatch(oneof.name.removeprefix("_")):
            yield f"ONEOF_LOWER_SNAKE_CASE {message.name}.{oneof.name}"
    used = Counter(field.number for field in message.field)
    gone = [number for taken in message.reserved_range for number in range(taken.start, taken.end)]
    # protoc refuses these itself; here in case that the descriptors come from elsewhere.
    yield from (f"REUSED_NUMBER {message.name}: {number}" for number in used if used[number] > 1 or number in gone)
    names = [field.name for field in message.field]
    yield from (f"REUSED_NAME {message.name}: {name}" for name in names if name in message.reserved_name)


def _enum(enum: descriptor_pb2.EnumDescriptorProto) -> Iterator[str]:
    prefix = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum.name).upper() + "_"
    if not _PASCAL.fullmatch(enum.name):
        yield f"ENUM_PASCAL_CASE {enum.name}"
    if enum.options.allow_alias:
        yield f"ENUM_NO_ALLOW_ALIAS {enum.name}"
    if enum.value[0].number != 0:
        yield f"ENUM_FIRST_VALUE_ZERO {enum.name}"
    for value in enum.value:
        if not value.name.startswith(prefix):
            yield f"ENUM_VALUE_PREFIX {value.name}"
        if not _SCREAMING.fullmatch(value.name):
            yield f"ENUM_VALUE_UPPER_SNAKE_CASE {value.name}"
        if (value.number == 0) != (value.name == f"{prefix}UNSPECIFIED"):
            yield f"ENUM_ZERO_VALUE_SUFFIX {value.name}"


def _services(file: File) -> Iterator[str]:
    used: Counter[str] = Counter()
    for service in file.service:
        if not _PASCAL.fullmatch(service.name):
            yield f"SERVICE_PASCAL_CASE {service.name}"
        for method in service.method:
            if not _PASCAL.fullmatch(method.name):
                yield f"RPC_PASCAL_CASE {method.name}"
            if method.client_streaming:
                yield f"RPC_NO_CLIENT_STREAMING {method.name}"
            for kind, name in (("Request", method.input_type), ("Response", method.output_type)):
                used[name] += 1
                if name not in (
                    f".{file.package}.{method.name}{kind}",
                    f".{file.package}.{service.name}{method.name}{kind}",
                ):
                    yield f"RPC_{kind.upper()}_STANDARD_NAME {method.name}: {name}"
    yield from (f"RPC_REQUEST_RESPONSE_UNIQUE {name}" for name, times in used.items() if times > 1)


# Walking through a file; a path is how descriptor.proto names a place in it.

Path_ = tuple[int, ...]


def _messages(messages: Any, at: Path_) -> Iterator[tuple[descriptor_pb2.DescriptorProto, Path_]]:
    for place, message in enumerate(messages):
        if not message.options.map_entry:
            yield message, (*at, place)
            yield from _messages(message.nested_type, (*at, place, 3))


def _enums(file: File) -> Iterator[tuple[descriptor_pb2.EnumDescriptorProto, Path_]]:
    yield from ((enum, (_ENUMS, place)) for place, enum in enumerate(file.enum_type))
    for message, path in _messages(file.message_type, (_MESSAGES,)):
        yield from ((enum, (*path, 4, place)) for place, enum in enumerate(message.enum_type))


def _documented(file: File) -> Iterator[tuple[str, Path_]]:
    """(name, path) of everything that must have a comment."""
    for message, path in _messages(file.message_type, (_MESSAGES,)):
        yield message.name, path
        yield from ((f"{message.name}.{field.name}", (*path, 2, place)) for place, field in enumerate(message.field))
        for place, oneof in enumerate(message.oneof_decl):
            if not oneof.name.startswith("_"):
                yield f"{message.name}.{oneof.name}", (*path, 8, place)
    for enum, path in _enums(file):
        yield enum.name, path
        yield from ((value.name, (*path, 2, place)) for place, value in enumerate(enum.value))
    for index, service in enumerate(file.service):
        yield service.name, (_SERVICES, index)
        for place, method in enumerate(service.method):
            yield f"{service.name}.{method.name}", (_SERVICES, index, 2, place)


def _commented(file: File) -> set[Path_]:
    """Paths of what has a comment before it that is a sentence."""
    found = file.source_code_info.location
    return {tuple(place.path) for place in found if place.leading_comments.rstrip().endswith((".", "?", "!", ")"))}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, File]:
    return {file.name: file for file in compiled(PROTO, FILES, tmp_path_factory.mktemp("proto"))}


@pytest.mark.parametrize("name", FILES)
def test_a_proto_file_keeps_the_rules(files: dict[str, File], name: str) -> None:
    assert lint(files[name]) == []


@pytest.mark.parametrize("name", FILES)
def test_a_proto_file_has_no_long_line(name: str) -> None:
    assert [line for line in (PROTO / name).read_text().splitlines() if len(line) > 120] == []


def test_names_are_unique_across_the_files_of_a_package(files: dict[str, File]) -> None:
    names = [name for file in files.values() for name, _ in _documented(file) if "." not in name]
    assert {name: times for name, times in Counter(names).items() if times > 1} == {}


@pytest.mark.parametrize("name", FILES)
def test_numbers_have_no_gap_that_is_not_reserved(files: dict[str, File], name: str) -> None:
    """A field that was taken out leaves its number and name reserved, or an old client would be misread."""
    for message, _ in _messages(files[name].message_type, (_MESSAGES,)):
        gone = [number for taken in message.reserved_range for number in range(taken.start, taken.end)]
        numbers = sorted([*(field.number for field in message.field), *gone])
        assert all(after == before + 1 for before, after in pairwise([0, *numbers])), message.name


WRONG = """
syntax = "proto3";
package tandem.v1;
// It is.
service Odd {
  rpc get(Thing) returns (Thing);
  // Sings.
  rpc Sing(stream SingRequest) returns (SingResponse);
}
message Thing {
  // Not snake.
  string badName = 1;
  string undocumented = 2;
  // Inside.
  enum Inner {
    // Wrong name for zero.
    INNER_NONE = 0;
    // Without the prefix.
    OTHER = 1;
  }
  // A choice.
  oneof Choice {
    // One.
    string one = 3;
  }
  // A table.
  map<string, string> table = 4;
  // May be left out.
  optional string maybe = 5;
}
// Asks.
message SingRequest {}
// Says
message SingResponse {}
"""


def test_the_rules_find_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "Bad.proto").write_text(WRONG)
    (file,) = compiled(tmp_path, ["Bad.proto"], tmp_path)
    assert sorted(lint(file)) == sorted(
        [
            "PACKAGE_DIRECTORY_MATCH Bad.proto",
            "FILE_LOWER_SNAKE_CASE Bad.proto",
            "FIELD_LOWER_SNAKE_CASE Thing.badName",
            "ONEOF_LOWER_SNAKE_CASE Thing.Choice",
            "ENUM_VALUE_PREFIX OTHER",
            "ENUM_ZERO_VALUE_SUFFIX INNER_NONE",
            "RPC_PASCAL_CASE get",
            "RPC_REQUEST_STANDARD_NAME get: .tandem.v1.Thing",
            "RPC_RESPONSE_STANDARD_NAME get: .tandem.v1.Thing",
            "RPC_NO_CLIENT_STREAMING Sing",
            "RPC_REQUEST_RESPONSE_UNIQUE .tandem.v1.Thing",
            "COMMENTS Thing",
            "COMMENTS Thing.undocumented",
            "COMMENTS Odd.get",
            "COMMENTS SingResponse",
        ]
    )
