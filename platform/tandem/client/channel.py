"""How the client connects: encryption, keep-alive, and which failures it tries again."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import msgspec

SERVICE = "tandem.v1.Inference"
MOST_ATTEMPTS = 5
"""gRPC makes no more than these."""
_LARGEST_ANSWER = 64 * 2**20


class Tls(msgspec.Struct, frozen=True, kw_only=True):
    """Encryption. Without any field: the server's certificate must be known to this machine's usual CAs."""

    ca: Path | str | None = None
    """PEM file of the CAs that the server's certificate must come from; None = the usual ones."""
    certificate: Path | str | None = None
    """PEM file of our own certificate, where the server asks for one (mTLS)."""
    key: Path | str | None = None
    """PEM file of our certificate's private key."""

    def credentials(self) -> grpc.ChannelCredentials:
        """What gRPC takes. Raises OSError if a file cannot be read."""
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.certificate))


def credentials(tls: bool | Tls | grpc.ChannelCredentials) -> grpc.ChannelCredentials | None:
    """What gRPC takes; None = not encrypted. Raises OSError if a file cannot be read."""
    if isinstance(tls, bool):
        return Tls().credentials() if tls else None
    return tls.credentials() if isinstance(tls, Tls) else tls


def options(attempts: int) -> list[tuple[str, str | int]]:
    """Options of a channel that makes up to `attempts` attempts for each call. Raises ValueError."""
    if not 1 <= attempts <= MOST_ATTEMPTS:
        raise ValueError(f"attempts is {attempts}; it must be from 1 to {MOST_ATTEMPTS}.")
    found: list[tuple[str, str | int]] = [
        # A server that is gone without a word is found out within half a minute, also while a prompt is long.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.max_receive_message_length", _LARGEST_ANSWER),
        ("grpc.max_send_message_length", -1),
        ("grpc.enable_retries", int(attempts > 1)),
        # A long prompt must be kept to be sent again.
        ("grpc.per_rpc_retry_buffer_size", _LARGEST_ANSWER),
    ]
    if attempts > 1:
        found.append(("grpc.service_config", json.dumps(_service_config(attempts))))
    return found


def metadata(api_key: str | None, request_id: str | None) -> tuple[tuple[str, str], ...]:
    """What each call says beside its request."""
    found = []
    if api_key:
        found.append(("authorization", f"Bearer {api_key}"))
    if request_id:
        found.append(("x-request-id", request_id))
    return tuple(found)


def _service_config(attempts: int) -> dict[str, object]:
    """gRPC tries again only before the first message of an answer, and waits as long as the server asks for."""
    return {
        "methodConfig": [
            {
                "name": [{"service": SERVICE}],
                "retryPolicy": {
                    "maxAttempts": attempts,
                    "initialBackoff": "0.2s",
                    "maxBackoff": "5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
        # While most calls fail, retries stop: they would only add to the load.
        "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.5},
    }


def _read(path: Path | str | None) -> bytes | None:
    return None if path is None else Path(path).read_bytes()
