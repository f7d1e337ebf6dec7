"""What Python's objects take, for those that keep within a number of bytes. True of CPython 3.11 to 3.13. Pure."""

from __future__ import annotations

NODE_BYTES = 32
"""Of an OrderedDict, per entry, beside its table; `sys.getsizeof` of the whole counts it."""
SLOT_BYTES = 28
"""Of an OrderedDict's table, per slot: an index, two thirds of an entry, a link."""
MOST_SLOTS = 6
"""A dict has at most so many slots per entry that it had when it last grew."""


def allocated(size: int) -> int:
    """What the allocator takes for an object of `size` bytes."""
    return (size + 15) & ~15


def int_bytes(value: int) -> int:
    """What a whole number takes."""
    return allocated(24 + (value.bit_length() + 29) // 30 * 4)


def table_bytes(slots: int, *, ordered: bool) -> int:
    """What a dict with so many slots takes, without its keys and values."""
    index = 1 if slots <= 2**8 else 2 if slots <= 2**16 else 4
    return slots * index + slots * 2 // 3 * 24 + (slots * 8 if ordered else 0)


def most_entries(budget: int, entry: int) -> tuple[int, int]:
    """How many entries of `entry` bytes fit in `budget`, with an OrderedDict and a dict of them; and what the two take.

    A dict that is full grows to the power of two above three times its entries, so one that never has more than a
    third of a power of two never grows beyond it. To keep to that is what makes a bound hold in every moment.
    """
    best, slots = (1, 0), 8
    while (tables := table_bytes(slots, ordered=True) + table_bytes(slots, ordered=False)) < budget:
        best = max(best, (min(slots // 3, (budget - tables) // entry), tables))
        slots *= 2
    return best
