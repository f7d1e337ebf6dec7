"""`aiperf`, NVIDIA's load generator: a short run of each endpoint that it knows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REQUESTS = 6
TOKENIZER = os.environ.get("TANDEM_TEST_TOKENIZER", "")
"""A folder with the model's tokenizer: the tool counts tokens by itself, and would look for one in the internet."""


@pytest.mark.skipif(not TOKENIZER, reason="needs TANDEM_TEST_TOKENIZER")
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_short_load_is_measured(tmp_path: Path, url: str, model: str, endpoint: str) -> None:
    command = [
        *(str(Path(sys.executable).parent / "aiperf"), "profile", "--ui", "none"),
        *("--url", url, "--model", model, "--endpoint-type", endpoint, "--streaming"),
        *("--tokenizer", TOKENIZER, "--request-count", str(REQUESTS), "--concurrency", "2", "--random-seed", "1"),
        *("--synthetic-input-tokens-mean", "40", "--output-tokens-mean", "8", "--no-gpu-telemetry"),
        *("--artifact-dir", str(tmp_path), "--workers-max", "1"),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-2000:]
    report = json.loads(next(tmp_path.rglob("profile_export_aiperf.json")).read_text(encoding="utf-8"))
    assert report["request_count"]["avg"] == REQUESTS
    assert "time_to_first_token" in report
