"""Rooms: the numbers by which SGLang's prefill and decode know one transfer of KV (`bootstrap_room`)."""

from __future__ import annotations

ROOM_LIMIT = 2**63


def room_number(bits: int, *, dp_size: int, dp_rank: int) -> int:
    """A room from random bits, such that `room % dp_size == dp_rank`, between 1 and 2**63 - 1.

    A prefill server with DP attention and `--load-balance-method auto` takes a request on rank `room % dp_size`
    (SGLang 0.5.23, `data_parallel_controller.follow_bootstrap_room_scheduler`), and decode looks for the KV there.
    """
    size = max(1, dp_size)
    if not 0 <= dp_rank < size:
        raise ValueError(f"DP rank {dp_rank} is not in 0 … {size - 1}")
    # Multiples of `size` below the limit, 0 left out (room 0 is SGLang's own health check).
    multiple = 1 + bits % (ROOM_LIMIT // size - 1)
    room = multiple * size + dp_rank
    return room if room < ROOM_LIMIT else room - size
