"""A gateway with an address of its own goes to the node that has it; what keeps one from listening is told."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from tandem.config import FleetConfig, GatewayConfig
from tandem.fleet.cluster import LocalCluster, NodePlace, connect, disconnect
from tandem.gateway import deployment
from tandem.models.tokenizer import VOCAB_SIZE, tokenizer_config, tokenizer_json
from tandem.state import open_store

FLEET = "placed"
NODES = 4


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A cluster whose nodes have different addresses of loopback, and a folder with a model's small files."""
    with tempfile.TemporaryDirectory(prefix="tandem-") as name:
        root = Path(name)
        files = {
            "config": {"max_position_embeddings": 4096, "vocab_size": VOCAB_SIZE},
            "tokenizer": tokenizer_json(),
            "tokenizer_config": tokenizer_config(4096),
        }
        for file, content in files.items():
            (root / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
        cluster = LocalCluster.start(root / "r", [NodePlace(host=f"127.0.0.{n}") for n in range(1, NODES + 1)])
        connect(cluster.address, namespace="test")
        try:
            yield root
        finally:
            deployment.remove(FleetConfig(name=FLEET))
            disconnect()
            cluster.stop()


def deploy(folder: Path, gateway: GatewayConfig) -> None:
    config = FleetConfig(name=FLEET, gateway=gateway)
    deployment.deploy(config, model_path=folder, store_url="embedded", folder=folder)


async def gateway_nodes(folder: Path) -> set[str]:
    """Addresses of the nodes on which gateways run."""
    store = await open_store("embedded", fleet=FLEET, folder=folder)
    entries = await store.list("gateways/")
    await store.close()
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    return {nodes[json.loads(entry.value)["node"]] for entry in entries}


@pytest.mark.timeout(120)
def test_replicas_go_to_the_node_that_has_their_address(folder: Path) -> None:
    for address in ("127.0.0.3", "127.0.0.2"):
        deploy(folder, GatewayConfig(host=address, port=0, grpc_port=0, replicas=2))
        assert asyncio.run(gateway_nodes(folder)) == {address}
        deployment.remove(FleetConfig(name=FLEET))


@pytest.mark.timeout(120)
def test_a_port_that_is_taken_is_named_in_the_error(folder: Path) -> None:
    with socket.create_server(("127.0.0.2", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RuntimeError, match=rf"cannot listen on \S*127\.0\.0\.2:{port}"):
            deploy(folder, GatewayConfig(host="127.0.0.2", port=port))


def test_an_address_that_does_not_exist_is_refused_at_once(folder: Path) -> None:
    with pytest.raises(RuntimeError, match=r"cannot listen on no-such-host\.invalid"):
        deploy(folder, GatewayConfig(host="no-such-host.invalid"))
