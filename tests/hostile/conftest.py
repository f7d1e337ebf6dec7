"""Gateways that hostile clients are let loose on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from hostile_crowd import allow_files
from hostile_stage import Stage, stage

_SAYS = ["--longest", "4", "--tokens", "70", "71", "1008", "240", "159", "152", "128", "300", "1007", "1015", "1017"]
"""Pieces of text, broken characters, tags of reasoning and of tool calls."""
BACK_MIB = 48.0
"""A gateway may be so much larger after a flood than before it: the allocator's leftovers, but no leak."""
FILES = 64
"""So many more descriptors may be open: idle connections to the workers are kept."""


@pytest.fixture(scope="session")
def _stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(tmp_path_factory.mktemp("fuzzed"), *_SAYS) as made:
        yield made


@pytest.fixture
def gateway(_stage: Stage) -> Iterator[Stage]:
    """One that answers at once. After the test nothing may be left of it, and no fault be in its log."""
    _stage.begin()
    yield _stage
    _stage.check()


@pytest.fixture(scope="module")
def _flooded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    allow_files()
    says = ["--longest", "4000", "--ttft-ms", "5", "--itl-ms", "100"]
    with stage(tmp_path_factory.mktemp("flooded"), *says) as made:
        for _ in range(4):
            assert made.complete()[0] == 200
        yield made


@pytest.fixture
def flooded(_flooded: Stage) -> Iterator[Stage]:
    """One whose workers take their time. After the test nothing may be left of it, and no fault be in its log."""
    _flooded.begin()
    yield _flooded
    _flooded.check()


@pytest.fixture
def flat(flooded: Stage) -> Callable[..., None]:
    """Call it when all is over: the gateway is as it was before the test, but for `slack` MiB."""
    memory, files = flooded.memory(), flooded.files()

    def check(slack: float = BACK_MIB) -> None:
        end = time.monotonic() + 10
        while (flooded.files() - files > FILES or flooded.memory() - memory >= slack) and time.monotonic() < end:
            time.sleep(0.05)
        grown = flooded.memory() - memory
        print(f"memory {memory:.0f} MiB {grown:+.0f}, files {files} {flooded.files() - files:+d}")
        assert flooded.files() - files <= FILES
        assert grown < slack

    return check
