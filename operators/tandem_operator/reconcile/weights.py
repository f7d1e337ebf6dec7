"""Whether a fleet can take the weights that a change declares: asked before anything is made for it."""

from __future__ import annotations

from collections.abc import Collection

from tandem.core.group_record import Weights
from tandem.fleet.control_client import ControlError
from tandem_operator.control import FleetLink
from tandem_operator.names import Key
from tandem_operator.reconcile.context import Context

AGAIN_S = 10.0
"""What was refused may be mended: it is asked again after this."""
_OLD_HEAD = (
    "the fleet's head is of an older Tandem, whose groups have the weights that the fleet began with: replace its pod"
)


async def why_not(ctx: Context, fleet: Key, link: FleetLink, wanted: Weights, there: Collection[Weights]) -> str:
    """Why no group with these weights can be made, in one sentence; empty = it can.

    `there`: the weights that groups declare already. A fleet without any group began with those that are wanted.
    """
    asked = (fleet, wanted)
    if not there or wanted in there:
        ctx.weights.pop(asked, None)
        return ""
    known = ctx.weights.get(asked)
    if known is not None and known[0] <= ctx.now() < known[0] + AGAIN_S:
        return known[1]
    why = ""
    try:
        async with link.client() as client:
            await client.check_weights(wanted.path, wanted.version)
    except ControlError as error:
        why = _OLD_HEAD if error.code == "UNIMPLEMENTED" else str(error).rstrip(".")
    for one in [one for one in ctx.weights if one[0] == fleet and one != asked]:
        del ctx.weights[one]
    ctx.weights[asked] = (ctx.now(), why)
    return why
