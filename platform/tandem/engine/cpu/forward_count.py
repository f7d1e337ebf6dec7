"""Counts forward passes by mode, which shows from outside that a decode rank computes no prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tandem.engine.cpu.counters import batch_counters


def count_batch(original: Callable[..., Any], self: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """Around `Scheduler.run_batch`."""
    mode = batch.forward_mode
    batches, tokens = batch_counters(mode.name.lower())
    batches.inc()
    tokens.inc(batch.extend_num_tokens or 0 if mode.is_extend() else len(batch.reqs or ()))
    return original(self, batch, *args, **kwargs)
