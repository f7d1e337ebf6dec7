"""A node of ours in a Ray cluster that is somebody else's (KubeRay's): started as anybody's, by `ray start`.

Its GCS has Ray's own settings, by which a raylet needs the agents that ours do without (`ray_processes`). And other
fleets may be there: what we call things is told apart by the fleet's Ray namespace.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from tandem.engine import guard
from tandem.fleet.ray_processes import GATEWAY_RESOURCE, HEAD_RESOURCE, NodePlace, ray_folder

_OBJECT_STORE_BYTES = 80 * 2**20
"""Ray takes no less than 75 MiB. Only control messages pass through it."""


def gateway_resource(namespace: str) -> str:
    """What a node that is a gateway's offers once. `namespace`: the fleet's, in another's cluster; empty = its own."""
    return f"{GATEWAY_RESOURCE}-{namespace}" if namespace else GATEWAY_RESOURCE


def head_resource(namespace: str) -> str:
    """What the node offers that the fleet's controller lives on. `namespace`: as above."""
    return f"tandem-head-{namespace}" if namespace else HEAD_RESOURCE


def ranks_folder(namespace: str) -> Path:
    """Where ranks keep logs and scratch files on nodes that other fleets may use as well: short, for Unix sockets."""
    return Path("/tmp") / f"tandem-{hashlib.sha256(namespace.encode()).hexdigest()[:8]}"


def has_raylet(pid: int) -> bool:
    """Whether a raylet runs below the process `pid`, which is `ray start`."""
    for below in guard.descendants(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            if Path(f"/proc/{below}/comm").read_text().strip() == "raylet":
                return True
    return False


def guest_command(place: NodePlace, *, gcs: str, name: str, folder: Path, resources: Mapping[str, float]) -> list[str]:
    """Command line of a node: it runs until the node ends, or is told to end it.

    Args:
        place: where it is.
        gcs: address of the cluster's GCS.
        name: what Ray calls the node; by it the caller finds it.
        folder: for Ray's session, of a short path.
        resources: what it offers; CPU and GPU count as 0 where they are missing.

    Raises ClusterError if this Ray is not the one that Tandem knows.
    """
    ray_folder()
    custom = {key: amount for key, amount in resources.items() if key not in ("CPU", "GPU")}
    return [
        # The node has been drained as far as it is to be: Ray's own 30 s would outlast our grace, and end in SIGKILL.
        *("env", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0"),
        *(sys.executable, "-m", "ray.scripts.scripts", "start"),
        "--block",
        f"--address={gcs}",
        f"--node-ip-address={place.host}",
        f"--node-name={name}",
        f"--num-cpus={resources.get('CPU', 0.0):.0f}",
        f"--num-gpus={resources.get('GPU', 0.0):.0f}",
        f"--resources={json.dumps(custom)}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        # A pod's /dev/shm is 64 MiB unless somebody says otherwise.
        f"--plasma-directory={folder}",
        f"--temp-dir={folder}",
        "--include-log-monitor=false",
        "--disable-usage-stats",
    ]
