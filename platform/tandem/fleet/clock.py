"""The clock of this process: Unix seconds that neither jump nor go back.

It is the wall clock of when the process started, and goes on by the monotonic clock. The wall clock itself may be set
by an hour at any time (NTP, an operator): deadlines by it would all pass at once, or stand still. So whatever a
controller decides, it decides by this one, and its records have these times.

After a jump these are off from the wall clock, by as much as it jumped, until the process starts again. It also stands
still while the machine is suspended, as the engines do.
"""

from __future__ import annotations

import time

_BEGAN = time.time() - time.monotonic()


def now() -> float:
    """Unix seconds, by the wall clock of when this process started."""
    return _BEGAN + time.monotonic()
