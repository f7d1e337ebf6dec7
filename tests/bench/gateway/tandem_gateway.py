"""Tandem's gateway replica in a process of its own, without Ray; the store has the groups a controller would write.

It prints its URL as a JSON line and runs until its standard input ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
from pathlib import Path

import msgspec

from tandem.config import FleetConfig
from tandem.core.types import Group, GroupState, Role
from tandem.gateway.replica import GatewayReplica, spare_the_collector
from tandem.state import open_store

FLEET = "bench"


def groups(urls: dict[str, list[str]]) -> list[Group]:
    """The stand-ins as groups of a fleet."""
    return [
        Group(
            group=f"{role}-{number}",
            role=Role(role),
            epoch=1,
            state=GroupState.READY,
            url=url,
            bootstrap_host="127.0.0.1",
            bootstrap_port=8998,
        )
        for role in ("prefill", "decode")
        for number, url in enumerate(urls[role])
    ]


async def _announce(folder: Path, found: list[Group]) -> None:
    store = await open_store("embedded", fleet=FLEET, folder=folder)
    try:
        for group in found:
            await store.put(f"groups/{group.group}", msgspec.json.encode(group))
    finally:
        await store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--folder", type=Path, required=True, help="where the store's file goes")
    parser.add_argument("--urls", required=True, help="JSON: the stand-ins' URLs by role")
    parser.add_argument("--port", type=int, default=0, help="that of another replica, to share it")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON: sections in place of the benchmark's own")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    asyncio.run(_announce(options.folder, groups(json.loads(options.urls))))
    config = FleetConfig.model_validate(
        {
            "name": FLEET,
            "model": {"name": "standin"},
            "gateway": {"port": options.port, "grpc_port": 0},
            "prefill": {"max_total_tokens": 10**7},
            "decode": {"max_total_tokens": 10**7},
            # The stand-ins take any number of requests; a queue before them would be measured instead of the gateway.
            "admission": {"running_per_decode_rank": 4096, "tokens_per_prefill_rank": 10**8},
            **options.config,
        }
    )
    replica = GatewayReplica(config, model_path=options.model, folder=options.folder)
    record = replica.start()
    spare_the_collector()
    print(json.dumps(record.url), flush=True)
    sys.stdin.read()
    replica.stop(grace=0)


if __name__ == "__main__":
    main()
