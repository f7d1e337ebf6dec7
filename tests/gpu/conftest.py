"""Tests with the real engine on one NVIDIA GPU, which one prefill and two decode groups share.

They want SGLang with CUDA, but neither Ray nor FlashInfer (docs/gpu.md). What the CPU engine shows is not shown again,
only what could be different: SGLang's overlap scheduler, its kernels and CUDA graphs, KV in the GPU's memory.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import torch

from support.pair import HOST, EnginePair
from tandem.config import FleetConfig
from tandem.core.types import Group, GroupState, Role
from tandem.gateway.replica import GatewayReplica
from tandem.models.tiny import ensure_tiny
from tandem.state import open_store

# Attention and sampling that need no further package; little of everything, as three engines start at once.
ARGS = (
    *("--attention-backend", "triton", "--sampling-backend", "pytorch"),
    *("--mem-fraction-static", "0.2", "--max-total-tokens", "8192"),
    *("--cuda-graph-max-bs-decode", "8", "--cuda-graph-max-bs-prefill", "64"),
)
FLEET = "gpu"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch with CUDA"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in the type and with the heads that GPU kernels are made for."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    ensure_tiny(folder, dtype="bfloat16", mla="r1")
    return folder


@pytest.fixture(scope="session")
def pair(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EnginePair]:
    with tempfile.TemporaryDirectory(prefix="tandem-") as scratch:
        folder = tmp_path_factory.mktemp("logs")
        pair = EnginePair(tiny, folder, scratch=Path(scratch), device="cuda", spares=1, args=ARGS)
        try:
            yield pair
        finally:
            pair.stop()


@pytest.fixture(scope="session")
def gateway(pair: EnginePair, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a gateway over the pair's groups."""
    folder = tmp_path_factory.mktemp("gateway")
    asyncio.run(_announce(folder, pair))
    config = FleetConfig.model_validate(
        {"name": FLEET, "device": "cuda", "model": {"name": "tiny"}, "gateway": {"port": 0, "grpc_port": 0}}
    )
    replica = GatewayReplica(config, model_path=tiny, folder=folder)
    try:
        yield replica.start().url
    finally:
        replica.stop(grace=0)


async def _announce(folder: Path, pair: EnginePair) -> None:
    """Write what a controller would."""
    store = await open_store("embedded", fleet=FLEET, folder=folder)
    try:
        for group in (pair.prefill, *pair.decodes):
            prefill = group.role is Role.PREFILL
            record = Group(
                group=group.name,
                role=group.role,
                epoch=1,
                state=GroupState.READY,
                url=group.url,
                bootstrap_host=HOST if prefill else "",
                bootstrap_port=group.endpoints[0].bootstrap_port if prefill else 0,
            )
            await store.put(f"groups/{record.group}", msgspec.json.encode(record))
    finally:
        await store.close()
