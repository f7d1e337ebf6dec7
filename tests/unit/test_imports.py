"""Imports point one way, and `core` needs nothing but the standard library and msgspec."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "platform" / "tandem"
MAY_IMPORT = {
    "core": {"core"},
    "config": {"core"},
    "config_file": {"config"},
    "planning_policy": {"config", "core"},
    "state": {"state", "core"},
    "models": {"models", "core"},
    "engine": {"engine", "core"},
    "client": {"client", "v1"},
    "gateway": {"gateway", "engine", "state", "models", "core", "config", "v1"},
    "fleet": {"fleet", "gateway", "engine", "state", "models", "core", "config", "planning_policy", "v1"},
    "sim": {"sim", "core"},
    "bench": {"bench", "fleet", "engine", "core", "config"},
    "cli": {"cli", "sim", "bench", "fleet", "gateway", "engine", "state", "models", "core", "config", "config_file"},
}


def imports(file: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(part: str) -> list[Path]:
    single = PACKAGE / f"{part}.py"
    return [single] if single.exists() else sorted((PACKAGE / part).rglob("*.py"))


def test_every_part_of_the_package_has_its_rule() -> None:
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__", "v1"} == set(MAY_IMPORT)


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_imports_only_what_is_below_it(part: str) -> None:
    found = {
        (file.name, name.split(".")[1])
        for file in files(part)
        for name in imports(file)
        if name.startswith("tandem.") and name.split(".")[1] not in MAY_IMPORT[part] | {"__version__"}
    }
    assert found == set()


def test_the_client_loads_neither_the_gateway_nor_anything_heavy() -> None:
    """An application that only asks a fleet needs no more than this to be installed."""
    allowed = set(sys.stdlib_module_names) | {"msgspec", "grpc", "google", "tandem"}
    assert {name for file in files("client") for name in imports(file) if name.split(".")[0] not in allowed} == set()


def test_core_needs_nothing_but_the_standard_library_and_msgspec() -> None:
    allowed = set(sys.stdlib_module_names) | {"msgspec", "tandem"}
    assert {name for file in files("core") for name in imports(file) if name.split(".")[0] not in allowed} == set()


def test_the_simulator_needs_nothing_but_the_standard_library_and_msgspec() -> None:
    allowed = set(sys.stdlib_module_names) | {"msgspec", "tandem"}
    assert {name for file in files("sim") for name in imports(file) if name.split(".")[0] not in allowed} == set()


def test_core_has_no_clock_no_randomness_and_no_network_of_its_own() -> None:
    forbidden = {"time", "random", "secrets", "datetime", "asyncio", "threading", "socket", "subprocess", "os"}
    assert {name for file in files("core") for name in imports(file) if name.split(".")[0] in forbidden} == set()
