"""A gateway replica in a process of its own, for tests that kill it.

`python gateway_process.py FOLDER STORE_URL REPLICA LEASE_S` prints its record as JSON when it listens, and goes on
until its standard input ends.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import msgspec

from tandem.config import FleetConfig
from tandem.gateway import replica as module
from tandem.gateway.survival.registration import Registration


def main() -> None:
    folder, store_url, name, lease_s = sys.argv[1:]
    module.Registration = partial(Registration, lease_s=float(lease_s))  # type: ignore[misc,assignment]
    config = FleetConfig.model_validate({"name": "t", "gateway": {"port": 0, "grpc_port": 0}})
    at = Path(folder)
    one = module.GatewayReplica(config, model_path=at / "tiny", store_url=store_url, folder=at / name, replica=name)
    print(msgspec.json.encode(one.start(30)).decode(), flush=True)
    sys.stdin.read()
    one.stop(1)


if __name__ == "__main__":
    main()
