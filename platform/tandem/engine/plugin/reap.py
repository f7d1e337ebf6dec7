"""One call ends all requests of a gateway that died: `POST /abort_request {"rid": "<incarnation>-*"}`.

SGLang's own abort of an id that it does not know does nothing, so a prefix never reaches the schedulers by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

LEAST = 8
"""Characters before the star. A shorter prefix could be a mistake, and end everybody's requests."""

_log = logging.getLogger(__name__)


def abort_by_prefix(original: Callable[..., None], self: Any, rid: str = "", abort_all: bool = False) -> None:
    """Around `TokenizerManager.abort_request`: a `rid` that ends with `*` means every request that begins so."""
    if abort_all or not rid.endswith("*"):
        original(self, rid=rid, abort_all=abort_all)
        return
    prefix = rid[:-1]
    if len(prefix) < LEAST:
        _log.warning("tandem: not aborting requests by a prefix of %d characters: %d is the least", len(prefix), LEAST)
        return
    ours = [one for one in self.rid_to_state if one.startswith(prefix)]
    for one in ours:
        # SGLang tells the schedulers once, and an abort that overtakes its request is lost: this one may be repeated.
        self.rid_to_state[one].abort_sent = False
        original(self, rid=one)
    if ours:
        _log.info("tandem: aborted %d requests that begin with %s", len(ours), prefix)
