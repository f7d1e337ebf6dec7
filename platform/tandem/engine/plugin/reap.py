"""An abort reaches what it is meant for: it may be repeated, and one call ends all requests of a gateway that died.

A request goes straight to the process of its DP rank, an abort by way of rank 0. So on any other rank the abort may be
there first (anywhere, when it comes before its request was sent on): nobody knows the request yet, and the abort is
forgotten. SGLang sends one abort for each request and drops all further ones: such a request would wait for its KV
until a time-out. And SGLang's abort of an id that it does not know does nothing, so a prefix (`POST /abort_request
{"rid": "<incarnation>-*"}`) never reaches the schedulers by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

LEAST = 8
"""Characters before the star. A shorter prefix could be a mistake, and end everybody's requests."""

_log = logging.getLogger(__name__)


def abort(original: Callable[..., None], self: Any, rid: str = "", abort_all: bool = False) -> None:
    """Around `TokenizerManager.abort_request`: each call is sent on, and a `rid` that ends with `*` means every request
    that begins so."""
    if abort_all or not rid.endswith("*"):
        if not abort_all and rid in self.rid_to_state:
            self.rid_to_state[rid].abort_sent = False
        original(self, rid=rid, abort_all=abort_all)
        return
    prefix = rid[:-1]
    if len(prefix) < LEAST:
        _log.warning("tandem: not aborting requests by a prefix of %d characters: %d is the least", len(prefix), LEAST)
        return
    ours = [one for one in self.rid_to_state if one.startswith(prefix)]
    for one in ours:
        self.rid_to_state[one].abort_sent = False
        original(self, rid=one)
    if ours:
        _log.info("tandem: aborted %d requests that begin with %s", len(ours), prefix)
