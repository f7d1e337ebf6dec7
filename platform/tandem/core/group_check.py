"""What a fleet says after it has asked one of its groups a prompt whose answer is known (`FleetControl.CheckGroup`)."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class CheckVerdict(StrEnum):
    """Whether a group may serve, as far as one prompt tells."""

    OK = "ok"
    """It answered as it should, alone and in a pair."""
    ALONE = "alone"
    """It answered alone, and there is no group to ask it with."""
    WRONG = "wrong"
    """It answered, and not as it should."""
    SILENT = "silent"
    """It is up, and gave no answer, or not within its time."""
    UNKNOWN = "unknown"
    """It could not be asked or judged, such as when a group beside it died: it is no fault of its own."""


class GroupCheck(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of one check."""

    verdict: CheckVerdict
    message: str = ""
    """Why, in one sentence without a subject that begins with a small letter."""
    epoch: int = 0
    """Of the group that was asked; 0 = none was."""
    partner: str = ""
    """The group of the other role that it was asked with; empty = it was asked alone, or not at all."""
