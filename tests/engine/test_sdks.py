"""Official clients against the real fleet: each file of tests/sdk, run in the virtual environment that has the clients.

`make sdk-venv` makes it (.venv-sdk, from requirements/sdk.txt); without it these tests are skipped, but not in CI.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from support.fleet import Fleet

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("TANDEM_SDK_VENV", ROOT / ".venv-sdk")) / "bin" / "python"
FILES = sorted(path.name for path in (ROOT / "tests" / "sdk").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES)
def test_clients_work_unchanged(fleet: Fleet, tiny: Path, file: str) -> None:
    if not PYTHON.exists():
        assert not os.environ.get("CI"), f"{PYTHON} is missing: make sdk-venv"
        pytest.skip(f"needs {PYTHON}: make sdk-venv")
    # Nothing of this environment: neither Tandem on the path nor pytest's own options.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST"))}
    ran = subprocess.run(
        [PYTHON, "-m", "pytest", "-q", ROOT / "tests" / "sdk" / file],
        cwd=ROOT,
        env={**inherited, "TANDEM_TEST_URL": fleet.base, "TANDEM_TEST_TOKENIZER": str(tiny)},
        capture_output=True,
        text=True,
        timeout=590,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
