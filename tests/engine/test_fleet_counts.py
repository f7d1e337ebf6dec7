"""What the engines count is what really happened: KV moved, rows exchanged, no prompt computed twice."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import time
from pathlib import Path

import pytest
import torch

from chaos.idle import all_idle
from support.fleet import Fleet
from support.oracle import Oracle
from tandem.bench.client import stream
from tandem.core.shape import ModelShape
from tandem.engine.http1 import Pool
from tandem.fleet.counters import Counters, total

pytestmark = pytest.mark.timeout(120)

FLOAT32 = 4
TOKENS = 12
_seeds = itertools.count(1000)


@pytest.fixture
def prompt() -> list[int]:
    """37 tokens that no request has had before."""
    rng = random.Random(next(_seeds))
    return [rng.randrange(300, 900) for _ in range(37)]


def test_decode_computes_no_prompt(fleet: Fleet, prompt: list[int]) -> None:
    fleet.complete(prompt, TOKENS)
    assert fleet.counted("decode-0", "tandem_engine_batch_tokens_total", mode="extend") == 0


def test_prefill_computes_each_new_prompt_token_once_and_decodes_nothing(fleet: Fleet, prompt: list[int]) -> None:
    before = fleet.counted("prefill-0", "tandem_engine_batch_tokens_total", mode="extend")
    fleet.complete(prompt, TOKENS)
    assert fleet.counted("prefill-0", "tandem_engine_batch_tokens_total", mode="extend") - before == len(prompt)
    assert fleet.counted("prefill-0", "tandem_engine_batch_tokens_total", mode="decode") == 0


def test_the_kv_bytes_moved_are_tokens_times_layers_times_latent_size(
    fleet: Fleet, prompt: list[int], tiny: Path
) -> None:
    shape = ModelShape.from_config(json.loads((tiny / "config.json").read_text()))
    before = fleet.counted("prefill-0", "tandem_engine_kv_bytes_sent_total")
    fleet.complete(prompt, TOKENS)
    moved = fleet.counted("prefill-0", "tandem_engine_kv_bytes_sent_total") - before
    per_token = shape.layers * (shape.kv_lora_rank + shape.qk_rope_head_dim) * FLOAT32
    assert moved == len(prompt) * per_token == len(prompt) * shape.kv_bytes_per_token(FLOAT32)


def rows_that_must_cross(choices: dict[int, torch.Tensor], owner: int, experts_per_rank: int) -> dict[int, int]:
    """Layer → rows of rank `owner` with at least one expert on the other of two ranks."""
    return {layer: int((ids // experts_per_rank != owner).any(1).sum()) for layer, ids in choices.items()}


def rows_sent(fleet: Fleet, group: str) -> dict[tuple[int, int], float]:
    """(rank, layer) → rows sent to the other rank so far."""
    return {
        (int(sample["labels"]["rank"]), int(sample["labels"]["layer"])): sample["value"]  # type: ignore[index]
        for counters in fleet.counters(group)
        for sample in counters.get("tandem_engine_a2a_rows_sent_total", [])
    }


@pytest.mark.parametrize(("group", "mode"), [("prefill-0", "extend"), ("decode-0", "decode")])
def test_the_rows_exchanged_are_those_that_the_router_chose(
    fleet: Fleet, oracle: Oracle, prompt: list[int], tiny: Path, group: str, mode: str
) -> None:
    experts = json.loads((tiny / "config.json").read_text())["n_routed_experts"]
    tokens_before = [_tokens(counters, mode) for counters in fleet.counters(group)]
    before = rows_sent(fleet, group)
    answer = fleet.complete(prompt, TOKENS)
    after = rows_sent(fleet, group)
    grown = [_tokens(now, mode) - old for now, old in zip(fleet.counters(group), tokens_before, strict=True)]
    owner = grown.index(max(grown))
    choices = oracle.expert_choices(prompt + answer[:-1])
    span = slice(0, len(prompt)) if mode == "extend" else slice(len(prompt), None)
    expected = rows_that_must_cross({layer: ids[span] for layer, ids in choices.items()}, owner, experts // 2)
    assert {layer: after[owner, layer] - before.get((owner, layer), 0) for layer in expected} == expected
    assert sum(expected.values()) > 0


def _tokens(counters: Counters, mode: str) -> float:
    return total(counters, "tandem_engine_batch_tokens_total", mode=mode)


def test_a_second_after_a_client_has_left_both_engines_are_idle(fleet: Fleet, prompt: list[int]) -> None:
    asyncio.run(_idle_after_a_client_has_left(fleet, prompt, within=1))
    decoded = fleet.counted("decode-0", "tandem_engine_batch_tokens_total", mode="decode")
    assert fleet.complete([7], 2)  # the engines still serve, and have done nothing else meanwhile
    assert fleet.counted("decode-0", "tandem_engine_batch_tokens_total", mode="decode") - decoded <= 2


async def _idle_after_a_client_has_left(fleet: Fleet, prompt: list[int], within: float) -> None:
    """By what `/v1/loads` of both tells in reports that are younger than the leaving."""
    groups = await asyncio.to_thread(lambda: {group["group"]: group["url"] for group in fleet.status()["groups"]})
    await all_idle(lambda: groups, 10, since=time.time())
    await _leave_after(fleet, prompt, pieces=3)
    await all_idle(lambda: groups, within, since=time.time())


async def _leave_after(fleet: Fleet, prompt: list[int], pieces: int) -> None:
    body = {"model": fleet.status_model, "prompt": prompt, "max_tokens": 1500, "ignore_eos": True}
    pool = Pool()
    async with contextlib.aclosing(stream(pool, fleet.base, "/v1/completions", body, within=30)) as answer:
        async for _ in answer:
            pieces -= 1
            if not pieces:
                break
    await pool.close()


def _idle(fleet: Fleet) -> bool:
    loads = fleet.status()["loads"]
    return bool(loads) and all(dp["running"] == 0 and dp["waiting"] == 0 for group in loads.values() for dp in group)


def test_all_kv_is_released_when_traffic_has_ended(fleet: Fleet, prompt: list[int]) -> None:
    fleet.complete(prompt, TOKENS)
    fleet.until("no request is left in any engine", lambda: _idle(fleet), within=10)
