"""A change that only waits: when that takes longer than `progress_s` it is told as stalled, as a Deployment's would be.

Nothing is taken back for it: what it waits for (nodes, a partner, an answer that says something) is no fault of its
revision. It goes on by itself when the wait is over. What fails is not waited for: `rollout_memory.py` has that.
"""

from __future__ import annotations

from msgspec.structs import replace

from tandem.core.rollout_status import View, first_new
from tandem.core.rollout_types import Memory, Phase, Status
from tandem.core.types import GroupState


def in_time(view: View, status: Status) -> tuple[Memory, Status]:
    """The memory with what the change waits for, and the status, which is another one when that has lasted too long."""
    memory, limit = view.memory, view.pool.rules.progress_s
    wait = _wait(view, status)
    if wait != memory.waits_for:
        memory = replace(memory, waits_for=wait, waits_since=view.now if wait else 0.0)
    if not wait or view.now < memory.waits_since + limit:
        return memory, status
    message = f"{status.message}; it has waited for more than {limit:g} s. It goes on by itself when that is over"
    return memory, replace(status, phase=Phase.STOPPED, reason="Stalled", message=message)


def _wait(view: View, status: Status) -> str:
    """What the change waits for, in a form that is another one as soon as it has gone on; empty = it does not wait."""
    pool, memory = view.pool, view.memory
    if status.phase is not Phase.PROGRESSING or memory.good == pool.revision:
        return ""
    after = f"with {len(view.new)} of {pool.revision}"
    match status.reason:
        case "WaitingForNodes":
            return f"nodes, {after}"
        # A partner may come and go while the canary waits for an answer: that is one wait.
        case "WaitingForPair":
            return f"the other pool, {after}"
        case "Canary" if _is_up_in_vain(view):
            return f"the other pool, {after}"
    return ""


def _is_up_in_vain(view: View) -> bool:
    """Whether the first new group is up, and does not serve, or not as one that has answered."""
    canary = first_new(view)
    if canary is None or canary.leaving:
        return False
    return canary.state is GroupState.CORDONED or (canary.ready and not canary.checked)
