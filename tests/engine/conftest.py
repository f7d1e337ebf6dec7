"""Tests with the real engine. They share one fleet: prefill EP2 and decode EP2 on four logical nodes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fleet import Fleet, ephemeral, running
from support.oracle import Oracle
from tandem.config import PoolConfig
from tandem.models.tiny import ensure_tiny


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the tests' fleets keep their files, instead of the user's own folder."""
    folder = tmp_path_factory.mktemp("tandem")
    before = os.environ.get("TANDEM_HOME")
    os.environ["TANDEM_HOME"] = str(folder)
    yield folder
    os.environ.pop("TANDEM_HOME")
    if before is not None:
        os.environ["TANDEM_HOME"] = before


@pytest.fixture(scope="session")
def tiny(home: Path) -> Path:
    """The tiny model, seed 0."""
    ensure_tiny(home / "tiny")
    return home / "tiny"


@pytest.fixture(scope="session")
def oracle(tiny: Path) -> Oracle:
    return Oracle(tiny)


@pytest.fixture(scope="session")
def fleet(tiny: Path) -> Iterator[Fleet]:
    """The shared fleet. Tests that kill something wait until it is whole again."""
    with running(ephemeral("shared", tiny)) as fleet:
        yield fleet


@pytest.fixture(scope="module")
def four_groups(tiny: Path) -> Iterator[Fleet]:
    """Two prefill and two decode groups, each of one node."""
    pool = PoolConfig(groups=2, nodes=1)
    with running(ephemeral("four", tiny).model_copy(update={"prefill": pool, "decode": pool})) as fleet:
        yield fleet
