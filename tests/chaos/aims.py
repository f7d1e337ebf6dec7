"""How soon streams are to go on after a fault."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from chaos.measure import Row, percentile


class Aim(msgspec.Struct, frozen=True, kw_only=True):
    """What 99 of 100 streams must not wait longer for. Seconds."""

    kinds: str
    """Of faults whose kind begins so."""
    wait: Literal["next_after", "first"]
    """For the next token, after the notice; or for the first one, after the fault, its prefill included (`Row`)."""
    within: float

    def missed(self, rows: Iterable[Row]) -> str:
        """Empty: it is met, or nothing of the kind happened to any stream."""
        waits = [wait for row in rows if row.kind.startswith(self.kinds) for wait in getattr(row, self.wait)]
        p99 = percentile(waits, 0.99)
        if p99 is None or p99 <= self.within:
            return ""
        what = "next token after the notice" if self.wait == "next_after" else "first token after the fault"
        return f"{self.kinds}: p99 of the {what} is {p99:.2f} s, not {self.within:g} s ({len(waits)} streams)"
