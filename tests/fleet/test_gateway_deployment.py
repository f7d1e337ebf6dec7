"""The gateway as a Ray Serve deployment: placed and watched by Serve, listening by itself."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import ray

from tandem.config import FleetConfig
from tandem.core.types import GatewayReplica
from tandem.gateway import deployment
from tandem.models.tokenizer import VOCAB_SIZE, tokenizer_config, tokenizer_json
from tandem.state import open_store

FLEET = "deployed"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A Ray cluster of its own, and a folder with a model's small files."""
    # Ray's sockets need a short path.
    root = Path(tempfile.mkdtemp(prefix="tg-"))
    config = {"max_position_embeddings": 4096, "vocab_size": VOCAB_SIZE}
    files = {"config": config, "tokenizer": tokenizer_json(), "tokenizer_config": tokenizer_config(4096)}
    (root / "tiny").mkdir()
    for name, content in files.items():
        (root / "tiny" / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    ray.init("local", _temp_dir=str(root / "ray"), num_cpus=1, include_dashboard=False, object_store_memory=80 * 2**20)
    try:
        yield root
    finally:
        deployment.remove(FleetConfig(name=FLEET))
        ray.shutdown()
        shutil.rmtree(root, ignore_errors=True)


async def gateways_when(folder: Path, true: Callable[[list[GatewayReplica]], bool]) -> list[GatewayReplica]:
    """The registered gateways, as soon as this is true of them."""
    store = await open_store("embedded", fleet=FLEET, folder=folder)
    known: dict[str, GatewayReplica] = {}
    async with asyncio.timeout(40):
        async for change in store.watch("gateways/"):
            if change.value is None:
                known.pop(change.key, None)
            else:
                known[change.key] = msgspec.json.decode(change.value, type=GatewayReplica)
            if true(list(known.values())):
                break
    await store.close()
    return list(known.values())


def health(url: str) -> dict[str, str]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)
    connection.request("GET", "/health")
    body = connection.getresponse().read()
    connection.close()
    return msgspec.json.decode(body, type=dict[str, str])


@pytest.mark.timeout(180)
async def test_serve_runs_the_replicas_and_replaces_one_that_dies(folder: Path) -> None:
    config = FleetConfig(name=FLEET, gateway={"port": 0, "grpc_port": 0, "replicas": 2})  # type: ignore[arg-type]
    deployment.deploy(config, model_path=folder / "tiny", store_url="embedded", folder=folder)
    first, second = await gateways_when(folder, lambda found: len(found) == 2)
    assert [health(one.url)["replica"] for one in (first, second)] == [first.replica, second.replica]
    os.kill(first.pid, signal.SIGKILL)
    # The dead one's registration runs out, and another has taken its place.
    found = await gateways_when(folder, lambda found: len(found) == 2 and first not in found)
    assert second in found
    assert all(health(one.url)["fleet"] == FLEET for one in found)


def test_a_gateway_process_imports_no_model_library_and_no_framework() -> None:
    heavy = "torch transformers ray sglang numpy fastapi starlette aiohttp"
    code = f"import sys, tandem.gateway.replica; print(*set('{heavy}'.split()) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == ""
