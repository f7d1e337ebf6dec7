"""Several ranks of a group on one host.

Every rank of SGLang 0.5.23 checks that the ports derived from the leader's `dist_init` are free, on its own host. Where
that is the leader's host too, a follower that starts a second later finds them taken, by its leader, and gives up after
30 s (`server_args.py`, `PortArgs.init_new`). A follower listens on none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

_follows: ContextVar[bool] = ContextVar("follows", default=False)


def choose_ports(original: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `PortArgs.init_new`."""
    before = _follows.set(server_args.node_rank > 0)
    try:
        return original(server_args, *args, **kwargs)
    finally:
        _follows.reset(before)


def wait_for_port(original: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
    """Around `wait_port_available`."""
    return True if _follows.get() else original(*args, **kwargs)
