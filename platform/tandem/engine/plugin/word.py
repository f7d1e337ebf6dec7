"""Prefill says how a request went before it begins the next batch.

A prefill scheduler asks once in a turn which transfers are over, right after it has begun those of the batch that it
has just computed (SGLang 0.5.23, `disaggregation/prefill.py`). They take a few milliseconds, so mostly none is, and the
requests are answered only when the next batch is computed, seconds later with long prompts. Decode has begun meanwhile,
and the gateway keeps its first tokens back until it has prefill's word that the KV is good.
"""

from __future__ import annotations

import time
from typing import Any

WAIT_S = 0.01
"""For the transfers that have begun in this turn, each rank for its own."""
_LOOK_S = 0.001

_UNDER_WAY = frozenset({2, 3})
"""`KVPoll.WaitingForInput` and `KVPoll.Transferring`."""
_WAITED = "_tandem_waited"
"""Attribute of a request that was waited for: those whose decode does not answer hold nobody up twice."""


def wait(self: Any, *args: Any, **kwargs: Any) -> None:
    """Before `Scheduler.process_disagg_prefill_inflight_queue`."""
    new = [one for one in self.disagg_prefill_inflight_queue if not (one.pending_bootstrap or hasattr(one, _WAITED))]
    for one in new:
        setattr(one, _WAITED, True)
    ends = time.monotonic() + WAIT_S
    while any(one.disagg_kv_sender.poll() in _UNDER_WAY for one in new) and time.monotonic() < ends:
        time.sleep(_LOOK_S)
