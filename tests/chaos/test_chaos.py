"""The slice of the chaos suite that CI runs: one fleet, a fault of most kinds, all checks."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from chaos.measure import table
from chaos.play import play
from chaos.scenarios import SLICE
from chaos.stage import home


@pytest.mark.timeout(1500)  # 4 minutes alone on two cores
async def test_no_fault_loses_doubles_or_alters_an_answer() -> None:
    with home() as folder:
        report = await play(SLICE, len(SLICE.counted), 1, home=folder, cache=Path(tempfile.gettempdir()))
    Console(width=160).print(table(report))
    assert sum(fault.harms for fault in report.faults) >= 20
    assert report.wrong == []
