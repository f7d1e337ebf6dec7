"""The gateway's gRPC server: inference, health and reflection on one port. Runs on the gateway's own event loop."""

from __future__ import annotations

from collections.abc import Callable

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from tandem.gateway.http.server import Limits, connections_allowed
from tandem.gateway.rpc.health import HealthService
from tandem.gateway.rpc.inference import SERVICE, Answers, InferenceService
from tandem.gateway.rpc.robust import robust_server

_OPTIONS = (
    # A client that is gone without a word is found out within half a minute, and its work ended.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # Clients may look for a dead server as often.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    # More calls of one connection wait in the client.
    ("grpc.max_concurrent_streams", 1000),
    ("grpc.max_metadata_size", 16 * 1024),
    # Else the window grows to megabytes for each stream that nobody reads. One that is read grows with its message.
    ("grpc.http2.bdp_probe", 0),
    # As the HTTP server has it; without it a stranger may take two minutes for his first bytes.
    ("grpc.server_handshake_timeout_ms", int(Limits.header_s * 1000)),
    # Whoever calls again then connects again, without noticing.
    ("grpc.max_connection_idle_ms", 600_000),
)
CONNECTIONS = 10_000
"""All together; a further one is closed at once."""


class GrpcServer:
    """`start`, then it listens on `port` until `stop`."""

    def __init__(
        self,
        answers: Answers,
        *,
        shortage: Callable[[], str | None],
        longest_s: float,
        max_request_bytes: int,
    ) -> None:
        """`shortage` says why the fleet cannot answer, None if it can. `longest_s`: seconds a request may take."""
        self.port = 0
        self._service = InferenceService(answers, longest_s=longest_s, max_request_bytes=max_request_bytes)
        self._health = HealthService((SERVICE,), shortage)
        self._max_request_bytes = max_request_bytes
        self._server: grpc.aio.Server | None = None

    async def start(
        self, host: str, port: int, *, credentials: grpc.ServerCredentials | None = None, share_port: bool = False
    ) -> int:
        """Listen; returns the port (`port` 0 = any free one). `credentials` None = no TLS. Raises OSError.

        `share_port`: other replicas on this machine may listen on the same port; the kernel spreads the connections.
        """
        options = (
            *_OPTIONS,
            ("grpc.so_reuseport", int(share_port)),
            ("grpc.max_allowed_incoming_connections", connections_allowed(CONNECTIONS)),
            ("grpc.max_receive_message_length", self._max_request_bytes),
            ("grpc.max_send_message_length", -1),
        )
        server = robust_server(options)
        server.add_registered_method_handlers(SERVICE, self._service.methods())  # type: ignore[attr-defined]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if credentials is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, credentials)
        except RuntimeError:
            await server.stop(None)
            message = (
                f"The gateway cannot serve gRPC on {address}: is the port taken? Choose another gateway.grpc_port."
            )
            raise OSError(message) from None
        await server.start()
        self._server = server
        return self.port

    def health_changed(self) -> None:
        """What `shortage` says may be different: watches of the health service are told at once."""
        self._health.changed()

    async def stop(self, grace: float) -> None:
        """Take no new call, let those that run end for `grace` seconds, cancel the rest. Idempotent."""
        server, self._server = self._server, None
        if server is None:
            return
        self._health.stop()
        await server.stop(grace)
