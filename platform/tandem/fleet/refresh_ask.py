"""What is asked of a fleet when it is to have other weights."""

from __future__ import annotations

import msgspec


class RefreshAsk(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of `RefreshWeightsRequest`."""

    path: str
    """Folder of the new checkpoint, the same on every node."""
    version: str
    canary: str = ""
    """Prompt that each group must answer before it serves again; empty = Tandem's own."""
    expect: str = ""
    """What the greedy answer must begin with; empty = any."""
    rollback: bool = True
    allow_pause: bool = False
    drain_s: float | None = None
    """Seconds that a group may take to be empty; None = the fleet's own limit."""
