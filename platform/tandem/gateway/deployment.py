"""The gateway as a Ray Serve deployment. Serve places, health-checks, restarts and scales the replicas, and nothing
else: it runs without its own HTTP proxy, and no request passes a Serve handle (`docs/decisions/` says why).
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import ProxyLocation
from ray.serve.exceptions import RayServeException

from tandem.config import FleetConfig
from tandem.gateway.observe.logs import configure_logs
from tandem.gateway.replica import GatewayReplica, spare_the_collector
from tandem.gateway.stop_socket import (
    LINGER_VARIABLE,
    NODE_FOLDER_VARIABLE,
    SERVE_GRACE_S,
    SERVE_PATIENCE_S,
    STOP_SOCKET,
    serve_stop,
)

log = logging.getLogger(__name__)

_APPLICATION = "tandem-gateway"
_LOOK_S = 0.1


class _Gateway:
    """What runs in a Serve replica: a GatewayReplica that listens by itself."""

    def __init__(self, config: str, model_path: str, store_url: str, folder: str) -> None:
        fleet = FleetConfig.model_validate_json(config)
        own = os.environ.get(NODE_FOLDER_VARIABLE)
        replica = serve.get_replica_context().replica_id.unique_id
        # Ray keeps a worker's standard error in its session's folder.
        self._logs = configure_logs(json=fleet.observability.log_format == "json", fleet=fleet.name, replica=replica)
        self._replica = GatewayReplica(
            fleet,
            model_path=Path(model_path),
            store_url=store_url,
            folder=Path(own) / "store" if own else Path(folder),
            replica=replica,
            node=ray.get_runtime_context().get_node_id(),
            address=ray.util.get_node_ip_address() if own else "",
        )
        self._linger = float(os.environ.get(LINGER_VARIABLE, "0")) if own else 0.0
        self._replica.start()
        self._deaf = serve_stop(Path(own) / STOP_SOCKET, self._stop) if own else None
        spare_the_collector()

    async def check_health(self) -> None:
        """Called by Serve; raises when our own listener does not answer."""
        await asyncio.to_thread(self._replica.probe)

    async def url(self) -> str:
        """Where this replica listens."""
        return self._replica.url

    async def __del__(self) -> None:
        """Called by Serve when it stops the replica."""
        replica = getattr(self, "_replica", None)
        if replica is not None:
            await asyncio.to_thread(self._stop, SERVE_GRACE_S)
            if deaf := getattr(self, "_deaf", None):
                await asyncio.to_thread(deaf)
            self._logs.close()

    def _stop(self, grace: float) -> None:
        self._replica.stop(grace, linger=self._linger)


def deploy(
    config: FleetConfig,
    *,
    model_path: Path,
    store_url: str,
    folder: Path,
    deadline: float = 120.0,
    given_up: threading.Event | None = None,
    resources: Mapping[str, float] | None = None,
    wait: bool = True,
) -> None:
    """Run `config.gateway.replicas` gateways on the Ray cluster that this process is connected to.

    Returns when all of them listen; they are then in the store under `gateways/`. Called again it brings the running
    ones to the new configuration; where only their number is another, those that run are left alone. Set `given_up`
    from another thread to have it return early; without `wait` it does so at once (see `state`). `resources`: what the
    node of a replica must offer, and the replica takes; None = it has the address `gateway.host`.

    Raises RuntimeError (Serve's), with a replica's own words, when they do not start.
    """
    serve.start(proxy_location=ProxyLocation.Disabled)
    gateway = serve.deployment(
        name="gateway",
        num_replicas=config.gateway.replicas,
        ray_actor_options={
            "num_cpus": 0,
            "resources": _place(config.gateway.host) if resources is None else dict(resources),
        },
        health_check_period_s=2.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=SERVE_PATIENCE_S,
        max_constructor_retry_count=3,
    )(_Gateway)
    # Serve would draw a new one at each call, and restart every replica for it. Its option for that is gone.
    gateway._version = _version(config, model_path, store_url)
    bound = gateway.bind(config.model_dump_json(), str(model_path), store_url, str(folder))
    target = serve.RunTarget(bound, name=_application(config), route_prefix=None)
    # Our own wait has a deadline, Serve's has none.
    serve.run_many([target], wait_for_applications_running=False)
    if wait:
        _wait_until_running(config, deadline, given_up or threading.Event())


def _application(config: FleetConfig) -> str:
    """Its name in Serve, of which a cluster has one for all."""
    if config.ray.address is None:
        return _APPLICATION
    return f"{_APPLICATION}-{config.ray.namespace or config.name}"


def state(config: FleetConfig) -> tuple[str, str]:
    """What Serve says of the gateways (`RUNNING`, `DEPLOYING`, `DEPLOY_FAILED`, …), and why. Raises RayError."""
    application = serve.status().applications.get(_application(config))
    if application is None:
        return "NOT_STARTED", ""
    # The application's message only names the deployment that failed; why it did is in the deployment's own.
    why = " ".join(one.message for one in application.deployments.values() if one.message)
    return application.status.value, why or application.message


def _version(config: FleetConfig, model_path: Path, store_url: str) -> str:
    """Tells replicas apart that are not configured alike. How many there are is nothing that they need to know, nor
    how many groups."""
    pools = {"groups", "nodes", "gpus_per_node", "autoscaling"}
    told = config.model_dump_json(
        exclude={"gateway": {"replicas"}, "prefill": pools, "decode": pools, "planning": True, "ray": True}
    )
    return hashlib.sha256("\0".join((told, str(model_path), store_url)).encode()).hexdigest()[:16]


def _wait_until_running(config: FleetConfig, deadline: float, given_up: threading.Event) -> None:
    end = time.monotonic() + deadline
    while not given_up.wait(_LOOK_S):
        status, why = state(config)
        if status == "RUNNING":
            return
        if status == "DEPLOY_FAILED" or time.monotonic() > end:
            raise RuntimeError(f"the gateway did not start ({status}): {why}")


def _place(host: str) -> dict[str, float]:
    """The Ray resource of the node that has the address `host`; none where any node will do.

    Serve spreads replicas over all nodes, and only one of them can listen on a given address. Ray gives every node the
    resource `node:<its address>`.
    """
    try:
        address = ipaddress.ip_address(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise RuntimeError(f"the gateway cannot listen on {host}: {error}; choose another gateway.host") from error
    if address.is_unspecified:
        return {}
    nodes: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]
    names = {f"node:{node['NodeManagerAddress']}" for node in nodes}
    if f"node:{address}" in names:
        return {f"node:{address}": 0.001}
    if not address.is_loopback:
        # An address that Ray does not go by (a second network): the replica says so if its node lacks it.
        return {}
    # Loopback is meant as seen from here: the node that this process is on.
    here = ray.get_runtime_context().get_node_id()
    return {f"node:{node['NodeManagerAddress']}": 0.001 for node in nodes if node["NodeID"] == here}


def remove(config: FleetConfig) -> None:
    """Stop the gateways, which drain first; and Serve itself, unless the cluster is somebody else's."""
    if config.ray.address is None:
        serve.shutdown()
        return
    try:
        serve.delete(_application(config))
    except RayServeException as error:  # it has never been started, or has gone
        log.warning("there is nothing to take out of Ray Serve: %s", error)
    except TimeoutError as error:
        log.warning("Ray Serve has not ended the gateways yet: %s", error)
