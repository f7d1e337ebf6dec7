"""The side gateway's wall clock jumps, and nothing else of its time does: otherwise those faults would show nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from chaos.side_gateway import fake_time, faked

# The second wait is one of threads, which ended at once by another setting of the library.
LOOK = """
import json, threading, time
began = time.monotonic()
threading.Event().wait(0.2)
print(json.dumps([time.time(), began, time.monotonic() - began]))
"""


@pytest.mark.parametrize("ahead", [3600, -3600])
def test_the_wall_clock_jumps_and_waits_last_as_long_as_ever(tmp_path: Path, ahead: int) -> None:
    library = fake_time()
    if library is None:
        pytest.skip("libfaketime is not installed")
    clock = tmp_path / "clock"
    clock.write_text(f"{ahead:+d}\n")
    command = [sys.executable, "-S", "-c", LOOK]
    before = time.monotonic()
    told = subprocess.run(
        command, env={**os.environ, **faked(library, clock)}, stdout=subprocess.PIPE, check=True, timeout=30
    ).stdout
    wall, monotonic, waited = msgspec.json.decode(told, type=tuple[float, float, float])
    assert wall - time.time() == pytest.approx(ahead, abs=20)
    assert before <= monotonic <= time.monotonic()
    assert 0.2 <= waited < 20
