"""Answers by both of their times together, so that a reader finds how many kept two aims, whatever the aims are.

How many were late at first and how many were slow after that does not tell how many were either: that is counted here,
per answer. The time between tokens of an answer is the mean of its gaps, as benchmarks' goodput counts it (TPOT in
DistServe, vLLM and SGLang): one late token in a thousand is not what a reader of that answer feels. Autoscaling aims at
a percentile of all gaps instead, as it asks how busy the engines are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence

_STEPS = (1, 1.28, 1.6, 2, 2.5, 3.2, 4, 5, 6.4, 8)
EDGES: tuple[float, ...] = (
    *(round(step * 10.0**decade, 8) for decade in range(-3, 2) for step in _STEPS),
    *(100.0, 128.0, 160.0),
)
"""Upper bounds of the buckets of either time, in seconds; one more bucket holds what is above. There are half as many
as in the histograms of one time (`traffic.BOUNDS`), since pairs of them are counted. For an aim that is a bound (2.5,
0.05) the count is exact, for others the bucket that it is in is taken to be filled evenly."""
SIDE = len(EDGES) + 1


class AnswerTimes:
    """What one gateway replica counts. Belongs to one thread."""

    __slots__ = ("_cells",)

    def __init__(self) -> None:
        self._cells: dict[int, int] = {}

    def observe(self, ttft_s: float, gap_s: float) -> None:
        """An answer is over. `gap_s`: the mean time between its tokens; 0 = it had but one, so nothing was late."""
        cell = bisect_left(EDGES, ttft_s) * SIDE + bisect_left(EDGES, gap_s)
        self._cells[cell] = self._cells.get(cell, 0) + 1

    def told(self) -> tuple[int, ...]:
        """As a report has it: `SIDE`, then the number and the count of each cell that is not empty. The number is
        `SIDE` times the bucket of the time to first token, and the bucket of the time between tokens."""
        return (SIDE, *(number for cell in sorted(self._cells.items()) for number in cell))


def rises(added: Iterable[tuple[Sequence[int], Sequence[int]]]) -> dict[int, int] | None:
    """What was added, from the earlier to the later of each two reports; () = there was no earlier one. None = some
    replica does not count, or in other buckets, as one of another version of Tandem: then nobody knows the whole."""
    total: dict[int, int] = {}
    for before, after in added:
        if not after or after[0] != SIDE:
            return None
        known = _cells(before)
        for cell, count in _cells(after).items():
            if (rise := count - known.get(cell, 0)) > 0:
                total[cell] = total.get(cell, 0) + rise
    return total


def kept(cells: Mapping[int, int], ttft_aim_s: float, gap_aim_s: float) -> float:
    """How many answers kept both aims (seconds)."""
    return sum(
        count * _inside(cell // SIDE, ttft_aim_s) * _inside(cell % SIDE, gap_aim_s) for cell, count in cells.items()
    )


def _cells(told: Sequence[int]) -> dict[int, int]:
    return dict(zip(told[1::2], told[2::2], strict=False))


def _inside(bucket: int, aim_s: float) -> float:
    """Which share of a bucket is within the aim."""
    at = bisect_left(EDGES, aim_s)
    if bucket != at or at == len(EDGES):
        return float(bucket < at)
    low = EDGES[at - 1] if at else 0.0
    return (aim_s - low) / (EDGES[at] - low)
