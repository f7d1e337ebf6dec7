"""`python -m chaos.pages REPORT…`: reports as a table for docs/chaos.md, and what the promises come to."""

from __future__ import annotations

import argparse
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
    """All of it, in Markdown: a table for each scenario."""
    lines: list[str] = []
    for report in reports:
        lines += [_title(report), *(f"  {line}" for line in report.wrong), "", *_table(_rows(report)), ""]
    left = [one.noticed for report in reports for one in report.faults if one.kind == "clients leave" and one.noticed]
    return "\n".join(
        [
            *lines,
            _total(reports),
            *_promises([row for report in reports for row in report.rows]),
            *_told("engines idle after the last client left", [left], "times"),
        ]
    )


def _title(report: Report) -> str:
    return (
        f"`{report.scenario}`, seed {report.seed}: {_played([report])} in {report.seconds / 60:.0f} min, "
        f"{report.requests:,} requests, {report.tokens:,} tokens, {len(report.wrong)} wrong, "
        f"errors: {report.errors or 'none'}"
    )


def _rows(report: Report) -> list[Row]:
    return [
        msgspec.structs.replace(row, noticed_by=noticed_by(one for one in report.faults if one.kind == row.kind))
        for row in report.rows
    ]


def _total(reports: Sequence[Report]) -> str:
    requests = sum(one.requests for one in reports)
    tokens = sum(one.tokens for one in reports)
    wrong = sum(len(one.wrong) for one in reports)
    migrations = sum(row.migrations for one in reports for row in one.rows)
    kinds = len({fault.kind for report in reports for fault in report.faults if fault.harms})
    return (
        f"In all: {_played(reports)}, {kinds} kinds of faults, {requests:,} requests, {tokens:,} tokens, "
        f"{wrong} wrong; {migrations} migrations"
    )


def _played(reports: Sequence[Report]) -> str:
    faults = [fault for report in reports for fault in report.faults]
    told = [f"{sum(fault.harms for fault in faults)} faults"]
    for what in ("drain", "scale down"):
        if count := sum(fault.kind.startswith(what) for fault in faults):
            told.append(f"{count} {what}s")
    return ", ".join(told)


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
    for how in ("kill", "freeze"):
        decode = [row for row in rows if row.kind.startswith(f"{how} decode")]
        prefill = [row for row in rows if row.kind.startswith(f"{how} prefill")]
        yield from _told(f"{how} decode, next token after the notice", [row.next_after for row in decode])
        yield from _told(f"{how} prefill, first token after the notice", [row.first_after for row in prefill])
        yield from _told(f"{how} prefill, first token after the fault", [row.first for row in prefill])


def _told(what: str, found: Iterable[Sequence[float]], of: str = "streams") -> Iterable[str]:
    values = [value for row in found for value in row]
    if values:
        shares = (percentile(values, share) for share in (0.5, 0.99, 1.0))
        within = ", ".join(f"{sum(value <= limit for value in values)} within {limit} s" for limit in (1, 2))
        yield f"{what}: {len(values)} {of}, p50 / p99 / max {' / '.join(map(_number, shares))} s; {within}"


def _pair(one: float | None, other: float | None) -> str:
    return "–" if one is None else f"{_number(one)}, {_number(other)}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def main() -> None:
    """Print the page of the reports that the command line names."""
    parser = argparse.ArgumentParser("python -m chaos.pages", description="Reports of `python -m chaos` as tables.")
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT", help="what --json has written")
    found: list[Report] = []
    for path in parser.parse_args().reports:
        try:
            found += msgspec.json.decode(path.read_bytes(), type=list[Report])
        except (OSError, msgspec.DecodeError) as error:
            parser.error(f"{path} is no report of python -m chaos --json: {error}")
    sys.stdout.write(page(found) + "\n")


if __name__ == "__main__":
    main()
