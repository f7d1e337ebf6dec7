"""Asks one group a prompt and judges what it answers: alone, in a pair, and beside a pair that is known to serve.

The prompt is Tandem's own. How exactly answers must agree, and what a group can be asked alone, is in `canary.py`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from tandem.core.group_check import CheckVerdict, GroupCheck
from tandem.core.types import FleetSnapshot, Group, GroupSpec, GroupState, Role
from tandem.fleet.canary import Answers, Canary, CanaryError, SilentError
from tandem.fleet.engines import Engines, NoEngineError
from tandem.fleet.snapshot import read_snapshot
from tandem.fleet.weights import PROMPT, answers_exactly
from tandem.state import Store

_UP = (GroupState.READY, GroupState.CORDONED)
_AT_ONCE = 16
"""Prompts; a group of many DP ranks is asked one on each."""


class _Unknown(Exception):
    """The group cannot be judged now; one sentence without a subject."""


class GroupChecker:
    """For all groups of a fleet. Belongs to one event loop."""

    def __init__(self, store: Store, engines: Engines, *, within: float = 40.0, longest: float = 170.0) -> None:
        """Seconds that one answer may take, and all of a check."""
        self._store = store
        self._engines = engines
        self._within = within
        self._longest = longest

    async def check(self, group: Group) -> GroupCheck:
        """Whether a group may serve, as far as a prompt tells. Raises StoreError."""
        fleet = await read_snapshot(self._store)
        if (why := _not_now(group)) or not group.url:
            return GroupCheck(verdict=CheckVerdict.UNKNOWN, message=why or "tells no address yet")
        partner = _partner(fleet, group)
        known = None if partner is None else _known_pair(fleet, group, partner)
        involved = {one.group: one for one in (group, partner, *(known or ())) if one is not None}
        try:
            await self._ask(group, partner, known, [spec for spec in fleet.desired if spec.group in involved])
            verdict, message = (CheckVerdict.ALONE, _lonely(group)) if partner is None else (CheckVerdict.OK, "")
        except SilentError as error:
            verdict, message = CheckVerdict.SILENT, str(error)
        except CanaryError as error:
            verdict, message = CheckVerdict.WRONG, str(error)
        except (NoEngineError, _Unknown) as error:
            verdict, message = CheckVerdict.UNKNOWN, str(error)
        if verdict is not CheckVerdict.UNKNOWN and (changed := await self._changed(involved.values())):
            # Whatever was answered, it may be the fault of the one that changed.
            verdict, message = CheckVerdict.UNKNOWN, f"was being asked when {', '.join(changed)} restarted or left"
        name = "" if partner is None else partner.group
        return GroupCheck(verdict=verdict, message=message, epoch=group.epoch, partner=name)

    async def _ask(
        self, group: Group, partner: Group | None, known: tuple[Group, Group] | None, specs: Sequence[GroupSpec]
    ) -> None:
        """Return when all is well. Raises CanaryError, NoEngineError, _Unknown."""
        folder = self._engines.folder(group.weights_path)
        prompt = await asyncio.to_thread(self._engines.encode, folder, PROMPT)
        # In a thread: the first time, command lines are made from files.
        exact = await asyncio.to_thread(lambda: all(answers_exactly(self._engines, spec) for spec in specs))
        canary = Canary(within=self._within, exact=exact, at_once=_AT_ONCE)
        until = asyncio.get_running_loop().time() + self._longest
        try:
            try:
                async with asyncio.timeout_at(until):
                    first = await canary.alone(group, prompt)
            except TimeoutError as error:
                raise SilentError(f"the known prompt took more than {self._longest:g} s") from error
            if partner is None:
                return
            try:
                async with asyncio.timeout_at(until):
                    await self._ask_pair(canary, group, partner, known, prompt, first)
            except TimeoutError as error:  # each answer came in its time, so it is only slow, or the others are
                raise _Unknown(f"could not be asked as a pair within {self._longest:g} s") from error
        finally:
            await canary.close()

    async def _ask_pair(
        self,
        canary: Canary,
        group: Group,
        partner: Group,
        known: tuple[Group, Group] | None,
        prompt: Sequence[int],
        first: int,
    ) -> None:
        """`first`: the token with which the group began alone. Raises CanaryError, _Unknown."""
        pair = (group, partner) if group.role is Role.PREFILL else (partner, group)
        answers: Answers = ()
        try:
            answers = await canary.together(*pair, prompt)
            if group.role is Role.PREFILL and answers[0][0] != first:
                raise CanaryError(f"the canary began with token {first} alone, and with {answers[0][0]} in a pair")
            if known is not None:
                self._compare(canary, answers, await self._expected(canary, known, prompt), known)
        except CanaryError as error:
            if partner.routable and not isinstance(error, SilentError):
                raise
            try:
                token = await canary.alone(partner, prompt)
            except CanaryError as other:  # whoever fails alone is to blame: it is asked itself, if it is on trial
                raise _Unknown(f"cannot be asked as a pair: {other}") from other
            if partner.routable:
                raise
            # Neither serves, and one of them alone must be found wrong: the other is tried again with its successor.
            began = first if group.role is Role.PREFILL else token
            wrong = bool(answers) and answers[0][0] != began
            if not wrong and known is not None:
                wrong = (await self._expected(canary, known, prompt))[0] != began
            blamed = pair[0] if wrong else pair[1]
            if blamed is not group:
                why = f"does not answer well with {blamed.group}, which serves nobody either, and is to blame"
                raise _Unknown(f"{why}: {error}") from error
            raise

    @staticmethod
    async def _expected(canary: Canary, known: tuple[Group, Group], prompt: Sequence[int]) -> tuple[int, ...]:
        """What the pair that serves answers. Raises _Unknown."""
        try:
            return await canary.once(*known, prompt)
        except CanaryError as error:
            raise _Unknown(f"cannot be compared with {_names(known)}: {error}") from error

    @staticmethod
    def _compare(
        canary: Canary, answers: Iterable[Sequence[int]], expected: Sequence[int], known: tuple[Group, Group]
    ) -> None:
        for answer in answers:
            if not canary.alike(expected, answer):
                raise CanaryError(f"it does not answer as {_names(known)} do, which serve: {answer} and not {expected}")

    async def _changed(self, involved: Iterable[Group]) -> list[str]:
        """Those of these groups that are not any more what they were."""
        now = {one.group: one for one in (await read_snapshot(self._store)).groups}
        return [one.group for one in involved if not _is_same(one, now.get(one.group))]


def _not_now(group: Group) -> str:
    """Why a group cannot be asked now; empty = it can."""
    if group.state not in _UP:
        return f"is {group.state}"
    return f"takes weight version {group.loading}" if group.loading else ""


def _partner(fleet: FleetSnapshot, group: Group) -> Group | None:
    """A group to ask it with: one that serves before one that is cordoned, and may be on trial itself."""
    able = [one for one in fleet.groups if one.role is not group.role and _pairs(one, group) and not _not_now(one)]
    return min((one for one in able if one.url), key=lambda one: (not one.routable, one.group), default=None)


def _known_pair(fleet: FleetSnapshot, group: Group, partner: Group) -> tuple[Group, Group] | None:
    """A prefill and a decode group that serve with the same weights, without this one; rather one with its partner."""
    serve = [one for one in fleet.groups if one.routable and one.url and one.group != group.group and not one.loading]
    pairs = [
        (prefill, decode)
        for prefill in serve
        for decode in serve
        if prefill.role is Role.PREFILL and decode.role is Role.DECODE and _pairs(prefill, decode)
    ]
    able = [pair for pair in pairs if pair[0].weight_version == group.weight_version]
    return min(able, key=lambda pair: (partner not in pair, pair[0].group, pair[1].group), default=None)


def _pairs(one: Group, other: Group) -> bool:
    return (one.weight_version, one.kv_format) == (other.weight_version, other.kv_format)


def _is_same(before: Group, now: Group | None) -> bool:
    return (
        now is not None
        and not _not_now(now)
        and (now.epoch, now.weight_version) == (before.epoch, before.weight_version)
    )


def _lonely(group: Group) -> str:
    other = Role.DECODE if group.role is Role.PREFILL else Role.PREFILL
    what = f'KV format "{group.kv_format}" and weights "{group.weight_version}"'
    return f"answers alone, and no {other} group that is up has its {what}, so no pair can be asked"


def _names(pair: tuple[Group, Group]) -> str:
    return " and ".join(one.group for one in pair)
