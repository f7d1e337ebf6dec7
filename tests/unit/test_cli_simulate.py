"""`tandem simulate chaos` prints what came of it, and fails when a promise was broken."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner, Result

from tandem.cli.simulate import app
from tandem.core.pair_events import Action, GroupLost
from tandem.core.pairing import PairTable


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["chaos", *arguments])


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def deaf(table: PairTable, event: GroupLost, now: float) -> list[Action]:
        return []

    monkeypatch.setattr(PairTable, "_group_lost", deaf)


def test_a_table_says_what_broke_and_what_became_of_it() -> None:
    result = invoke("--seeds", "2", "--requests", "50", "--jobs", "1")
    assert result.exit_code == 0
    assert all(word in result.output for word in ("requests", "faults", "lost", "doubled", "altered", "leaked"))


def test_json_has_the_numbers() -> None:
    report = json.loads(invoke("--seeds", "2", "--requests", "50", "--jobs", "1", "--json").stdout)
    assert (report["seeds"], report["requests"], report["broken"]) == (2, 100, [])
    assert report["faults_total"] == sum(report["faults"].values())


@pytest.mark.usefixtures("broken")
def test_a_broken_promise_ends_with_code_1_and_the_command_that_repeats_it() -> None:
    result = invoke("--seeds", "4", "--requests", "100", "--jobs", "1")
    assert result.exit_code == 1
    assert "tandem simulate chaos --seed" in result.output


@pytest.mark.usefixtures("broken")
def test_a_failing_seed_is_made_small_and_told() -> None:
    report = json.loads(invoke("--seeds", "4", "--requests", "100", "--jobs", "1", "--json").stdout)
    seed = report["broken"][0]["seed"]
    result = invoke("--seed", str(seed), "--requests", "100")
    assert result.exit_code == 1
    found = re.search(r"This much of it is enough: (\d+) requests and (\d+) faults.", result.output)
    assert found is not None
    assert int(found[1]) <= 10
    assert int(found[2]) <= 4
    assert "though the group is lost" in result.output


def test_a_trace_tells_the_story_of_a_seed() -> None:
    assert "NeedPair(" in invoke("--seed", "1", "--requests", "5", "--trace").output
