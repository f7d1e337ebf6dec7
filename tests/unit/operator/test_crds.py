"""The CustomResourceDefinitions say what the classes say, in the words of an API server."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import Field, ValidationError

from support.fleets import LEAST as FLEET
from support.fleets import REFUSED_BY_SCHEMA, UNKNOWN
from support.structural import errors, not_structural, with_defaults
from tandem.config import Section, kubernetes_name
from tandem_operator import crds
from tandem_operator.api import VERSION
from tandem_operator.api.fleet import FleetSpec
from tandem_operator.api.pool import GroupSpec, PoolSpec
from tandem_operator.cel import RULES
from tandem_operator.json_schema import CLASS, whole_schema
from tandem_operator.structural import SchemaError, structural_schema

ROOT = Path(__file__).parents[3]
EXAMPLES = sorted((ROOT / "helm" / "tandem" / "examples").glob("*.yaml"))
OTHERS = {"cap_ipc_lock", "hca_shared_devices", "jwks_uri"}
"""Words with an underscore that are no fields of ours."""
KINDS = {kind.kind: kind for kind in crds.KINDS}
POOL = {"fleet": "r1", "role": "decode", "template": {"image": {"name": "engine:1"}}}


@functools.cache
def schema_of(kind: str, *, cel: bool = True) -> dict[str, Any]:
    """The whole schema of a resource."""
    version = crds.definition(KINDS[kind], cel=cel)["spec"]["versions"][0]
    assert version["name"] == VERSION
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return schema


SPECS = {kind: schema_of(kind)["properties"]["spec"] for kind in KINDS}


def refusals(kind: str, spec: dict[str, Any]) -> list[str]:
    return list(errors(SPECS[kind], with_defaults(SPECS[kind], spec)))


def fields(schema: dict[str, Any], where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    for name, part in schema.get("properties", {}).items():
        yield f"{where}.{name}", part
        yield from fields(part, f"{where}.{name}")
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from fields(schema[key], where)


# -- the files


def test_the_committed_files_are_what_the_classes_say() -> None:
    assert crds.differing(ROOT / crds.FOLDER) == [], "run python -m tandem_operator.crds"


def test_check_tells_files_that_differ_are_missing_or_are_of_no_resource(tmp_path: Path) -> None:
    assert crds.main([str(tmp_path)]) == 0
    assert crds.main(["--check", str(tmp_path)]) == 0
    (tmp_path / "fleets.yaml").write_text("changed")
    (tmp_path / "expertparallelpools.yaml").unlink()
    (tmp_path / "strangers.yaml").write_text("")
    assert crds.main(["--check", str(tmp_path)]) == 1
    assert crds.differing(tmp_path) == ["expertparallelpools.yaml", "fleets.yaml", "strangers.yaml"]


def test_rules_in_cel_are_in_every_file_but_not_in_those_for_old_servers(tmp_path: Path) -> None:
    assert all("x-kubernetes-validations" in content for content in crds.files().values())
    assert crds.main(["--no-cel", str(tmp_path)]) == 0
    written = {path.name: path.read_text() for path in tmp_path.glob("*.yaml")}
    assert written.keys() == crds.files().keys()
    assert not any("x-kubernetes-validations" in content for content in written.values())


def test_the_charts_files_never_go_without_cel() -> None:
    with pytest.raises(SystemExit):
        crds.main(["--no-cel"])


# -- the schemas


@pytest.mark.parametrize("cel", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_schemas_are_structural(kind: str, cel: bool) -> None:
    assert list(not_structural(schema_of(kind, cel=cel))) == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_described(kind: str) -> None:
    described = {part: schema_of(kind)["properties"][part] for part in ("spec", "status")}
    without = {name for name, part in fields({"properties": described}) if not part.get("description")}
    assert {name for name in without if ".hugePages." not in name} == set()


@pytest.mark.parametrize("kind", KINDS)
def test_descriptions_name_fields_as_the_resource_does(kind: str) -> None:
    words = {word for _, part in fields(schema_of(kind)) for word in re.findall(r"\w+", part.get("description", ""))}
    assert {word for word in words if "_" in word and word.lower() not in OTHERS} == set()


@pytest.mark.parametrize("kind", KINDS)
def test_columns_show_fields_that_exist_as_what_they_are(kind: str) -> None:
    known = dict(fields(schema_of(kind)))
    for column in KINDS[kind].columns:
        if column.path != ".metadata.creationTimestamp":
            assert known[column.path]["type"] == column.type


def test_a_pool_is_scaled_by_fields_that_exist() -> None:
    scale = crds.definition(KINDS["ExpertParallelPool"])["spec"]["versions"][0]["subresources"]["scale"]
    known = dict(fields(schema_of("ExpertParallelPool")))
    assert {known[path]["type"] for path in scale.values()} == {"integer", "string"}
    assert known[".spec.replicas"]["default"] == 1


def test_every_rule_is_of_a_class_and_of_fields_that_it_has() -> None:
    known: dict[str, set[str]] = {}

    def note(schema: dict[str, Any]) -> None:
        known.setdefault(schema.get(CLASS, ""), set()).update(schema.get("properties", {}))
        for key in ("properties", "patternProperties"):
            for part in schema.get(key, {}).values():
                note(part)
        for key in ("items", "additionalProperties"):
            if isinstance(schema.get(key), dict):
                note(schema[key])
        for part in schema.get("anyOf", ()):
            note(part)

    for spec in (FleetSpec, PoolSpec, GroupSpec):
        note(whole_schema(spec))
    for name, rules in RULES.items():
        for rule in rules:
            assert set(re.findall(r"(?:self|oldSelf)\.(\w+)", rule.expression)) <= known[name]


# -- what a server takes


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_server_takes_every_example(path: Path) -> None:
    spec = yaml.safe_load(path.read_text())["fleet"]["spec"]
    assert refusals("Fleet", spec) == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_servers_defaults_are_those_of_the_classes(path: Path) -> None:
    spec = yaml.safe_load(path.read_text())["fleet"]["spec"]
    assert FleetSpec.model_validate(with_defaults(SPECS["Fleet"], spec)) == FleetSpec.model_validate(spec)


def test_every_default_is_that_of_the_class() -> None:
    empty = FleetSpec.model_validate(FLEET)
    sections = {kubernetes_name(name) for name, value in empty if isinstance(value, Section)}
    spec = with_defaults(SPECS["Fleet"], {name: {} for name in sections} | FLEET)
    assert FleetSpec.model_validate(spec) == empty


@pytest.mark.parametrize("kind", [FleetSpec, PoolSpec])
def test_what_the_operator_writes_is_taken_as_it_is(kind: type[FleetSpec | PoolSpec]) -> None:
    name, least = ("Fleet", FLEET) if kind is FleetSpec else ("ExpertParallelPool", POOL)
    written = kind.model_validate(least).model_dump(mode="json", by_alias=True, exclude_none=True)
    # Prices are exact: they are written as text, and a server has numbers.
    if kind is FleetSpec:
        del written["metering"]["defaultPrice"]
    assert refusals(name, written) == []


@pytest.mark.parametrize("wrong", [*REFUSED_BY_SCHEMA, *UNKNOWN])
def test_the_server_refuses(wrong: str) -> None:
    assert refusals("Fleet", {**FLEET, **(REFUSED_BY_SCHEMA | UNKNOWN)[wrong]}) != []


@pytest.mark.parametrize("wrong", REFUSED_BY_SCHEMA)
def test_what_the_server_refuses_the_class_refuses_too(wrong: str) -> None:
    with pytest.raises(ValidationError):
        FleetSpec.model_validate({**FLEET, **REFUSED_BY_SCHEMA[wrong]})


BETWEEN_FIELDS = [
    ({"decode": {"autoscaling": {"minGroups": 3, "maxGroups": 2}}}, "above maxGroups|above max_groups"),
    ({"decode": {"rollout": {"maxSurge": 0, "maxUnavailable": 0}}}, "cannot both be 0"),
    ({"model": {"volume": {"claim": "a", "hostPath": "/b"}}}, "not both"),
    ({"planning": {"gpuBudget": 8}}, "above planning.gpuBudget"),
]


@pytest.mark.parametrize(("part", "says"), BETWEEN_FIELDS)
def test_the_operator_refuses_what_the_schema_cannot_say(part: dict[str, Any], says: str) -> None:
    assert refusals("Fleet", {**FLEET, **part}) == []
    with pytest.raises(ValidationError, match=says):
        FleetSpec.model_validate({**FLEET, **part})


@pytest.mark.parametrize("amount", [8, "8", "500m", "1.5", "64Gi"])
def test_amounts_may_be_numbers_or_text_and_are_read_as_text(amount: int | str) -> None:
    spec = {**FLEET, "decode": {"pods": {"rdma": {"rdma/hca": amount}}}}
    assert refusals("Fleet", spec) == []
    assert FleetSpec.model_validate(spec).decode.pods.rdma == {"rdma/hca": str(amount)}


@pytest.mark.parametrize("amount", [True, 0.5, "1 Gi", "-1"])
def test_other_amounts_are_refused_by_the_class_too(amount: object) -> None:
    with pytest.raises(ValidationError):
        FleetSpec.model_validate({**FLEET, "decode": {"pods": {"rdma": {"rdma/hca": amount}}}})


@pytest.mark.parametrize(("name", "valid"), [("r1", True), ("a" * 32, True), ("a" * 33, False), ("1r", False)])
def test_a_fleets_name_leaves_room_for_those_of_its_groups(name: str, valid: bool) -> None:
    assert bool(re.search(KINDS["Fleet"].name_pattern, name)) is valid
    if valid:
        assert re.search(KINDS["ExpertParallelGroup"].name_pattern, f"{name}-prefill-1023")


# -- what no structural schema can say


class TwoTypes(Section):
    either: int | list[int] = 0


class Choice(Section):
    kind: Literal["a"] = "a"
    count: int | None = Field(None, ge=1)


class Multiple(Section):
    step: int = Field(2, multiple_of=2)


@pytest.mark.parametrize(
    ("model", "says"), [(TwoTypes, "TwoTypes.either: may be of several"), (Multiple, "multipleOf")]
)
def test_a_class_that_says_what_no_server_understands_is_an_error(model: type[Section], says: str) -> None:
    with pytest.raises(SchemaError, match=says):
        structural_schema(model)


def test_optional_is_nullable_and_one_choice_an_enumeration() -> None:
    properties = structural_schema(Choice)["properties"]
    assert properties["count"] == {"type": "integer", "minimum": 1, "nullable": True}
    assert properties["kind"]["enum"] == ["a"]
