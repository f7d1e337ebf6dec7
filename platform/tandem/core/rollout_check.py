"""Which groups serve nobody yet, and what follows from what they answered to a prompt whose answer is known.

The first group of a revision, its canary, is held back (cordoned) until it has answered rightly. Then it serves, and
the canary time counts. An answer holds for one epoch: engines that start anew are asked again, as long as their
revision has not passed; after that nobody is.
"""

from __future__ import annotations

import msgspec

from tandem.core.group_check import CheckVerdict, GroupCheck
from tandem.core.rollout_types import Member, Memory
from tandem.core.types import GroupState

SILENCES = 3
"""A group that is up and gives no answer so often in a row has failed."""
AGAIN_S = 5.0
"""After an answer that says nothing, a group is asked again so much later."""
_UP = (GroupState.READY, GroupState.CORDONED)
_DOWN = (GroupState.STARTING, GroupState.FAILED, GroupState.GONE)


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered of the checks of one group."""

    epoch: int = 0
    """That was asked last; 0 = none yet."""
    verdict: CheckVerdict = CheckVerdict.UNKNOWN
    message: str = ""
    silences: int = 0
    """In a row, in this epoch."""

    @property
    def failure(self) -> str:
        """Why the group will not do; empty = it may. What one epoch has answered wrongly, a later one cannot mend."""
        if self.verdict is CheckVerdict.WRONG:
            return self.message
        if self.verdict is CheckVerdict.SILENT and self.silences >= SILENCES:
            return f"no answer in {self.silences} tries; {self.message}"
        return ""


def note(trial: Trial, check: GroupCheck) -> Trial:
    """What is known after another answer."""
    if trial.failure:
        return trial
    # A smaller epoch is none of the past: a fleet that lost its state counts anew.
    epoch = check.epoch or trial.epoch
    same = trial.epoch == epoch
    # What could not be asked says nothing, neither of a silence before nor of the group.
    silences = (trial.silences if same else 0) + (check.verdict is CheckVerdict.SILENT)
    if check.verdict in (CheckVerdict.OK, CheckVerdict.ALONE):
        silences = 0
    return Trial(epoch=epoch, verdict=check.verdict, message=check.message, silences=silences)


def is_checked(trial: Trial, epoch: int, state: GroupState, *, alone: bool = False) -> bool:
    """Whether the engines that run now, or ran last, have answered rightly. Those that are about to start have not.

    `alone`: nobody wants a group of the other role, so an answer without one will do.
    """
    right = trial.verdict is CheckVerdict.OK or (alone and trial.verdict is CheckVerdict.ALONE)
    return right and trial.epoch == epoch and state not in _DOWN


def is_due(trial: Trial, state: GroupState, asked_at: float, now: float) -> bool:
    """Whether to ask one that is not checked; `asked_at`: when this epoch was last, 0 = never. In Unix seconds."""
    return state in _UP and not trial.failure and not asked_at <= now < asked_at + AGAIN_S


def is_on_trial(member: Member, memory: Memory) -> bool:
    """Whether it is the canary of a revision that has not shown yet that it serves."""
    return member.canary and member.revision not in memory.proven


def is_held_back(member: Member, memory: Memory) -> bool:
    """Whether no request may come to a group yet: it is on trial, and has not answered rightly."""
    return is_on_trial(member, memory) and (not member.checked or bool(member.canary_failed))


def is_waiting(member: Member, memory: Memory) -> bool:
    """Whether it is up and held back: it serves as soon as it has answered."""
    return member.state is GroupState.CORDONED and not member.leaving and is_held_back(member, memory)
