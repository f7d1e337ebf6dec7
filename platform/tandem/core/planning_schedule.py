"""The least that a schedule asks for at a moment, in UTC. Reckoned from Unix time: `core` has no calendar."""

from __future__ import annotations

from collections.abc import Iterable

from tandem.core.planning_types import ScheduleWindow

_DAY_MIN = 24 * 60
_EPOCH_DAY = 3
"""1 January 1970 was a Thursday."""


def is_open(window: ScheduleWindow, now: float) -> bool:
    """Whether `now` (Unix seconds) lies in the window. Its end is not in it."""
    minutes = int(now // 60)
    day, minute = (minutes // _DAY_MIN + _EPOCH_DAY) % 7, minutes % _DAY_MIN
    if window.begin_min < window.end_min:
        return day in window.days and window.begin_min <= minute < window.end_min
    yesterday = (day - 1) % 7
    began_today = day in window.days and minute >= window.begin_min
    return began_today or (yesterday in window.days and minute < window.end_min)


def least_groups(windows: Iterable[ScheduleWindow], now: float) -> int:
    """The most that an open window asks for; 0 = none is open."""
    return max((window.min_groups for window in windows if is_open(window, now)), default=0)
