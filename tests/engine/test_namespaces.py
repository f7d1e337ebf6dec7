"""The same fleet on four machines: every rank in a network namespace, with an address of its own."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.fleet import Fleet, running
from support.namespaces import address, bytes_sent, machines, name, needs_root
from support.oracle import Oracle
from tandem.config import ControlConfig, FleetConfig, GatewayConfig, ModelConfig, RayConfig
from tandem.fleet.cluster import LocalCluster
from tandem.fleet.ray_processes import NodePlace
from tandem.fleet.run_folder import make_scratch

pytestmark = [needs_root, pytest.mark.timeout(300)]

RANKS = 4
FLOAT32_TOKEN = 4 * (64 + 16) * 4
"""KV bytes of one token of the tiny model: layers times latent size times element size."""


@pytest.fixture(scope="module")
def scattered(tiny: Path) -> Iterator[Fleet]:
    """A fleet on a Ray cluster whose nodes are namespaces, reached by `ray.address` as any other cluster is."""
    with machines(RANKS) as addresses:
        places = [
            NodePlace(host=host, prefix=("ip", "netns", "exec", name(number)))
            for number, host in enumerate(addresses, start=1)
        ]
        scratch = make_scratch()
        cluster = LocalCluster.start(scratch, places)
        try:
            config = FleetConfig(
                name="scattered",
                model=ModelConfig(path=tiny),
                gateway=GatewayConfig(host=address(1), port=0, grpc_port=0, auth="off"),
                control=ControlConfig(host=address(1), port=0),
                ray=RayConfig(address=cluster.address),
            )
            with running(config) as fleet:
                yield fleet
        finally:
            cluster.stop()
            shutil.rmtree(scratch)


def test_every_rank_has_a_machine_and_an_address_of_its_own(scattered: Fleet) -> None:
    ranks = [rank for group in scattered.status()["groups"] for rank in group["ranks"]]
    networks = {os.readlink(f"/proc/{rank['pid']}/ns/net") for rank in ranks}
    assert len(networks) == RANKS
    assert os.readlink("/proc/self/ns/net") not in networks
    assert {rank["host"] for rank in ranks} == {address(number) for number in range(1, RANKS + 1)}


def test_streams_across_machines_equal_the_oracle(scattered: Fleet, oracle: Oracle) -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(300, 900) for _ in range(length)] for length in (1, 40, 300)]
    assert scattered.complete_all(prompts, 16) == [oracle.complete(prompt, 16) for prompt in prompts]


def test_kv_and_expert_rows_cross_the_network(scattered: Fleet) -> None:
    prompt = [random.Random(4).randrange(300, 900) for _ in range(200)]
    machine = {address(number): number for number in range(1, RANKS + 1)}
    sent = {host: bytes_sent(number) for host, number in machine.items()}
    kv = scattered.counted("prefill-0", "tandem_engine_kv_bytes_sent_total")
    rows = {
        group: scattered.counted(group, "tandem_engine_a2a_bytes_sent_total") for group in ("prefill-0", "decode-0")
    }
    scattered.complete(prompt, 16)
    assert scattered.counted("prefill-0", "tandem_engine_kv_bytes_sent_total") - kv == 200 * FLOAT32_TOKEN
    for group, before in rows.items():
        exchanged = scattered.counted(group, "tandem_engine_a2a_bytes_sent_total") - before
        hosts = [rank["host"] for rank in scattered.group(group)["ranks"]]
        crossed = sum(bytes_sent(machine[host]) - sent[host] for host in hosts)
        assert crossed >= exchanged > 0
