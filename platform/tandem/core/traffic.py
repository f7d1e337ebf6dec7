"""What a fleet's gateways see of its traffic: their reports, and what follows from them for a stretch of time.

A report holds counters that only rise while the replica lives, so nothing is lost when one is missed, and a rate over
any window is the difference of two reports. A replica that starts again has another incarnation, and counts from zero.
Times of replicas and of whoever reads their reports are never compared: clocks differ.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from math import sqrt

import msgspec

from tandem.core.answer_times import kept, rises
from tandem.core.types import Role

_STEPS = (1, 1.12, 1.28, 1.4, 1.6, 1.8, 2, 2.25, 2.5, 2.8, 3.2, 3.6, 4, 4.5, 5, 5.6, 6.4, 7.2, 8, 9)
BOUNDS: tuple[float, ...] = (
    *(round(step * 10.0**decade, 8) for decade in range(-3, 2) for step in _STEPS),
    *(100.0, 112.0, 128.0, 140.0, 160.0),
)
"""Upper bounds of the buckets of every histogram here, in seconds; one more bucket holds what is above. Neighbours
differ by 14 % at most, so a bucket's middle is within 7 % of whatever fell into it. Aims that people choose (0.05, 2.5)
are bounds: whether they are kept is exact."""

TRAFFIC = "traffic/"
"""Prefix of the reports in the store."""
FRESH_S = 5.0
"""A replica whose report has not changed for so long tells nothing of now."""


class TrafficReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one gateway replica has counted since it started, and holds now. The store has it under `traffic/<replica>`
    with an expiry that the replica renews."""

    replica: str
    incarnation: str
    """Drawn when the replica started: what another one counted is no part of these."""
    started: float = 0.0
    """When it started, in Unix seconds by its own clock."""
    at: float = 0.0
    """When it was written, by the same clock."""
    arrived: int = 0
    """Requests that came, whatever became of them."""
    admitted: int = 0
    """Requests that were let through to the engines."""
    refused_busy: int = 0
    """Requests refused because too much waited: more groups would have taken them."""
    refused_limit: int = 0
    """Requests refused by their tenants' own limits."""
    refused_other: int = 0
    """Requests refused because something was wrong with them or their key."""
    no_capacity: int = 0
    """Requests that failed because a role had no group, and none came up in time."""
    finished: int = 0
    """Requests that were answered to the end."""
    failed: int = 0
    """Requests that ended with an error of the fleet; those of `no_capacity` too."""
    client_gone: int = 0
    """Requests whose client left first."""
    input_tokens: int = 0
    """Tokens of prompts that were sent to the engines, counted when they were."""
    cached_tokens: int = 0
    """Of those, tokens that the prefix cache held, counted when the request is over."""
    output_tokens: int = 0
    """Tokens of answers, counted as they come."""
    ttft: tuple[int, ...] = ()
    """Requests by the time from their arrival to the first token; a count for each bucket of `BOUNDS`."""
    itl: tuple[int, ...] = ()
    """Tokens by the time since the one before; those that came together share it."""
    queue_length: int = 0
    """Requests that wait for admission now."""
    queue_oldest_s: float = 0.0
    """Seconds that the one of them has waited that waits longest."""
    running: int = 0
    """Requests that are admitted and not over."""
    waiting_prefill: int = 0
    """Of those, requests that wait for a prefill group to come up."""
    waiting_decode: int = 0
    """Of those, requests that wait for a decode group to come up."""
    answers: tuple[int, ...] = ()
    """Answers that were given, by both of their times together (`AnswerTimes.told`), counted when they are over. An
    answer whose client left before its end is one of them, and one that failed is not. Empty = the replica does not
    count them."""


_COUNTERS = (
    "arrived",
    "admitted",
    "refused_busy",
    "refused_limit",
    "refused_other",
    "no_capacity",
    "finished",
    "failed",
    "client_gone",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
)
_GAUGES = ("queue_length", "running", "waiting_prefill", "waiting_decode")


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """What all replicas together saw in a window, and hold now. Counts as in `TrafficReport`, of the window alone."""

    seconds: float
    """Length of the window."""
    replicas: int = 0
    """Replicas that tell of now; the gauges are theirs."""
    arrived: int = 0
    admitted: int = 0
    refused_busy: int = 0
    refused_limit: int = 0
    refused_other: int = 0
    no_capacity: int = 0
    finished: int = 0
    failed: int = 0
    client_gone: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    ttft: tuple[int, ...] = ()
    itl: tuple[int, ...] = ()
    queue_length: int = 0
    queue_oldest_s: float = 0.0
    running: int = 0
    waiting_prefill: int = 0
    waiting_decode: int = 0
    answers: dict[int, int] | None = None
    """Answers by the cells of both of their times; None = some replica does not count them."""

    @classmethod
    def between(
        cls,
        older: Mapping[str, TrafficReport],
        newer: Mapping[str, TrafficReport],
        *,
        seconds: float,
        now: Iterable[TrafficReport] | None = None,
    ) -> Traffic:
        """What was added from the older reports to the newer ones, both by incarnation, in so many seconds.

        An incarnation that is only in `newer` has begun in between, and counts whole; of one that is only in `older`
        nothing is known. `now`: whose gauges are of now, None = all of the newer ones.
        """
        added = [(older.get(name), report) for name, report in newer.items()]
        present = list(newer.values() if now is None else now)
        counts = {name: sum(_rise(name, base, report) for base, report in added) for name in _COUNTERS}
        gauges = {name: sum(getattr(report, name) for report in present) for name in _GAUGES}
        return cls(
            seconds=seconds,
            replicas=len(present),
            ttft=_rises("ttft", added),
            itl=_rises("itl", added),
            queue_oldest_s=max((report.queue_oldest_s for report in present), default=0.0),
            answers=rises((() if base is None else base.answers, report.answers) for base, report in added),
            **counts,
            **gauges,
        )

    @property
    def arrival_rate(self) -> float:
        """Requests per second that came to be answered: not those that their tenants' limits or errors of their own
        kept out."""
        return self.per_second(max(0, self.arrived - self.refused_limit - self.refused_other))

    @property
    def input_rate(self) -> float:
        """Prompt tokens per second, cached ones too."""
        return self.per_second(self.input_tokens)

    @property
    def uncached_rate(self) -> float:
        """Prompt tokens per second that prefill had to compute. (Which were cached is known at a request's end.)"""
        return self.per_second(max(0, self.input_tokens - self.cached_tokens))

    @property
    def output_rate(self) -> float:
        """Tokens of answers per second."""
        return self.per_second(self.output_tokens)

    @property
    def idle(self) -> bool:
        """Whether nothing came and nothing is there."""
        return not (self.arrived or self.output_tokens or self.queue_length or self.running)

    def per_second(self, count: float) -> float:
        """A count of the window as a rate."""
        return count / self.seconds if self.seconds > 0 else 0.0

    def waiting(self, role: Role) -> int:
        """Requests that wait for a group of the role to come up."""
        return self.waiting_prefill if role is Role.PREFILL else self.waiting_decode

    def ttft_s(self, share: float) -> float | None:
        """Time to first token that this share of requests kept, in seconds; None = there were none."""
        return percentile(self.ttft, share)

    def itl_s(self, share: float) -> float | None:
        """Time between tokens that this share of tokens kept, in seconds; None = there were none."""
        return percentile(self.itl, share)

    def ttft_within(self, aim_s: float) -> float | None:
        """Share of requests whose first token came within `aim_s`; None = there were none."""
        return share_within(self.ttft, aim_s)

    def itl_within(self, aim_s: float) -> float | None:
        """Share of tokens that came within `aim_s` of the one before; None = there were none."""
        return share_within(self.itl, aim_s)

    def attainment(self, ttft_aim_s: float, itl_aim_s: float) -> float | None:
        """Share of requests that kept both aims: the first token came in time, and the mean time between tokens was
        within the other. Requests that failed, or were refused because too much waited, kept none; those whose client
        left before the first token do not count. None = there were none, or some replica does not tell."""
        if self.answers is None:
            return None
        asked = sum(self.answers.values()) + self.failed + self.refused_busy
        return kept(self.answers, ttft_aim_s, itl_aim_s) / asked if asked else None


class _Run:
    """One incarnation's reports: when each was first seen, by the reader's clock, in order."""

    __slots__ = ("reports", "seen")

    def __init__(self, now: float, report: TrafficReport) -> None:
        self.seen = [now]
        self.reports = [report]

    def add(self, now: float, report: TrafficReport) -> None:
        if report.at > self.reports[-1].at:
            self.seen.append(now)
            self.reports.append(report)

    def forget(self, before: float) -> None:
        """Keep one report from before that time: windows begin there."""
        drop = bisect_left(self.seen, before) - 1
        if drop > 0:
            del self.seen[:drop], self.reports[:drop]

    def base(self, begin: float) -> TrafficReport | None:
        """The last report of before the window, else the first one there is; None = it started in the window."""
        at = bisect_left(self.seen, begin)
        if at < len(self.seen) and self.seen[at] == begin:
            return self.reports[at]
        if at > 0:
            return self.reports[at - 1]
        first = self.reports[0]
        age = first.at - first.started
        return None if age <= self.seen[0] - begin + _LATE_S else first


_LATE_S = 2.0
"""A report may be read so long after it was written."""


class TrafficHistory:
    """The reports of the last minutes. One reader's: `add` what the store has at each look, then ask for windows."""

    def __init__(self, keep_s: float) -> None:
        """`keep_s`: the longest window that will be asked for, in seconds."""
        self._keep_s = keep_s
        self._runs: dict[str, _Run] = {}
        self._began: float | None = None
        self._looked = 0.0

    def keep(self, keep_s: float) -> None:
        """From now on longer or shorter windows will be asked for."""
        self._keep_s = keep_s

    def add(self, reports: Iterable[TrafficReport], now: float) -> None:
        """The reports that are there at time `now` (seconds, never going back)."""
        if self._began is None or now - self._looked > self._keep_s:
            self._began = now
            self._runs.clear()
        self._looked = now
        for report in reports:
            run = self._runs.get(report.incarnation)
            if run is None:
                self._runs[report.incarnation] = _Run(now, report)
            else:
                run.add(now, report)
        for name, run in list(self._runs.items()):
            run.forget(now - self._keep_s)
            if run.seen[-1] < now - self._keep_s - FRESH_S:
                del self._runs[name]

    def window(self, length_s: float, now: float) -> Traffic | None:
        """The last `length_s` seconds. None while less than half of that was watched, or no replica tells of now."""
        if self._began is None or now - self._began < length_s / 2:
            return None
        begin = max(self._began, now - length_s)
        fresh = [run for run in self._runs.values() if now - run.seen[-1] <= FRESH_S]
        if not fresh:
            return None
        older: dict[str, TrafficReport] = {}
        newer: dict[str, TrafficReport] = {}
        spans: list[float] = []
        for name, run in self._runs.items():
            if run.seen[-1] < begin:
                continue
            newer[name] = run.reports[-1]
            if (base := run.base(begin)) is not None:
                older[name] = base
                if run in fresh:
                    # By its own clock: when we read it is not when it was written.
                    spans.append(newer[name].at - base.at)
        seconds = max(spans, default=0.0) or now - begin
        return Traffic.between(older, newer, seconds=seconds, now=[run.reports[-1] for run in fresh])


def percentile(counts: Sequence[int], share: float) -> float | None:
    """The time, in seconds, that `share` (0 to 1) of what was counted kept, within 7 %; None = nothing was counted."""
    if len(counts) != len(BOUNDS) + 1 or not any(counts):
        return None
    totals = list(accumulate(counts))
    at = bisect_left(totals, max(1.0, share * totals[-1] - 1e-9))
    if at == 0 or at >= len(BOUNDS):
        return BOUNDS[0] if at == 0 else BOUNDS[-1]
    return sqrt(BOUNDS[at - 1] * BOUNDS[at])


def share_within(counts: Sequence[int], aim_s: float) -> float | None:
    """The share of what was counted that took at most `aim_s` seconds; None = nothing was counted."""
    if len(counts) != len(BOUNDS) + 1 or not any(counts):
        return None
    at = bisect_left(BOUNDS, aim_s)
    if at == len(BOUNDS):
        return sum(counts[:at]) / sum(counts)
    low = BOUNDS[at - 1] if at else 0.0
    inside = (aim_s - low) / (BOUNDS[at] - low)
    return (sum(counts[:at]) + inside * counts[at]) / sum(counts)


def _rise(name: str, base: TrafficReport | None, report: TrafficReport) -> int:
    before: int = getattr(base, name) if base is not None else 0
    after: int = getattr(report, name)
    return max(0, after - before)


def _rises(name: str, added: Sequence[tuple[TrafficReport | None, TrafficReport]]) -> tuple[int, ...]:
    """Sum of the histograms' rises; one with other buckets is of another version of Tandem, and left out."""
    size = len(BOUNDS) + 1
    total = [0] * size
    for base, report in added:
        after: tuple[int, ...] = getattr(report, name)
        before: tuple[int, ...] = getattr(base, name) if base is not None else ()
        if len(after) != size:
            continue
        for at, count in enumerate(after):
            total[at] += max(0, count - (before[at] if len(before) == size else 0))
    return tuple(total)
