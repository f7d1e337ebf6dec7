"""Gateways that hostile clients are let loose on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hostile_stage import Stage, stage

_SAYS = ["--longest", "4", "--tokens", "70", "71", "1008", "240", "159", "152", "128", "300", "1007", "1015", "1017"]
"""Pieces of text, broken characters, tags of reasoning and of tool calls."""


@pytest.fixture(scope="session")
def _stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(tmp_path_factory.mktemp("fuzzed"), *_SAYS) as made:
        yield made


@pytest.fixture
def gateway(_stage: Stage) -> Iterator[Stage]:
    """One that answers at once. After the test nothing may be left of it, and no fault be in its log."""
    _stage.faults()
    yield _stage
    _stage.check()


@pytest.fixture(scope="module")
def _flooded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    says = ["--longest", "4000", "--ttft-ms", "5", "--itl-ms", "100"]
    with stage(tmp_path_factory.mktemp("flooded"), *says) as made:
        for _ in range(4):
            assert made.complete()[0] == 200
        yield made


@pytest.fixture
def flooded(_flooded: Stage) -> Iterator[Stage]:
    """One whose workers take their time. After the test nothing may be left of it, and no fault be in its log."""
    _flooded.faults()
    yield _flooded
    _flooded.check()
