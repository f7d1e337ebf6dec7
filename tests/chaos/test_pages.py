"""The page says how many requests went wrong, and keeps apart what streams waited before and after the notice."""

from __future__ import annotations

from chaos.client import Outcome
from chaos.engine_faults import Happening
from chaos.measure import Report, rows
from chaos.pages import page
from tandem.core.usage import UsageRecord

KILLED = Happening(kind="kill decode leader main", at=10.0, noticed=0.5, reason="died", back=9.0)
STREAM = Outcome(name="s", recipe="short", began=8.0, ended=13.0, times=[9.0, 9.9, 11.75, 12.0])
RECORD = UsageRecord(id="1", at=0.0, model="m", user="s", attempts=2, migrations=1)
REPORT = Report(
    scenario="engines",
    seed=1,
    seconds=60.0,
    requests=1,
    tokens=4,
    faults=[KILLED],
    rows=rows([KILLED], [STREAM], {"s": [RECORD]}),
    moved={},
    errors={},
    wrong=["answers: lost"],
)


def test_a_page_tells_the_row_of_each_kind_and_what_was_wrong() -> None:
    told = page([REPORT])
    assert "| kill decode leader main | 1 | 0.50, 0.50 | died | 9.00, 9.00 | 1; 1 | 1 | 1.75, 1.75 |" in told
    assert "1 wrong" in told
    assert "  answers: lost" in told


def test_the_next_token_of_killed_decode_groups_is_counted_from_the_notice() -> None:
    assert "kill decode, next token after the notice: 1 streams, p50 / p99 / max 1.25 / 1.25 / 1.25 s" in page([REPORT])


def test_what_no_stream_saw_is_not_told() -> None:
    assert "kill prefill" not in page([REPORT])
