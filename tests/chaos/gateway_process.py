"""`python -m chaos.gateway_process`: one gateway replica in a process of its own, outside Ray.

Reads one JSON line (`Wanted`) from standard input, prints the replica's record, and runs until standard input ends.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import msgspec

from tandem.config import FleetConfig
from tandem.gateway.observe.logs import configure_logs
from tandem.gateway.replica import GatewayReplica


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What the process is told."""

    config: str
    """FleetConfig as JSON."""
    model_path: str
    store_url: str
    folder: str
    replica: str


def main() -> None:
    wanted = msgspec.json.decode(sys.stdin.buffer.readline(), type=Wanted)
    config = FleetConfig.model_validate_json(wanted.config)
    logs = configure_logs(json=False, fleet=config.name, replica=wanted.replica)
    replica = GatewayReplica(
        config,
        model_path=Path(wanted.model_path),
        store_url=wanted.store_url,
        folder=Path(wanted.folder),
        replica=wanted.replica,
    )
    record = replica.start()
    sys.stdout.buffer.write(msgspec.json.encode(record) + b"\n")
    sys.stdout.flush()
    sys.stdin.buffer.read()
    logging.getLogger(__name__).info("told to stop")
    replica.stop(5)
    logs.close()


if __name__ == "__main__":
    main()
