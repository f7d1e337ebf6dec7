"""An ApiError as gRPC says it: a status code, one sentence, and trailing metadata with the details. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from urllib.parse import quote

import grpc
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from tandem.gateway.errors import ApiError

Metadata = tuple[tuple[str, str | bytes], ...]

DOMAIN = "tandem.dev"
"""`domain` of the ErrorInfo: whose reasons they are."""
_CODES: Mapping[int, grpc.StatusCode] = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    402: grpc.StatusCode.RESOURCE_EXHAUSTED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    408: grpc.StatusCode.DEADLINE_EXCEEDED,
    409: grpc.StatusCode.ABORTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}
_LONGEST_SENTENCE = 1500
"""Bytes. A client refuses trailing metadata of more than 8 KiB, and the sentence is in it twice."""
_NOT_A_REASON = re.compile(r"[^A-Z0-9_]+")


def status_code(status: int) -> grpc.StatusCode:
    """The gRPC code of an HTTP status that is an error."""
    if status in _CODES:
        return _CODES[status]
    return grpc.StatusCode.INTERNAL if status >= 500 else grpc.StatusCode.INVALID_ARGUMENT


def sentence(error: ApiError) -> str:
    """What a call's status says: the message, cut to what trailing metadata can hold."""
    text = error.message
    while (size := len(quote(text))) > _LONGEST_SENTENCE:
        text = text[: min(len(text) - 1, len(text) * _LONGEST_SENTENCE // size)]
    return text if text == error.message else text + " …"


def trailing_metadata(error: ApiError) -> Metadata:
    """`grpc-status-details-bin`, and how long to wait where a later try can succeed."""
    status = status_pb2.Status(code=status_code(error.status).value[0], message=sentence(error))
    info = error_details_pb2.ErrorInfo(
        reason=_NOT_A_REASON.sub("_", (error.code or error.type).upper())[:63],
        domain=DOMAIN,
        metadata={"type": error.type, "http_status": str(error.status)},
    )
    if error.param:
        info.metadata["param"] = error.param[:200]
    status.details.add().Pack(info)
    found: list[tuple[str, str | bytes]] = []
    if error.retry_after:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(math.ceil(error.retry_after * 1000))
        status.details.add().Pack(retry)
        found += [(name.decode(), value.decode()) for name, value in error.headers()]
        if error.status == 503:
            # gRPC's own retries wait so long.
            found.append(("grpc-retry-pushback-ms", str(math.ceil(error.retry_after * 1000))))
    found.append(("grpc-status-details-bin", status.SerializeToString()))
    return tuple(found)
