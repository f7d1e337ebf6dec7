"""Whether engines with new weights answer well: one group alone, and two groups as a pair.

Alone, a prefill group computes a prompt for nobody: with SGLang's fake bootstrap host (0.5.23,
`disaggregation/utils.py`, `FAKE_BOOTSTRAP_HOST`, which its own health checks use) no KV is sent, and the first token is
real. A decode group gets no KV that way, so its tokens mean nothing: only that they come can be seen. (Not even their
probabilities: the first token and its own are from buffers that nobody has written.)
What the weights really say shows when both roles have them: then a prompt goes through both.

Greedy answers to one prompt are equal only where the engine computes alike whatever else is in its batch. On GPUs
SGLang does so with `--enable-deterministic-inference` alone; without it, two tokens that are nearly as likely may
change places, and all that follows is another text. There, only first tokens are compared.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import uuid
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from tandem.core.room_number import room_number
from tandem.core.types import Group, Role
from tandem.engine.client import EngineClient, EngineError

_T = TypeVar("_T")
Answers = tuple[tuple[int, ...], ...]
"""All different answers of one pair, in the order of their DP ranks; exact ones are one."""
FAKE_HOST = "2.2.2.2"
TOKENS = 8
"""Of a canary's answer."""


class CanaryError(Exception):
    """An answer was not as it must be; one sentence without a subject."""


class SilentError(CanaryError):
    """There was no answer at all."""


class Canary:
    """Asks engines directly. Belongs to one event loop."""

    def __init__(self, *, within: float = 120.0, exact: bool = True, at_once: int = 1) -> None:
        """`within`: seconds that one answer may take, once it was asked for. `exact`: answers are compared whole, not
        only how they begin. `at_once`: so many prompts are under way at a time."""
        self._within = within
        self._exact = exact
        self._turn = asyncio.Semaphore(at_once)
        self._client = EngineClient()
        self._incarnation = secrets.token_hex(6)

    async def alone(self, group: Group, prompt: Sequence[int]) -> int:
        """Ask every DP rank of a group that has no partner; return the first token. Raises CanaryError."""
        answers = await self._all(self._one(group, prompt, dp_rank) for dp_rank in range(group.dp_size))
        first = {answer[0] for answer in answers}
        if group.role is Role.PREFILL and len(first) > 1:
            raise CanaryError(f"its DP ranks disagree about the first token: {sorted(first)}")
        return answers[0][0]

    async def together(self, prefill: Group, decode: Group, prompt: Sequence[int]) -> Answers:
        """Send a prompt through both, over every DP rank of each; return the greedy answers. Raises CanaryError."""
        answers = await self._all(
            self._pair(prefill, decode, number % prefill.dp_size, number % decode.dp_size, prompt)
            for number in range(max(prefill.dp_size, decode.dp_size))
        )
        if not all(self.alike(answers[0], answer) for answer in answers):
            raise CanaryError(f"its DP ranks answer differently to the same prompt: {sorted(set(answers))}")
        return tuple(dict.fromkeys(answers))

    async def once(self, prefill: Group, decode: Group, prompt: Sequence[int]) -> tuple[int, ...]:
        """Send a prompt through one DP rank of each; return the greedy answer. Raises CanaryError."""
        return await self._pair(prefill, decode, 0, 0, prompt)

    def alike(self, one: Sequence[int], other: Sequence[int]) -> bool:
        """Whether two answers to one prompt are equal, as far as they must be."""
        return tuple(one) == tuple(other) if self._exact else one[0] == other[0]

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    async def _all(self, asked: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
        """The answers in their order; the first failure ends what is under way."""

        async def in_turn(one: Coroutine[Any, Any, _T]) -> _T:
            async with self._turn:
                return await one

        coroutines = list(asked)
        try:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(in_turn(one)) for one in coroutines]
        except* CanaryError as errors:
            raise _whole(errors) from errors
        finally:
            for one in coroutines:
                one.close()  # those whose turn never came
        return [task.result() for task in running]

    async def _one(self, group: Group, prompt: Sequence[int], dp_rank: int) -> tuple[int, ...]:
        tokens = 1 if group.role is Role.PREFILL else TOKENS
        room = room_number(secrets.randbits(62), dp_size=group.dp_size, dp_rank=dp_rank)
        body: dict[str, Any] = {"bootstrap_host": FAKE_HOST, "bootstrap_room": room}
        if group.role is Role.PREFILL:
            body["return_logprob"] = True
        if group.dp_size > 1:
            body["routed_dp_rank"] = dp_rank
        return await self._ask(group, prompt, tokens, body)

    async def _pair(
        self, prefill: Group, decode: Group, prefill_rank: int, decode_rank: int, prompt: Sequence[int]
    ) -> tuple[int, ...]:
        room = room_number(secrets.randbits(62), dp_size=prefill.dp_size, dp_rank=prefill_rank)
        common: dict[str, Any] = {
            "bootstrap_host": prefill.bootstrap_host,
            "bootstrap_port": prefill.bootstrap_port,
            "bootstrap_room": room,
            "return_logprob": True,
        }
        if prefill.dp_size > 1:
            common["disagg_prefill_dp_rank"] = prefill_rank
        ranks = ((prefill, prefill_rank), (decode, decode_rank))
        bodies = [{**common, "routed_dp_rank": rank} if group.dp_size > 1 else common for group, rank in ranks]
        try:
            async with asyncio.TaskGroup() as tasks:
                first = tasks.create_task(self._ask(prefill, prompt, TOKENS, bodies[0]))
                whole = tasks.create_task(self._ask(decode, prompt, TOKENS, bodies[1]))
        except* CanaryError as errors:
            raise _whole(errors) from errors
        if first.result()[0] != whole.result()[0]:
            raise CanaryError(f"{decode.group} did not begin with the token that {prefill.group} computed")
        return whole.result()

    async def _ask(self, group: Group, prompt: Sequence[int], tokens: int, extra: dict[str, Any]) -> tuple[int, ...]:
        rid = f"{self._incarnation}-{uuid.uuid4().hex}"
        body = {
            "rid": rid,
            "input_ids": list(prompt),
            "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
            "stream": True,
            **extra,
        }
        try:
            async with asyncio.timeout(self._within):
                stream = await self._client.generate(
                    group.url, msgspec.json.encode(body), first_byte_s=None, stall_s=None
                )
                ids: list[int] = []
                try:
                    async for chunk in stream:
                        ids += chunk.ids
                        if any(not math.isfinite(one.logprob) for one in chunk.logprobs or ()):
                            raise CanaryError(f"{group.group} answered with a token of no finite probability")
                finally:
                    stream.close()
        except (EngineError, TimeoutError) as error:
            how = f"gave no answer within {self._within:g} s" if isinstance(error, TimeoutError) else f"failed: {error}"
            raise SilentError(f"the canary on {group.group} {how}") from error
        if not ids:
            raise SilentError(f"the canary on {group.group} got no token")
        return tuple(ids)


def _whole(errors: BaseExceptionGroup[CanaryError]) -> CanaryError:
    """Several errors as one; it is silence only if all are."""
    found = [error for error in errors.exceptions if isinstance(error, CanaryError)]
    kind = SilentError if all(isinstance(error, SilentError) for error in found) else CanaryError
    return kind("; ".join(dict.fromkeys(str(error) for error in found)))
