"""What the planning of a fleet must not forget when the operator ends, in the ConfigMap `<fleet>-planning`.

Kept are the numbers that were decided, until when one set by hand stands, and what the groups can bear. What was seen
over the last minutes is not: it would be old, and removing a group takes a cool-down of fresh looks.
"""

from __future__ import annotations

import msgspec

from tandem.core.planning_types import PlanPolicy, PlanState, PoolMemory
from tandem.core.types import Role
from tandem_operator.names import CONFIG_MAP, FLEET, Key, Object, key_of, labels, owned, owned_by
from tandem_operator.reconcile.context import Context

_FIELD = "planning.json"
_SLOWLY_S = 30.0
"""What is learned changes all the time: it is written at most so often."""


def _lasting(memory: PoolMemory) -> PoolMemory:
    """The part of it that is kept."""
    return PoolMemory(
        wanted=memory.wanted,
        before=memory.before,
        changed_at=memory.changed_at,
        reason=memory.reason,
        since=memory.since,
        manual_until=memory.manual_until,
        warmup_s=memory.warmup_s,
        capacity=memory.capacity,
    )


def _decided(state: PlanState) -> tuple[object, ...]:
    """What is written at once."""
    pools = (state.prefill, state.decode)
    return tuple((pool.wanted, pool.changed_at, pool.manual_until) for pool in pools)


def _learned(state: PlanState) -> tuple[object, ...]:
    """What is written now and then: to two digits, as it moves with every tick."""
    found = []
    for pool in (state.prefill, state.decode):
        seen = pool.capacity
        values = (seen.kept, seen.broke, seen.base_load, seen.base_s, pool.warmup_s)
        found.append(tuple(None if value is None else f"{value:.2g}" for value in values))
    return tuple(found)


class PlanningMemory:
    """Reads it once, writes what matters, and sees to it that the server keeps that."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._written = PlanState()
        self._written_at = 0.0

    def read(self, fleet: Object, now: float) -> PlanState:
        """What an operator before this one has kept of this very fleet; empty if there is none."""
        found = self._ctx.cache.get(_key(fleet))
        text = ((found or {}).get("data") or {}).get(_FIELD)
        if found is None or text is None or not owned(found, fleet):
            return PlanState()
        try:
            self._written = msgspec.json.decode(text, type=PlanState)
        except msgspec.DecodeError:  # somebody has edited it: without it a number set by hand may not stand
            return PlanState()
        self._written_at = now
        # Looks begin anew: the cool-down before a group is removed counts from now.
        pools = {role: msgspec.structs.replace(self._written.of(role), began=now) for role in Role}
        return PlanState(prefill=pools[Role.PREFILL], decode=pools[Role.DECODE])

    async def write(self, fleet: Object, state: PlanState, policy: PlanPolicy, now: float) -> bool:
        """Keep it, if it is other in what matters; return whether something was written. Raises KubeError and Trouble.

        Without news the server is still to have what was written last: somebody may have deleted or edited the
        ConfigMap, and an operator after this one knows nothing else.
        """
        if not any(policy.of(role).automatic for role in Role):
            return False
        latest = PlanState(prefill=_lasting(state.prefill), decode=_lasting(state.decode))
        learned = _learned(latest) != _learned(self._written) and now - self._written_at >= _SLOWLY_S
        news = learned or _decided(latest) != _decided(self._written)
        kept = latest if news else self._written
        body = {
            "metadata": {
                "labels": labels(fleet["metadata"]["name"], "config"),
                "ownerReferences": owned_by(FLEET, fleet),
            },
            "data": {_FIELD: msgspec.json.encode(kept).decode()},
        }
        done = await self._ctx.applier.ensure(_key(fleet), body, fleet)
        if news:
            self._written, self._written_at = kept, now
        return done


def _key(fleet: Object) -> Key:
    own = key_of(FLEET, fleet)
    return Key(CONFIG_MAP, own.namespace, f"{own.name}-planning")
