"""The bodies of `/generate` that the two legs of a request get, also where its answer goes on after a pair was lost."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tandem.core.routing import Pair
from tandem.core.types import Role

RESUMED = "tandem_resumed"
"""In `custom_params`: so many of the last `input_ids` are output, which penalties and grammars have to count as such
(`tandem.engine.plugin`)."""


class EngineRequest:
    """What one choice asks of the engines, whichever pair works on it."""

    __slots__ = ("_behind", "_common", "_engine", "_prompt", "_sampling")

    def __init__(
        self, prompt: Sequence[int], sampling: dict[str, Any], engine: Mapping[str, Any] | None = None
    ) -> None:
        """`sampling`: SGLang's `sampling_params`; `engine`: further fields of the body."""
        self._prompt = prompt
        self._sampling = sampling
        self._engine = engine or {}
        self._common = b""
        self._behind = 0

    def common(self, delivered: Sequence[int]) -> bytes:
        """The part of the body that both legs share, all but its opening brace, for an answer that has these tokens."""
        if not self._common or self._behind != len(delivered):
            self._common, self._behind = self._encode(delivered), len(delivered)
        return self._common

    def forget(self) -> None:
        """It is not needed soon; it is made again when it is."""
        self._common = b""

    def _encode(self, delivered: Sequence[int]) -> bytes:
        ids = [*self._prompt, *delivered] if delivered else self._prompt
        sampling = resumed(self._sampling, len(delivered)) if delivered else self._sampling
        body = {"input_ids": ids, "sampling_params": sampling, "stream": True, **self._engine}
        return msgspec.json.encode(body)[1:]


def resumed(sampling: Mapping[str, Any], delivered: int) -> dict[str, Any]:
    """The sampling parameters of an answer that goes on behind so many tokens.

    Seeds need no change: what is sampled depends on the seed and the position (`tandem.engine.cpu.seeds`; on GPUs
    SGLang's deterministic inference).
    """
    params = {**sampling, "custom_params": {**(sampling.get("custom_params") or {}), RESUMED: delivered}}
    if "max_new_tokens" in params:
        params["max_new_tokens"] = max(1, params["max_new_tokens"] - delivered)
    if params.get("min_new_tokens"):
        params["min_new_tokens"] = max(0, params["min_new_tokens"] - delivered)
    return params


def leg_body(pair: Pair, role: Role, room: int, common: bytes, incarnation: str) -> tuple[str, bytes]:
    """(request id, body) of one leg.

    SGLang aborts by prefix, so no id may begin another: all have one length. And all of one gateway begin with its
    incarnation, so that one abort ends everything that a dead gateway has left on an engine.
    """
    rid = f"{incarnation}-{uuid.uuid4().hex}"
    head: dict[str, Any] = {
        "rid": rid,
        "bootstrap_host": pair.bootstrap_host,
        "bootstrap_port": pair.bootstrap_port,
        "bootstrap_room": room,
    }
    if pair.target(role).dp_size > 1:
        head["routed_dp_rank"] = pair.target(role).dp_rank
    if pair.prefill.dp_size > 1:
        head["disagg_prefill_dp_rank"] = pair.prefill.dp_rank
    return rid, msgspec.json.encode(head)[:-1] + b"," + common
