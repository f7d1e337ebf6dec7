"""What can go wrong, as exceptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]


class TandemError(Exception):
    """A call failed. The message is one sentence that says what to do."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        reason: str = "",
        param: str | None = None,
        retry_after: float | None = None,
        request_id: str = "",
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        """gRPC's name of the status, as `NOT_FOUND`."""
        self.reason = reason
        """What was wrong, in one word, as `MODEL_NOT_FOUND`; may be empty."""
        self.param = param
        """The field that was wrong, by its name in the HTTP API."""
        self.retry_after = retry_after
        """Seconds after which a new try can succeed; None = not known."""
        self.request_id = request_id
        """The request's id in the server's logs and traces; may be empty."""


class InvalidRequest(TandemError):
    """The request can never be right: `param` names the field."""


class Unauthenticated(TandemError):
    """The API key is missing or wrong."""


class PermissionDenied(TandemError):
    """The key may not do this."""


class NotFound(TandemError):
    """The model is not served."""


class RateLimited(TandemError):
    """A limit of the tenant is reached, or too many wait: try again after `retry_after` seconds."""


class DeadlineExceeded(TandemError):
    """The answer was not complete in time."""


class Cancelled(TandemError):
    """The call was given up, or its client was closed."""


class Unavailable(TandemError):
    """No server, or no engine behind it, can answer now. Before the first token the client has tried again already."""


class ServerError(TandemError):
    """Something else is wrong on the server's side."""


_KINDS: Mapping[grpc.StatusCode, type[TandemError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: RateLimited,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
}


def from_rpc_error(error: Any, address: str) -> TandemError:
    """The exception for a call to `address` that ended with a `grpc.RpcError`, of either kind of channel."""
    code: grpc.StatusCode = error.code()
    metadata = dict(error.trailing_metadata() or ())
    info, delay = _details(metadata.get("grpc-status-details-bin", b""))
    seconds = metadata.get("retry-after")
    if delay is None and isinstance(seconds, str) and seconds.isdigit():
        delay = float(seconds)
    kind = _KINDS.get(code, ServerError)
    if kind is RateLimited and not info.reason:
        # Not the gateway's own answer, but gRPC's: the message is larger than the server takes.
        kind = InvalidRequest
    return kind(
        _sentence(code, error.details() or "", address, ours=bool(info.reason)),
        code=code.name,
        reason=info.reason,
        param=info.metadata.get("param"),
        retry_after=delay,
        request_id=str(metadata.get("x-request-id", "")),
    )


def _details(packed: Any) -> tuple[error_details_pb2.ErrorInfo, float | None]:
    info, retry, delay = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), None
    try:
        status = status_pb2.Status.FromString(packed)
        for detail in status.details:
            if detail.Unpack(retry):
                delay = retry.retry_delay.ToMilliseconds() / 1000
            else:
                detail.Unpack(info)
    except DecodeError:
        # From a proxy on the way, not from the gateway: the status itself says enough.
        return error_details_pb2.ErrorInfo(), None
    return info, delay


def _sentence(code: grpc.StatusCode, details: str, address: str, *, ours: bool) -> str:
    """`ours`: the gateway said it, and not gRPC."""
    if code is grpc.StatusCode.UNAVAILABLE:
        return f"{address} is not available: {details.rstrip('.') or 'no reason was given'}."
    if code is grpc.StatusCode.DEADLINE_EXCEEDED and not ours:
        return f"{address} did not complete the answer in time; give the call a longer timeout."
    return details or f"{address} answered {code.name}."
