"""Where a DP rank's engine tells what its KV cache holds."""

from __future__ import annotations

import msgspec


class KvSource(msgspec.Struct, frozen=True, kw_only=True):
    """The KV events of one DP rank, as its own node publishes them (ZeroMQ)."""

    dp_rank: int
    events: str
    """Endpoint of the PUB socket, such as tcp://10.0.0.4:16010."""
    replay: str = ""
    """Endpoint of the ROUTER socket that sends old batches again; empty = none."""
    topic: str = ""
    """First frame of each message; other messages are of another engine that came to have the same port."""
