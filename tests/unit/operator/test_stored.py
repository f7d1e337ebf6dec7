"""Specs that a newer operator has stored."""

from __future__ import annotations

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from tandem_operator.stored import stored_spec


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int = 1


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str
    inner: Inner = Inner()
    parts: list[Inner] = []


def test_what_this_version_knows_is_read_although_there_is_more() -> None:
    spec = {"name": "one", "new": {"a": 1}, "inner": {"size": 2, "later": True}, "parts": [{"size": 3}, {"later": 0}]}
    read = stored_spec(Outer, spec)
    assert read == Outer(name="one", inner=Inner(size=2), parts=[Inner(size=3), Inner()])
    assert spec["inner"] == {"size": 2, "later": True}, "what is in the cache is not touched"


def test_what_is_wrong_is_still_refused() -> None:
    with pytest.raises(ValidationError, match="size"):
        stored_spec(Outer, {"name": "one", "new": 1, "inner": {"size": "large"}})
