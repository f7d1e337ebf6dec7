"""Who calls over gRPC, said as the HTTP front says it: headers, certificate, request id."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping
from typing import Any

import grpc
import msgspec

from tandem.gateway.access.tls import grpc_certificate

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """Who calls, as far as the call itself tells."""

    headers: Mapping[bytes, bytes]
    """The call's metadata, names in small letters: `authorization`, `x-api-key`, `traceparent` …"""
    certificate: Mapping[str, Any] | None
    """The client's TLS certificate, its names as in `ssl.SSLSocket.getpeercert`; None without one."""
    request_id: str
    """Its `x-request-id`, or a new one."""


def peer_of(context: grpc.aio.ServicerContext[Any, Any]) -> Peer:
    """Whoever made the call that `context` is of."""
    headers: dict[bytes, bytes] = {}
    for key, value in context.invocation_metadata() or ():
        name, raw = key.encode(), value if isinstance(value, bytes) else value.encode()
        if _CONTROL.search(raw):
            # gRPC lets it through; as a header of HTTP/1.1 it would begin another line, or another request.
            continue
        # What comes twice is one with a comma, as RFC 9110 has it.
        headers[name] = headers[name] + b", " + raw if name in headers else raw
    asked = headers.get(b"x-request-id", b"")
    return Peer(
        headers=headers,
        certificate=grpc_certificate(context.auth_context()),  # type: ignore[arg-type]  # its stubs say less
        request_id=asked.decode() if _REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex,
    )
