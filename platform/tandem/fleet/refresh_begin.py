"""Begins a refresh of the weights: refuses, before any group drains, what could not work."""

from __future__ import annotations

import asyncio

import msgspec

from tandem.core.declared import declarations, known_weights, stands_for, taken_version
from tandem.core.group_record import Weights
from tandem.core.refresh import OVER, Refresh, pause_reason
from tandem.fleet import clock
from tandem.fleet.control_service import Refused
from tandem.fleet.engines import Engines, NoEngineError
from tandem.fleet.fleet_record import read_record
from tandem.fleet.refresh_ask import RefreshAsk
from tandem.fleet.refresh_store import REFRESH_KEY
from tandem.fleet.snapshot import read_snapshot
from tandem.fleet.weights import PROMPT
from tandem.state import Store

_MOST_TOKENS = 2048


async def begin_refresh(store: Store, engines: Engines, ask: RefreshAsk, *, drain_s: float) -> Refresh:
    """Note the refresh, for the controller to carry out. Raises Refused, StoreError.

    Args:
        drain_s: seconds that a group may take to be empty, if `ask` does not say.
    """
    entry = await store.get(REFRESH_KEY)
    if entry is not None:
        last = msgspec.json.decode(entry.value, type=Refresh)
        if last.phase not in OVER:
            raise Refused(f"A refresh to version {last.version} goes on; wait for its end, or stop it.")
    fleet, record = await read_snapshot(store), await read_record(store)
    if not fleet.model_version:
        raise Refused("The fleet's weights have no version to go back to; set model.version.")
    own = Weights(fleet.model_path, fleet.model_version)
    declared = declarations(fleet.desired)
    if len(declared) > 1:
        raise Refused("A change of the weights goes on, by which groups declare different ones; wait for its end.")
    old = stands_for(declared.pop(), record.replaced) if declared else own
    held = {fleet.model_version} | {group.weight_version for group in fleet.groups}
    if ask.version in held:
        raise Refused(f"Version {ask.version} is what the fleet has already; give the new weights another one.")
    known = known_weights(own, record.replaced, fleet.desired, fleet.groups)
    if taken := taken_version(Weights(ask.path, ask.version), known):
        raise Refused(f"Version {ask.version} is that of the weights in {taken}; give the new weights another one.")
    if not ask.allow_pause and (why := pause_reason(fleet.groups)):
        raise Refused(f"Service would pause: {why}. Add a group first, or allow a pause.")
    try:
        await asyncio.to_thread(engines.check_weights, ask.path)
        prompt = await asyncio.to_thread(engines.encode, ask.path, ask.canary or PROMPT)
    except NoEngineError as error:
        raise Refused(f"The weights cannot be taken: {error}.") from error
    if not 0 < len(prompt) <= _MOST_TOKENS:
        raise Refused(f"The canary has {len(prompt)} tokens; it may have 1 to {_MOST_TOKENS}.")
    refresh = Refresh(
        path=ask.path,
        version=ask.version,
        old_path=old.path or fleet.model_path,
        old_version=old.version,
        prompt=tuple(prompt),
        expect=ask.expect,
        rollback=ask.rollback,
        allow_pause=ask.allow_pause,
        drain_s=drain_s if ask.drain_s is None else ask.drain_s,
        began=clock.now(),
    )
    version = entry.version if entry is not None else 0
    if await store.compare_and_set(REFRESH_KEY, msgspec.json.encode(refresh), version=version) is None:
        raise Refused("Another refresh began at the same moment; wait for its end, or stop it.")
    return refresh
