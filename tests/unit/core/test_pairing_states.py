"""The table in the documentation is what the code does."""

from __future__ import annotations

from pathlib import Path

import pairing_states
import pytest

PAGE = Path(__file__).parents[3] / "docs" / "pairing.md"


def test_the_documentation_has_the_table_as_it_is() -> None:
    assert pairing_states.table() in PAGE.read_text(encoding="utf-8"), "python tests/unit/core/pairing_states.py"


@pytest.mark.parametrize("state", pairing_states.STATES)
def test_a_request_in_each_state_can_end(state: str) -> None:
    table = pairing_states.reach(state)
    table.handle(pairing_states.EVENTS["the client goes"], 1)
    assert table.open_requests == 0
