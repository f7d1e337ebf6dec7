"""`python -m chaos.pages REPORT…`: reports as a table for docs/chaos.md, and what the promises come to."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from chaos.measure import Report, Row, noticed_by, percentile

_HEAD = (
    "fault",
    "n",
    "noticed after, s: p50, max",
    "by",
    "groups ready after, s: p50, max",
    "streams; moved",
    "more pairs",
    "longest wait for a token, s: p50, p99",
)


def page(reports: Sequence[Report]) -> str:
    """All of it, in Markdown."""
    rows = list(_rows(reports))
    return "\n".join([*_totals(reports), "", *_table(rows), "", *_promises(rows)])


def _rows(reports: Sequence[Report]) -> Iterable[Row]:
    """In the order of the kinds, with the reasons of all their faults."""
    for report in reports:
        for row in report.rows:
            mine = [fault for fault in report.faults if fault.kind == row.kind]
            yield msgspec.structs.replace(row, noticed_by=noticed_by(mine))


def _totals(reports: Sequence[Report]) -> Iterable[str]:
    for one in reports:
        yield (
            f"{one.scenario} (seed {one.seed}): {len(one.faults)} faults in {one.seconds / 60:.1f} min, {one.requests} "
            f"requests, {one.tokens} tokens, {len(one.wrong)} wrong, errors: {one.errors or 'none'}"
        )
        yield from (f"  {line}" for line in one.wrong)
    faults, requests, tokens = (
        sum(counts) for counts in zip(*((len(one.faults), one.requests, one.tokens) for one in reports), strict=True)
    )
    migrations = sum(row.migrations for one in reports for row in one.rows)
    yield f"In all: {faults} faults, {requests:,} requests, {tokens:,} tokens; {migrations} migrations"


def _table(rows: Sequence[Row]) -> Iterable[str]:
    yield f"| {' | '.join(_HEAD)} |"
    yield f"|{'---|' * len(_HEAD)}"
    for row in rows:
        cells = (
            row.kind,
            str(row.faults),
            _pair(row.noticed_p50, row.noticed_max),
            row.noticed_by or "–",
            _pair(row.back_p50, row.back_max),
            f"{row.streams}; {row.moved}",
            str(row.retries),
            _pair(row.gap_p50, row.gap_p99),
        )
        yield f"| {' | '.join(cells)} |"


def _promises(rows: Sequence[Row]) -> Iterable[str]:
    for start in ("kill decode", "freeze decode"):
        values = [value for row in rows if row.kind.startswith(start) for value in row.next_after]
        yield f"{start}, next token after the notice: {_told(values)}"
    for start in ("kill prefill", "freeze prefill"):
        mine = [row for row in rows if row.kind.startswith(start)]
        yield f"{start}, first token after the notice: {_told([value for row in mine for value in row.first_after])}"
        yield f"{start}, first token after the fault: {_told([value for row in mine for value in row.first])}"


def _told(values: Sequence[float]) -> str:
    shares = (percentile(values, share) for share in (0.5, 0.99, 1.0))
    within = ", ".join(f"{sum(value <= limit for value in values)} within {limit} s" for limit in (1, 2))
    return f"n {len(values)}, p50 / p99 / max {' / '.join(map(_number, shares))} s; {within}"


def _pair(one: float | None, other: float | None) -> str:
    return "–" if one is None else f"{_number(one)}, {_number(other)}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.stdout.write(
        page(
            [
                report
                for path in sys.argv[1:]
                for report in msgspec.json.decode(Path(path).read_bytes(), type=list[Report])
            ]
        )
        + "\n"
    )
