"""Small dealings with Ray: find actors by name, wait for an answer with a deadline, tell an error in one sentence."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from tandem.fleet.rank import RankActor, RankName, RankSettings

_T = TypeVar("_T")
_LONGEST = 300
_COUNTERS_S = 5.0
_log = logging.getLogger(__name__)


async def answer(ref: Awaitable[_T], within: float) -> _T:
    """The result of a call to an actor. Raises TimeoutError after `within` seconds, RayError when the call failed."""
    async with asyncio.timeout(within):
        return await ref


def make_actor(rank: RankName, settings: RankSettings, options: Mapping[str, Any]) -> ActorHandle[RankActor]:
    """Make a rank's actor, which outlives this process and is not restarted by Ray. Blocks for a moment."""
    made = ray.remote(RankActor).options(name=str(rank), lifetime="detached", max_restarts=0, **options)
    return cast("ActorHandle[RankActor]", made.remote(*rank, settings))


async def find_actor(name: str) -> ActorHandle[RankActor] | None:
    """A rank's actor by name; None if it is dead or never was."""
    try:
        return cast("ActorHandle[RankActor]", await asyncio.to_thread(ray.get_actor, name))
    except ValueError:
        return None


async def named_ranks() -> list[RankName]:
    """All ranks of this namespace whose actors live or are being made. Raises RayError."""
    names = await asyncio.to_thread(ray.util.list_named_actors)
    return [rank for name in names if (rank := RankName.parse(name))]


async def kill_actor(actor: ActorHandle[Any]) -> None:
    """End an actor's process at once. Raises RayError."""
    await asyncio.to_thread(ray.kill, actor, no_restart=True)


async def counters_of_all() -> dict[str, dict[int, dict[str, float]]]:
    """What the engines have counted: group → rank → Prometheus sample → value. Ranks that are away are left out."""
    ranks = await named_ranks()
    answers = await asyncio.gather(*(_counters(rank) for rank in ranks))
    counted: dict[str, dict[int, dict[str, float]]] = {}
    for rank, answer_ in zip(ranks, answers, strict=True):
        if answer_ is not None:
            counted.setdefault(rank.group, {})[rank.rank] = answer_
    return counted


async def _counters(rank: RankName) -> dict[str, float] | None:
    actor = await find_actor(str(rank))
    if actor is None:
        return None
    try:
        return await answer(actor.counters.remote(), _COUNTERS_S)
    except (RayError, TimeoutError) as error:
        _log.info("%s does not tell its counters: %s", rank, sentence(error))
        return None


def sentence(error: BaseException) -> str:
    """What went wrong, without a traceback."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    text = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
    if isinstance(error, RayTaskError) or not text:
        text = f"{type(cause).__name__}: {text}" if text else type(cause).__name__
    return text[:_LONGEST]
