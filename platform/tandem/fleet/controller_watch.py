"""Sees to it that the controller does not stand still. Ray starts one again that dies, and does not notice one that
hangs: stopped by a signal or a debugger, or with an event loop that is stuck.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from tandem.fleet.controller import Controller, find_controller
from tandem.fleet.rank_actors import answer, sentence

LOOK_S = 5.0
SILENT_S = 20.0
"""A controller that has answered before, and then says nothing for so long, hangs; a rank's actor has as long."""
_AGAIN_S = 5.0
"""It is asked once more: this process may be the one that stood still."""

_log = logging.getLogger(__name__)


async def keep_controller_moving() -> None:
    """Ask the controller again and again, for ever; end one that does not answer. Ray starts another, which takes over
    what lives. This process must be connected to the cluster.
    """
    known = False
    while True:
        known = await look(known=known, silent_s=SILENT_S)
        await asyncio.sleep(LOOK_S)


async def look(*, known: bool, silent_s: float) -> bool:
    """Ask it once, and end it if it is silent for so many seconds and is `known` to have answered before: one that is
    only being started is left its time. Returns whether it is known to have answered.
    """
    try:
        controller = await asyncio.to_thread(find_controller)
        if controller is None or await _answers(controller, silent_s):
            return known or controller is not None
        if not known or await _answers(controller, _AGAIN_S):
            return known
        _log.error("the controller has not answered for %.0f s: it is ended, for another one", silent_s)
        await asyncio.to_thread(ray.kill, controller, no_restart=False)
    except (RayError, ConnectionError, RuntimeError, ValueError) as error:
        _log.info("the controller cannot be asked just now: %s", sentence(error))
    return False


async def _answers(controller: ActorHandle[Controller], within: float) -> bool:
    try:
        await answer(cast("Any", controller).pid.remote(), within)
    except TimeoutError:
        return False
    return True
