"""The CPU engine refuses versions that its hooks do not know."""

from __future__ import annotations

from importlib import metadata

import pytest

from tandem.engine.cpu.versions import KNOWN, EngineError, check_versions


def installed(**changed: str) -> dict[str, str]:
    return {**KNOWN, **changed}


def test_the_known_versions_are_accepted() -> None:
    check_versions(installed().__getitem__)


def test_a_local_build_of_a_known_version_is_accepted() -> None:
    check_versions(installed(torch="2.13.0+cpu").__getitem__)


def test_another_version_is_refused_with_both_numbers() -> None:
    with pytest.raises(EngineError, match=r"sglang is 0\.5\.24 \(needs 0\.5\.23\)"):
        check_versions(installed(sglang="0.5.24").__getitem__)


def test_a_missing_package_is_named() -> None:
    def version(package: str) -> str:
        if package == "nixl":
            raise metadata.PackageNotFoundError(package)
        return KNOWN[package]

    with pytest.raises(EngineError, match="nixl is missing"):
        check_versions(version)
