"""A Python client of Tandem's gRPC API. Needs grpcio, protobuf and msgspec, and nothing else of Tandem.

    from tandem.client import Client

    with Client("127.0.0.1:9001", model="tiny") as client:
        print(client.chat([{"role": "user", "content": "Why is the sky blue?"}]).text)
        for piece in client.generate_stream("Once upon a time", max_tokens=64):
            print(piece.text, end="", flush=True)

`AsyncClient` has the same methods, to be awaited. Every failure is a `TandemError`.
"""

from __future__ import annotations

from tandem.client.aio import AsyncClient, AsyncStream
from tandem.client.channel import Tls
from tandem.client.errors import (
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RateLimited,
    ServerError,
    TandemError,
    Unauthenticated,
    Unavailable,
)
from tandem.client.requests import ChatParams, GenerateParams
from tandem.client.sync import Client, Stream
from tandem.client.types import (
    Answer,
    Choice,
    Logprob,
    Message,
    Piece,
    TokenLogprob,
    ToolCall,
    ToolCallDelta,
    Usage,
)

__all__ = [
    "Answer",
    "AsyncClient",
    "AsyncStream",
    "Cancelled",
    "ChatParams",
    "Choice",
    "Client",
    "DeadlineExceeded",
    "GenerateParams",
    "InvalidRequest",
    "Logprob",
    "Message",
    "NotFound",
    "PermissionDenied",
    "Piece",
    "RateLimited",
    "ServerError",
    "Stream",
    "TandemError",
    "Tls",
    "TokenLogprob",
    "ToolCall",
    "ToolCallDelta",
    "Unauthenticated",
    "Unavailable",
    "Usage",
]
