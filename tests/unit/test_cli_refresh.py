"""`tandem refresh`: what it says, and what it needs to be told."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

from tandem.cli.main import app
from tandem.cli.refresh import sentence
from tandem.core.refresh import Refresh, RefreshPhase

REFRESH = Refresh(path="/second", version="2", old_path="/first", old_version="1", note="n", began=10, ended=52)


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        (RefreshPhase.RUNNING, "taking version 2: n"),
        (RefreshPhase.ROLLING_BACK, "going back to version 1, since f: n"),
        (RefreshPhase.DONE, "every group has version 2 from /second (42 s)"),
        (RefreshPhase.ROLLED_BACK, "every group has version 1 again, since f"),
        (RefreshPhase.FAILED, "the refresh to version 2 failed, groups may differ: f"),
    ],
)
def test_every_phase_has_its_sentence(phase: RefreshPhase, said: str) -> None:
    assert sentence(replace(REFRESH, phase=phase, failure="f")) == said


def test_new_weights_need_a_version() -> None:
    result = CliRunner().invoke(app, ["refresh", "/second"])
    assert result.exit_code == 1
    assert "--version is missing" in result.output
