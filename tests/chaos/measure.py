"""How each kind of fault was noticed, how long it took, and what streams saw of it."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec
from rich.table import Table

from chaos.client import Outcome
from chaos.engine_faults import Happening
from tandem.core.usage import UsageRecord

_REASON = 70
_PID = re.compile(r" \d{2,}")
_ON_THE_WAY_S = 0.5
"""Tokens that had been produced before the fault may still come for so long."""


class Row(msgspec.Struct, kw_only=True):
    """One kind of fault. Times in seconds; None = there were none."""

    kind: str
    faults: int
    noticed_p50: float | None
    noticed_max: float | None
    noticed_by: str
    back_p50: float | None
    back_max: float | None
    streams: int
    """That ran when the fault came, or came before it was noticed, or over."""
    moved: int
    """Of these, the ones that took another pair."""
    gap_p50: float | None
    """From the fault to the next token of a stream that was moved (of all that ran, if none was)."""
    gap_p99: float | None
    gap_max: float | None
    retries: int
    """Pairs beyond the first, of these streams."""
    migrations: int
    next_after: list[float]
    """Of streams that were moved and had a token before: how much of their longest wait came after the notice."""
    first_after: list[float]
    """The same of those that waited for their first token."""
    first: list[float]
    """How long these waited in all, from the fault or from their beginning on."""


class Report(msgspec.Struct, kw_only=True):
    """One scenario that was played."""

    scenario: str
    seed: int
    seconds: float
    requests: int
    tokens: int
    faults: list[Happening]
    rows: list[Row]
    moved: dict[str, int]
    """Requests that were given another pair, by recipe."""
    errors: dict[str, int]
    """By code, also those that the scenario allows."""
    wrong: list[str]
    """What did not hold: check and sentence."""


def percentile(values: Sequence[float], share: float) -> float | None:
    """The least value that `share` of all do not exceed."""
    if not values:
        return None
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


class Wait(NamedTuple):
    """What a stream waited for one token. Times are on the monotonic clock."""

    began: float
    """Not before the fault."""
    ended: float
    first: bool
    """It was the first token."""

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    def after(self, noticed: float) -> float:
        """How much of it came after a moment."""
        return max(0.0, self.ended - max(self.began, noticed))


def longest(outcome: Outcome, at: float, seconds: float) -> Wait | None:
    """The longest wait that a stream had within `seconds` of the fault; None if it did not run then."""
    over = at + seconds
    if not (outcome.began <= over and at < outcome.ended):
        return None
    last = over + _ON_THE_WAY_S
    waits = [
        Wait(max(before, at), after, number == 0)
        for number, (before, after) in enumerate(itertools.pairwise([outcome.began, *outcome.times]))
        if after > at and before < last
    ]
    return max(waits, key=lambda wait: wait.seconds, default=None)


def rows(
    happenings: Iterable[Happening], done: Sequence[Outcome], records: Mapping[str, Sequence[UsageRecord]]
) -> list[Row]:
    """A row for each kind."""
    kinds: dict[str, list[Happening]] = {}
    for happening in happenings:
        kinds.setdefault(happening.kind, []).append(happening)
    return [_row(kind, found, done, records) for kind, found in sorted(kinds.items())]


def noticed_by(found: Iterable[Happening]) -> str:
    """The most common reason that the fleet gave, without process numbers; empty = none was given."""
    reasons = Counter(_PID.sub("", one.reason.partition(";")[0])[:_REASON] for one in found if one.reason)
    return reasons.most_common(1)[0][0] if reasons else ""


def moved(done: Sequence[Outcome], records: Mapping[str, Sequence[UsageRecord]]) -> dict[str, int]:
    """How many requests took more than one pair, by recipe."""
    found = Counter(one.recipe for one in done if any(record.attempts > 1 for record in records.get(one.name, ())))
    return dict(sorted(found.items()))


def _row(
    kind: str, found: list[Happening], done: Sequence[Outcome], records: Mapping[str, Sequence[UsageRecord]]
) -> Row:
    all_gaps, moved_gaps, retries, migrations = [], [], 0, 0
    next_after, first_after, first = [], [], []
    for happening in found:
        for outcome in done:
            # Until it was noticed it may hit anybody; one that nobody notices does until it is over.
            lasts = happening.back if happening.noticed is None else happening.noticed
            wait = longest(outcome, happening.at, lasts or 0.0)
            if wait is None:
                continue
            all_gaps.append(wait.seconds)
            mine = records.get(outcome.name, ())
            more = sum(max(0, record.attempts - 1) for record in mine)
            moves = sum(record.migrations for record in mine)
            if more or moves or outcome.tries > 1:
                moved_gaps.append(wait.seconds)
                retries += more
                migrations += moves
                if happening.noticed is not None:
                    (first_after if wait.first else next_after).append(wait.after(happening.at + happening.noticed))
                    first += [wait.seconds] if wait.first else []
    gaps = moved_gaps or all_gaps
    noticed = [one.noticed for one in found if one.noticed is not None]
    back = [one.back for one in found if one.back is not None]
    return Row(
        kind=kind,
        faults=len(found),
        noticed_p50=percentile(noticed, 0.5),
        noticed_max=max(noticed, default=None),
        noticed_by=noticed_by(found),
        back_p50=percentile(back, 0.5),
        back_max=max(back, default=None),
        streams=len(all_gaps),
        moved=len(moved_gaps),
        gap_p50=percentile(gaps, 0.5),
        gap_p99=percentile(gaps, 0.99),
        gap_max=max(gaps, default=None),
        retries=retries,
        migrations=migrations,
        next_after=next_after,
        first_after=first_after,
        first=first,
    )


def table(report: Report) -> Table:
    """The report for a terminal."""
    title = (
        f"{report.scenario}: {sum(fault.harms for fault in report.faults)} faults, "
        f"{sum(not fault.harms for fault in report.faults)} drains and scale-downs, "
        f"{report.requests} requests, {report.tokens} tokens, "
        f"{len(report.wrong)} wrong"
    )
    made = Table(title=title, title_justify="left")
    for column in ("fault", "n", "noticed s", "by", "back s", "streams", "moved", "next token s p50 / p99 / max"):
        made.add_column(column, justify="left" if column in ("fault", "by") else "right", overflow="fold")
    for row in report.rows:
        made.add_row(
            row.kind,
            str(row.faults),
            f"{_number(row.noticed_p50)} / {_number(row.noticed_max)}",
            row.noticed_by,
            f"{_number(row.back_p50)} / {_number(row.back_max)}",
            str(row.streams),
            str(row.moved),
            " / ".join(map(_number, (row.gap_p50, row.gap_p99, row.gap_max))),
        )
    return made


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
