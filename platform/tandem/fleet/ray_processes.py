"""The command lines of Ray's own processes, for a cluster of several logical nodes on one machine.

`ray start` and `ray.cluster_utils.Cluster` start 3 to 4 Python processes with each node (dashboard and runtime
environment agents, log monitor, autoscaler): four nodes took 9.2 s and 730 MB. We need none of them. GCS and raylets
alone take 0.6 s and 65 MB. The price is to know Ray's flags, so the version is checked.
"""

from __future__ import annotations

import base64
import importlib.metadata
import importlib.util
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

RAY_VERSION = "2.60.0"
"""The flags below are this version's (`ray/_private/services.py`, `raylet --helpfull`)."""

RANK_RESOURCE = "tandem-rank"
"""What a logical node offers once: room for one rank."""

GATEWAY_RESOURCE = "tandem-gateway"
"""What a node that is a gateway's offers once, where nodes belong to somebody (`ray.group_resources`)."""

HEAD_RESOURCE = "node:__internal_head__"
"""Ray Serve puts its controller where this is."""

OBJECT_STORE_BYTES = 32 * 2**20
"""Per node. Only control messages pass through it. The file in /dev/shm is sparse, and unlinked as it is made."""

GCS_PORT_FILE = "gcs_server_port_{node}"
"""The GCS writes the port that it chose into this file of the session folder."""

_NO_PORT = 65535
"""Stands where a worker wants the port of an agent that we do not run; it is never connected to."""

_IDLE_AGENT = ("/bin/sh", "-c", "exec cat >/dev/null", "tandem-no-agent")
"""A raylet insists on its two agents, and dies with them. This one sleeps until the raylet closes the pipe."""

SYSTEM_CONFIG: Mapping[str, object] = {
    "enable_metrics_collection": False,  # there is no agent to send them to
    "enable_pipe_based_agent_to_parent_health_check": True,  # gives the idle agents the pipe that ends them
    "enable_worker_prestart": False,  # idle Python workers, 57 MB each
    "prestart_worker_first_driver": False,
    "worker_niceness": 0,  # Ray's 15 would be inherited by engines and gateways
    "worker_oom_score_adjustment": 0,
    "memory_monitor_refresh_ms": 0,  # must not kill actors that supervise engines
    # A node that is refused a connection for 3 s is dead, one that hangs after 15 s; Ray's own take five times as long.
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 3,
    "event_stats": False,
    "debug_dump_period_milliseconds": 0,
}
"""Ray's settings, given to the GCS, from which all processes of the cluster read them."""

ENVIRONMENT: Mapping[str, str] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    # Serve would ask a gateway that stands still to end, and wait for it as long as for one that has requests.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}


def group_resource(group: str) -> str:
    """What a node that is a group's offers once, where nodes belong to somebody (`ray.group_resources`)."""
    return f"tandem-group-{group}"


class ClusterError(RuntimeError):
    """The Ray cluster could not be started or reached; the message says what to do."""


@dataclass(frozen=True)
class NodePlace:
    """Where a logical node lives."""

    host: str = "127.0.0.1"
    """Its address. Processes on loopback listen there only, others on all interfaces."""
    prefix: tuple[str, ...] = ()
    """Command that enters the node's namespaces, as `ip netns exec node1`; empty = this process's own."""
    gpus: tuple[int, ...] = ()
    """CUDA devices of this machine that are this node's."""
    offers: Mapping[str, float] | None = None
    """Its resources besides CPU and GPU; None = room for one rank."""


@dataclass(frozen=True)
class GcsSettings:
    """How the GCS of a cluster differs from one that nobody but this machine needs."""

    port: int = 0
    """0 = any."""
    memory: Path | None = None
    """Folder of what it knows, which another one goes on with; None = in the session's, gone with that."""
    patience: float = 60.0
    """Seconds after which raylets, workers and drivers that cannot reach it end themselves."""


@dataclass(frozen=True)
class Session:
    """One cluster's folder and name."""

    temp: Path
    name: str = "ray"
    head: str = field(default_factory=lambda: secrets.token_hex(28))
    """Node id of the head."""

    @property
    def folder(self) -> Path:
        return self.temp / self.name

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    def make(self) -> None:
        """Make the folders. Raises ClusterError if the path is too long for Unix sockets."""
        longest = self.folder / "sockets" / "plasma_store_999"
        if len(os.fsencode(longest)) > 107:
            raise ClusterError(f"{self.temp} is too long a path for Ray's Unix sockets: choose a shorter folder")
        for folder in ("sockets", "logs/old", "runtime_resources"):
            (self.folder / folder).mkdir(parents=True)


@cache
def ray_folder() -> Path:
    """The installed package's folder, found without importing it. Raises ClusterError if we do not know its version."""
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        version = "no version"
    if version != RAY_VERSION:
        raise ClusterError(f"this Tandem knows Ray {RAY_VERSION}, but {version} is installed: install the former")
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def gcs_command(session: Session, place: NodePlace, settings: GcsSettings) -> list[str]:
    """Command line of the GCS. What it knows is in files (RocksDB), so that another one can go on on the same port."""
    system = {
        **SYSTEM_CONFIG,
        "gcs_storage": "rocksdb",
        "gcs_storage_path": str(settings.memory or session.folder / "gcs"),
        "gcs_rpc_server_reconnect_timeout_s": round(settings.patience),
    }
    config = base64.b64encode(json.dumps(system).encode()).decode()
    return [
        str(ray_folder() / "core/src/ray/gcs/gcs_server"),
        f"--log_dir={session.logs}",
        f"--config_list={config}",
        f"--gcs_server_port={settings.port}",
        "--metrics-agent-port=-1",
        f"--node-ip-address={place.host}",
        f"--session-name={session.name}",
        f"--session-dir={session.folder}",
        f"--node-id={session.head}",
        f"--stdout_filepath={session.logs / 'gcs_server.out'}",
        f"--stderr_filepath={session.logs / 'gcs_server.err'}",
    ]


def raylet_command(
    session: Session,
    place: NodePlace,
    *,
    number: int,
    node: str,
    gcs: str,
    cluster: str,
    resources: Mapping[str, float],
    name: str = "",
) -> list[str]:
    """Command line of the raylet of one node.

    Args:
        number: of the start, unique in the session.
        node: its id, 56 hex digits; the session's head is the head.
        gcs: address of the GCS.
        cluster: id that the GCS gave the cluster.
        resources: what the node offers; CPU must be among them.
        name: what Ray calls the node; empty = by its number.
    """
    ray = ray_folder()
    raylet = session.folder / "sockets" / f"raylet_{number}"
    plasma = session.folder / "sockets" / f"plasma_store_{number}"
    worker = [
        sys.executable,
        str(ray / "_private/workers/setup_worker.py"),
        str(ray / "_private/workers/default_worker.py"),
        f"--node-ip-address={place.host}",
        "--node-manager-port=RAY_NODE_MANAGER_PORT_PLACEHOLDER",
        f"--object-store-name={plasma}",
        f"--raylet-name={raylet}",
        "--redis-address=None",
        "--metrics-agent-port=-1",
        f"--runtime-env-agent-port={_NO_PORT}",
        f"--gcs-address={gcs}",
        f"--session-name={session.name}",
        f"--temp-dir={session.temp}",
        "--webui=",
        f"--cluster-id={cluster}",
        "RAY_WORKER_DYNAMIC_OPTION_PLACEHOLDER",
    ]
    offered = {**resources, f"node:{place.host}": 1.0, "object_store_memory": OBJECT_STORE_BYTES}
    command = [
        str(ray / "core/src/ray/raylet/raylet"),
        f"--raylet_socket_name={raylet}",
        f"--store_socket_name={plasma}",
        "--object_manager_port=0",
        "--node_manager_port=0",
        "--min_worker_port=0",
        "--max_worker_port=0",
        f"--node_id={node}",
        f"--node-name={name or f'node-{number}'}",
        f"--node_ip_address={place.host}",
        f"--static_resource_list={','.join(f'{name},{amount}' for name, amount in offered.items())}",
        f"--maximum_startup_concurrency={os.cpu_count() or 1}",
        "--num_prestart_python_workers=0",
        f"--python_worker_command={subprocess.list2cmdline(worker)}",
        "--java_worker_command=",
        "--cpp_worker_command=",
        f"--native_library_path={ray / 'cpp/lib'}",
        f"--temp_dir={session.temp}",
        f"--session_dir={session.folder}",
        f"--log_dir={session.logs}",
        f"--resource_dir={session.folder / 'runtime_resources'}",
        "--metrics-agent-port=-1",
        "--metrics_export_port=-1",
        "--dashboard_agent_listen_port=-1",
        f"--runtime_env_agent_port={_NO_PORT}",
        f"--dashboard_agent_command={_agent('dashboard')}",
        f"--runtime_env_agent_command={_agent('runtime-env')}",
        f"--object_store_memory={OBJECT_STORE_BYTES}",
        "--plasma_directory=/dev/shm",
        f"--fallback_directory={session.folder}",
        "--ray-debugger-external=0",
        f"--gcs-address={gcs}",
        f"--session-name={session.name}",
        "--labels=",
        f"--cluster-id={cluster}",
        f"--stdout_filepath={session.logs / f'raylet_{number}.out'}",
        f"--stderr_filepath={session.logs / f'raylet_{number}.err'}",
    ]
    return [*command, "--head"] if node == session.head else command


def _agent(name: str) -> str:
    return subprocess.list2cmdline([*_IDLE_AGENT, name])
