"""The chart's values: their schema is that of the classes, and its examples are fleets that can run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tandem.core.layout import GroupLayout, plan_group
from tandem.core.types import Role
from tandem.models.catalog import load_shape
from tandem_operator import chart_values
from tandem_operator.api.fleet import FleetSpec
from tandem_operator.chart_values import Values

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "tandem"
EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
SCHEMA = chart_values.values_schema()
H200_BYTES = 141 * 10**9


def loaded(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text())
    return values


def fleet_of(example: Path) -> FleetSpec:
    return FleetSpec.model_validate(loaded(example)["fleet"]["spec"])


def test_the_committed_schema_is_what_the_classes_say() -> None:
    where = str(ROOT / chart_values.FILE)
    assert chart_values.main(["--check", where]) == 0, "run python -m tandem_operator.chart_values"


def test_check_tells_a_file_that_differs(tmp_path: Path) -> None:
    file = tmp_path / "schema.json"
    assert chart_values.main(["--check", str(file)]) == 1
    assert chart_values.main([str(file)]) == 0
    assert chart_values.main(["--check", str(file)]) == 0
    file.write_text("{}")
    assert chart_values.main(["--check", str(file)]) == 1


def test_the_schema_is_one_of_draft_7() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert re.findall(r'"(?:\$ref|x-[a-z-]+)":', json.dumps(SCHEMA)) == []


def test_the_default_values_are_those_of_the_classes() -> None:
    values = loaded(CHART / "values.yaml")
    jsonschema.Draft7Validator(SCHEMA).validate(values)
    # What an operator needs is no fleet's business, so the class has no opinion.
    del values["operator"]["resources"]
    values["fleet"]["spec"] = None
    assert Values.model_validate(values) == Values()


def test_values_yaml_shows_every_value() -> None:
    def missing(schema: dict[str, Any], values: dict[str, Any], where: str = "") -> list[str]:
        found = []
        for name, part in schema["properties"].items():
            if name not in values:
                found.append(f"{where}.{name}")
            elif "properties" in part and values[name]:
                found += missing(part, values[name], f"{where}.{name}")
        return found

    assert missing(SCHEMA, loaded(CHART / "values.yaml")) == [".global"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_is_valid(path: Path) -> None:
    jsonschema.Draft7Validator(SCHEMA).validate(loaded(path))
    values = Values.model_validate(loaded(path))
    assert values.fleet.create
    assert values.fleet.spec is not None


TYPOS: list[dict[str, Any]] = [
    {"operatr": {}},
    {"operator": {"replica": 2}},
    {"operator": {"replicas": "two"}},
    {"operator": {"watchNamespaces": ["Not_A_Name"]}},
    {"operator": {"runAsUser": 0}},
    {"fleet": {"name": "1st"}},
    {"fleet": {"spec": {"prefil": {}}}},
    {"fleet": {"spec": {"decode": {"gpus_per_node": 8}}}},
    {"fleet": {"spec": {"tenants": {"Acme": {}}}}},
    {"monitoring": {"rules": "on"}},
]


@pytest.mark.parametrize("values", TYPOS, ids=str)
def test_typing_errors_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(SCHEMA).validate(values)


# -- the examples as fleets


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_groups_of_every_example_can_run_their_model(path: Path, role: Role) -> None:
    spec = fleet_of(path)
    pool = spec.prefill if role is Role.PREFILL else spec.decode
    on_gpus = spec.device == "cuda"
    plan = plan_group(
        load_shape("r1" if on_gpus else "tiny"),
        GroupLayout(
            role=role,
            nodes=pool.nodes,
            gpus_per_node=pool.gpus_per_node,
            device=spec.device,
            redundant_experts=pool.redundant_experts,
            max_total_tokens=pool.max_total_tokens,
            memory_per_gpu=H200_BYTES if on_gpus else None,
        ),
    )
    assert plan.all_to_all
    assert plan.kv_tokens_per_rank is not None
    # Every rank holds the longest prompt that an ordinary client sends.
    assert plan.kv_tokens_per_rank >= 8192


def test_the_large_example_is_deepseeks_own_layout() -> None:
    spec = fleet_of(CHART / "examples" / "r1-4p-18d.yaml")
    assert spec.prefill.nodes * spec.prefill.gpus_per_node == 32
    assert spec.decode.nodes * spec.decode.gpus_per_node == 144
    assert spec.decode.redundant_experts == 32
    assert all(pool.pods.rdma and pool.pods.topology for pool in (spec.prefill, spec.decode))
    assert all(pool.pods.gang.scheduler == "kueue" for pool in (spec.prefill, spec.decode))
    most = (4 * spec.prefill.nodes + spec.decode.nodes) * 8
    assert spec.planning.gpu_budget == most
