"""Gives an empty group other weights in place, and sees how it answers with them.

`POST /update_weights_from_disk` to rank 0 reaches every rank (SGLang 0.5.23, `managers/tokenizer_manager.py`,
`scheduler_components/weight_updater.py`): it waits for all DP ranks and is well only if each of them is; each flushes
its prefix cache, which old weights have made. Seen in the source, and why a group that fails is restarted:

- its "rolling back to original weights" reads the *new* folder again, as the path was changed before;
- the ranks that could load have the new weights, the others not.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import msgspec

from tandem.core.refresh import OVER, Refresh
from tandem.core.types import Group, GroupSpec, Role
from tandem.engine.http1 import HttpFailure, Pool
from tandem.engine.launch import RankEndpoints
from tandem.fleet.canary import Answers, Canary, CanaryError
from tandem.fleet.engines import Engines, NoEngineError
from tandem.fleet.refresh_store import change_refresh, read_refresh
from tandem.fleet.snapshot import read_snapshot
from tandem.state import Store

PROMPT = "The weights of this model have just been loaded. Two and three are"
"""The canary, where none is given."""

DETERMINISTIC = "--enable-deterministic-inference"
_ANYWHERE = RankEndpoints(host="127.0.0.1", http_port=1, dist_init="127.0.0.1:2", bootstrap_port=3)
"""For a command line that is only read."""

_log = logging.getLogger(__name__)


class WeightsError(Exception):
    """The weights could not be loaded or answer badly; one sentence without a subject."""


class WeightLoader:
    """For all groups of a controller. Belongs to one event loop."""

    def __init__(self, store: Store, engines: Engines, *, within: float = 900.0) -> None:
        """`within`: seconds that loading may take."""
        self._store = store
        self._engines = engines
        self._within = within
        self._pool = Pool()

    async def load(self, group: Group, path: str, version: str) -> None:
        """Return when every rank has the weights and they answer well. Raises WeightsError, StoreError."""
        folder = self._engines.folder(path)
        try:
            await self._update(group, folder, version)
            await self._check(group, folder, version)
        except HttpFailure as error:
            raise WeightsError(f"its engine did not load {folder}: {error}") from error
        except (CanaryError, NoEngineError) as error:
            raise WeightsError(str(error)) from error

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.close()

    async def _update(self, group: Group, folder: str, version: str) -> None:
        body = msgspec.json.encode({"model_path": folder, "weight_version": version})
        url = f"{group.url}/update_weights_from_disk"
        status, answer = await self._pool.fetch("POST", url, body=body, within=self._within)
        if status != 200:
            raise WeightsError(f"its engine did not load {folder}: {_message(answer) or f'it answered {status}'}")
        _log.info("%s has loaded weight version %s from %s", group.group, version, folder)

    async def _check(self, group: Group, folder: str, version: str) -> None:
        refresh = await read_refresh(self._store)
        if refresh is None or refresh.phase in OVER or refresh.target.version != version:
            refresh = None
        prompt: Sequence[int] = refresh.prompt if refresh is not None else ()
        prompt = prompt or await asyncio.to_thread(self._engines.encode, folder, PROMPT)
        canary = Canary(exact=await self._exact())
        try:
            first = await canary.alone(group, prompt)
            partner = await self._partner(group, version)
            if partner is None:
                return
            pair = (group, partner) if group.role is Role.PREFILL else (partner, group)
            answers = await canary.together(*pair, prompt)
        finally:
            await canary.close()
        if group.role is Role.PREFILL and answers[0][0] != first:
            raise CanaryError(f"the canary began with token {first} alone, and with {answers[0][0]} in a pair")
        if refresh is not None:
            await self._compare(refresh, folder, answers, canary.alike)

    async def _exact(self) -> bool:
        """Whether every group of the fleet answers alike, whatever else it computes."""
        specs = (await read_snapshot(self._store)).desired
        # In a thread: the first time, command lines are made from files.
        return await asyncio.to_thread(lambda: all(answers_exactly(self._engines, spec) for spec in specs))

    async def _partner(self, group: Group, version: str) -> Group | None:
        """A group of the other role that has the version already."""
        groups = (await read_snapshot(self._store)).groups
        others = (one for one in groups if one.role is not group.role and one.routable)
        return next((one for one in others if one.weight_version == version and one.url), None)

    async def _compare(
        self, refresh: Refresh, folder: str, answers: Answers, alike: Callable[[Sequence[int], Sequence[int]], bool]
    ) -> None:
        """Hold the answers against what is expected, and against what the pairs before have answered."""
        if refresh.target.version != refresh.version:
            return  # on the way back: what was expected is of the new weights
        for answer in answers if refresh.expect else ():
            text = await asyncio.to_thread(self._engines.decode, folder, answer)
            if not text.lstrip().startswith(refresh.expect.lstrip()[: len(text)]):
                raise CanaryError("the canary's answer does not begin with what is expected")

        def note(now: Refresh) -> Refresh:
            same = now.version == refresh.version and now.began == refresh.began and not now.answer
            return msgspec.structs.replace(now, answer=answers[0]) if same else now

        noted = await change_refresh(self._store, note)
        if noted.answer and not alike(noted.answer, answers[0]):
            raise CanaryError("the canary's answer is another one than that of the first pair with these weights")


def answers_exactly(engines: Engines, spec: GroupSpec) -> bool:
    """Whether equal prompts get equal greedy answers from a group, whatever else is in the batch: on a CPU, and on GPUs
    with SGLang's flag for it. The command line says so. Raises NoEngineError."""
    return "GPU" not in engines.bundle(spec) or DETERMINISTIC in engines.command(spec, 0, _ANYWHERE).argv


def _message(answer: bytes) -> str:
    try:
        found = msgspec.json.decode(answer)
    except msgspec.MsgspecError:
        return ""
    text = str(found.get("message", "")) if isinstance(found, dict) else ""
    return " ".join(text.split())[:300]
