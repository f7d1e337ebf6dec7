"""A whole gateway replica in a process of its own, without Ray, over stand-in workers.

`python -m hostile_gateway` prints its HTTP and gRPC addresses as a JSON line and runs until its standard input ends.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import resource
import sys
from pathlib import Path

import msgspec

from tandem.config import FleetConfig
from tandem.core.types import Group, GroupState, Role
from tandem.gateway.replica import GatewayReplica
from tandem.models.tokenizer import VOCAB_SIZE, tokenizer_config, tokenizer_json
from tandem.state import open_store

CONTEXT = 163_840
"""As R1's: a prompt of 100,000 tokens fits."""
MODEL = "tiny"


def model_folder(at: Path) -> Path:
    """The small files of a checkpoint."""
    at.mkdir(parents=True, exist_ok=True)
    files: dict[str, object] = {
        "config.json": {"max_position_embeddings": CONTEXT, "vocab_size": VOCAB_SIZE},
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": tokenizer_config(CONTEXT),
    }
    for name, content in files.items():
        (at / name).write_text(json.dumps(content), encoding="utf-8")
    return at


async def _announce(folder: Path, urls: dict[str, list[str]]) -> None:
    store = await open_store("embedded", fleet="hostile", folder=folder)
    try:
        for role, all_of_it in urls.items():
            for number, url in enumerate(all_of_it):
                group = Group(
                    group=f"{role}-{number}",
                    role=Role(role),
                    epoch=1,
                    state=GroupState.READY,
                    url=url,
                    bootstrap_host="127.0.0.1",
                    bootstrap_port=8998,
                )
                await store.put(f"groups/{group.group}", msgspec.json.encode(group))
    finally:
        await store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where everything is written")
    parser.add_argument("--urls", required=True, help="JSON: the workers' URLs by role")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    asyncio.run(_announce(options.folder, json.loads(options.urls)))
    pool = {"max_total_tokens": 10**7}
    config = FleetConfig.model_validate(
        {
            "name": "hostile",
            "gateway": {"port": 0, "grpc_port": 0},
            "model": {"name": MODEL},
            "prefill": pool,
            "decode": pool,
            # No test here is about waiting for a turn.
            "admission": {"running_per_decode_rank": 4096, "tokens_per_prefill_rank": 10**8},
        }
    )
    replica = GatewayReplica(config, model_path=model_folder(options.folder / "model"), folder=options.folder)
    record = replica.start()
    print(json.dumps({"url": record.url, "grpc": record.grpc}), flush=True)
    sys.stdin.read()
    replica.stop(grace=0)


if __name__ == "__main__":
    main()
