"""What an engine process counts about itself.

The scheduler processes write, the rank actor reads: prometheus_client's multi-process mode keeps each counter in a
memory-mapped file under `PROMETHEUS_MULTIPROC_DIR`, which outlives the writer and needs no call into it.
"""

from __future__ import annotations

from functools import cache

from prometheus_client import CollectorRegistry, Counter

_registry = CollectorRegistry()

A2A_ROWS = Counter(
    "tandem_engine_a2a_rows_sent",
    "Hidden-state rows sent to other expert-parallel ranks by dispatch.",
    ["rank", "layer"],
    registry=_registry,
)
A2A_ROWS_LOCAL = Counter(
    "tandem_engine_a2a_rows_kept",
    "Hidden-state rows whose experts are on the rank that owns them.",
    ["rank", "layer"],
    registry=_registry,
)
A2A_BYTES = Counter(
    "tandem_engine_a2a_bytes_sent",
    "Bytes handed to the network for other ranks, dispatch and combine, padding included.",
    ["rank", "layer"],
    registry=_registry,
)
KV_BYTES = Counter(
    "tandem_engine_kv_bytes_sent",
    "KV cache bytes written to decode ranks by completed NIXL transfers.",
    registry=_registry,
)
KV_TRANSFERS = Counter(
    "tandem_engine_kv_transfers",
    "NIXL transfers of KV cache that completed.",
    registry=_registry,
)
BATCHES = Counter("tandem_engine_batches", "Forward passes by mode.", ["mode"], registry=_registry)
BATCH_TOKENS = Counter(
    "tandem_engine_batch_tokens", "Tokens computed in forward passes by mode.", ["mode"], registry=_registry
)


class A2ACounters:
    """The three counters of one MoE layer, looked up once."""

    def __init__(self, rank: int, layer: int) -> None:
        self._rows = A2A_ROWS.labels(rank, layer)
        self._kept = A2A_ROWS_LOCAL.labels(rank, layer)
        self._bytes = A2A_BYTES.labels(rank, layer)

    def dispatched(self, *, sent: int, kept: int, size: int) -> None:
        """Count one dispatch: rows sent to other ranks, rows kept, bytes for other ranks."""
        self._rows.inc(sent)
        self._kept.inc(kept)
        self._bytes.inc(size)

    def combined(self, *, size: int) -> None:
        """Count the bytes of one combine."""
        self._bytes.inc(size)


@cache
def batch_counters(mode: str) -> tuple[Counter, Counter]:
    """Counters of forward passes and their tokens in `mode` (extend, decode, idle, …)."""
    return BATCHES.labels(mode), BATCH_TOKENS.labels(mode)
